"""What befell the GPUs during a run, as warnings: losses, XID errors, uncorrected memory errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


def whole_gpus(gpu: pd.DataFrame) -> pd.DataFrame:
    """Rows of GPUs, without those of MIG instances, which tell neither clocks nor errors."""
    return gpu if "mig" not in gpu else gpu[gpu["mig"].isna()]


def gpu_warnings(gpu: pd.DataFrame, sampler: Mapping[str, Any], start_ns: int) -> tuple[str, ...]:
    """One sentence for each thing that qualifies the numbers of a run.

    ``gpu`` are the rows of `analysis.schedulers.frames.RunFrames.gpu`, ``sampler`` the sampler's
    statistics of the run, of which a folder of an older version lacks some; ``start_ns`` is the
    run's start.
    """
    return (*_events(sampler, start_ns), *_ecc(gpu), *_gaps(sampler))


def _events(sampler: Mapping[str, Any], start_ns: int) -> list[str]:
    warnings = []
    xids: dict[tuple[int, str], list[float]] = {}
    for event in sampler.get("gpu_events", ()):
        at_s = (event["t_ns"] - start_ns) / 1e9
        if event["kind"] == "xid":
            xids.setdefault((event["gpu"], event["text"]), []).append(at_s)
            continue
        when = f"at {at_s:.0f} s" if at_s >= 0 else "before the run"
        warnings.append(
            f"GPU {event['gpu']} was lost {when} ({event['text']}): the engine's samples go on, but an "
            "engine that used it is not the one that was calibrated: reset the GPU and measure again"
        )
    for (gpu, number), times_s in xids.items():
        times = "" if len(times_s) == 1 else f" and {len(times_s) - 1} times after"
        when = f"at {times_s[0]:.0f} s" if times_s[0] >= 0 else "before the run"
        warnings.append(
            f"the driver reported XID {number} of GPU {gpu} {when}{times}: work on the card was "
            "disturbed: NVIDIA's catalogue of XIDs says by what: mend it and measure again"
        )
    return warnings


def _ecc(gpu: pd.DataFrame) -> list[str]:
    """The counters go on from the driver's start: only what is new in this run counts."""
    if "ecc_uncorrected" not in gpu:
        return []
    warnings = []
    for index, rows in whole_gpus(gpu).groupby("gpu"):
        counts = rows["ecc_uncorrected"].dropna().to_numpy(dtype=float)
        new = int(counts[-1] - counts[0]) if len(counts) else 0
        if new > 0:
            errors = (
                "one uncorrected memory error" if new == 1 else f"{new} uncorrected memory errors"
            )
            warnings.append(
                f"GPU {index} counted {errors} (ECC) during the run: the work in that memory was cut "
                "off or wrong: see nvidia-smi -q -d ECC, reset or replace the card, measure again"
            )
    return warnings


def _gaps(sampler: Mapping[str, Any]) -> list[str]:
    warnings = []
    if sampler.get("gpu_error"):
        warnings.append(
            f"the GPU's samples end early: {sampler['gpu_error']}; the engine's are whole, but what the "
            "GPU did then is not known"
        )
    if sampler.get("gpu_failures"):
        warnings.append(
            f"{sampler['gpu_failures']} queries of a GPU failed (the last: "
            f"{sampler['gpu_last_failure']}): its samples have gaps there"
        )
    return warnings
