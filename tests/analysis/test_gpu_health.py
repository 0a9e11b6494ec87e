from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from analysis.inference.gpu_health import gpu_warnings, whole_gpus

START_NS = 100_000_000_000


def event(kind: str, text: str, at_s: float, gpu: int = 0) -> dict[str, Any]:
    return {"t_ns": START_NS + round(at_s * 1e9), "gpu": gpu, "kind": kind, "text": text}


def rows(*counts: tuple[int, list[int | None]], mig: float | None = None) -> pd.DataFrame:
    """Uncorrected errors of each GPU, sample by sample."""
    return pd.concat(
        pd.DataFrame({"t_s": range(len(c)), "gpu": g, "mig": mig, "ecc_uncorrected": c})
        for g, c in counts
    )


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ({}, []),
        ({"failures": 3, "gpu_error": None, "gpu_failures": 0, "gpu_events": []}, []),
        (
            {"gpu_events": [event("lost", "GPU is lost", 31.2, gpu=1)]},
            ["GPU 1 was lost at 31 s (GPU is lost): the engine's samples go on"],
        ),
        (
            {"gpu_events": [event("lost", "GPU is lost", -400.0)]},
            ["GPU 0 was lost before the run"],
        ),
        (
            {"gpu_events": [event("xid", "79", 5.0), event("lost", "GPU is lost", 6.0)]},
            ["GPU 0 was lost at 6 s", "the driver reported XID 79 of GPU 0 at 5 s: "],
        ),
        (
            {"gpu_events": [event("xid", "31", t) for t in (4.0, 5.0, 9.0)]},
            ["the driver reported XID 31 of GPU 0 at 4 s and 2 times after: "],
        ),
        (
            {"gpu_events": [event("xid", "31", 4.0), event("xid", "31", 4.0, gpu=1)]},
            ["XID 31 of GPU 0 at 4 s: ", "XID 31 of GPU 1 at 4 s: "],
        ),
        (
            {"gpu_error": "NVML had not answered for 12 s when the run ended"},
            ["the GPU's samples end early: NVML had not answered for 12 s when the run ended; "],
        ),
        (
            {"gpu_failures": 2, "gpu_last_failure": "GPU 0: power_w: Timeout"},
            ["2 queries of a GPU failed (the last: GPU 0: power_w: Timeout): "],
        ),
    ],
)
def test_what_the_sampler_saw_is_said(sampler: dict[str, Any], words: list[str]) -> None:
    warnings = gpu_warnings(pd.DataFrame(), sampler, START_NS)
    assert len(warnings) == len(words)
    assert all(part in text for part, text in zip(words, warnings, strict=True))


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (pd.DataFrame({"t_s": [0.0], "gpu": 0, "power_w": 300.0}), []),
        (rows((0, [0, 0, 0])), []),
        (rows((0, [5, 5, 5])), []),
        (rows((0, [None, None])), []),
        (rows((0, [5, 5, 6])), ["GPU 0 counted one uncorrected memory error (ECC) during"]),
        (
            rows((0, [0, 0]), (1, [2, None, 6])),
            ["GPU 1 counted 4 uncorrected memory errors (ECC) during"],
        ),
    ],
)
def test_only_uncorrected_errors_of_this_run_count(gpu: pd.DataFrame, words: list[str]) -> None:
    """The counters run from the driver's start; a folder of an older version has none."""
    warnings = gpu_warnings(gpu, {}, START_NS)
    assert len(warnings) == len(words)
    assert all(part in text for part, text in zip(words, warnings, strict=True))


def test_instances_are_left_out_where_the_card_is_meant() -> None:
    whole, instance = rows((0, [1])), rows((0, [2]), mig=0.0)
    both = pd.concat([whole, instance])
    assert whole_gpus(both)["ecc_uncorrected"].tolist() == [1]
    old = both.drop(columns="mig")
    assert len(whole_gpus(old)) == 2
