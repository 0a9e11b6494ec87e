"""Reader for measured runs as LLMServingSim commits them: a folder with what one vLLM server did.

``meta.json``: the limits in force; ``requests.jsonl`` (or .gz): lengths and instants of each request by
the engine's clock; ``timeseries.csv``: running, waiting and KV usage, once a second.
"""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.capacity import Backlog, backlogged_window, completions, work_served
from analysis.inference.work import work_of
from analysis.numbers.estimate import Estimate
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.audit import KV_BOUND_USAGE, PINNED_SPREAD
from loadgen.records import Run

REQUESTS = ("requests.jsonl.gz", "requests.jsonl")
REQUEST_FIELDS = (
    "input_toks",
    "output_toks",
    "arrival_time",
    "queued_ts",
    "first_token_ts",
    "last_token_ts",
)
SERIES = ("t", "running", "waiting", "kv_cache_pct")


@dataclass(frozen=True, eq=False)
class MeasuredServer:
    """One measured run and the limits that were in force.

    ``frames``: the run from the first arrival to the last departure; its engine frame holds ``t_s``,
    ``waiting``, ``running`` and ``kv_usage``, which is NaN where the gauge never moved.
    ``pool_tokens`` is None where the run does not tell it.
    """

    name: str
    frames: RunFrames
    load_end_s: float
    """The last arrival: from then on the queue only drains."""
    max_num_seqs: int
    max_num_batched_tokens: int
    pool_tokens: int | None


def read_measured(folder: Path) -> MeasuredServer:
    """The measured run in a folder.

    The arrival process is on the wall clock and the engine on another: they are laid over each other by
    the request that entered the engine soonest. Raises ValueError, naming the file, where one is missing
    or is not of this form.
    """
    meta = _meta(folder / "meta.json")
    requests = _requests(folder)
    offset_s = float((requests["queued_ts"] - requests["arrival_time"]).min())
    origin_s = float(requests["arrival_time"].min()) + offset_s
    frame = pd.DataFrame(
        {
            "id": range(len(requests)),
            "scheduled_s": requests["arrival_time"] + offset_s - origin_s,
            "first_token_s": requests["first_token_ts"] - origin_s,
            "last_token_s": requests["last_token_ts"] - origin_s,
            "prompt_tokens": requests["input_toks"],
            "output_tokens": requests["output_toks"],
            "output_tokens_designed": requests["output_toks"],
            "max_tokens": requests["output_toks"],
            "outcome": "completed",
        }
    ).sort_values("scheduled_s", ignore_index=True)
    load_end_s, end_s = float(frame["scheduled_s"].max()), float(frame["last_token_s"].max())
    run = Run(
        id=folder.name,
        arrival_rate=(len(frame) - 1) / load_end_s,
        horizon_s=end_s,
        warmup_s=0.0,
        seed=0,
    )
    limits = meta["engine_kwargs"]
    return MeasuredServer(
        name=folder.name,
        frames=RunFrames(run, end_s, frame, _engine(folder / "timeseries.csv"), pd.DataFrame()),
        load_end_s=load_end_s,
        max_num_seqs=limits["max_num_seqs"],
        max_num_batched_tokens=limits["max_num_batched_tokens"],
        pool_tokens=meta.get("kv_cache", {}).get("num_kv_tokens"),
    )


def backlog_after_one_residence(server: MeasuredServer) -> Backlog:
    """The stretch with a waiting queue at the load's end, less what lies before one mean residence.

    Before that hardly anything has left. No more arrivals are what emptied the queue. Raises ValueError
    where nothing remains.
    """
    frames = server.frames
    seen_s = frames.per_sample("t_s")
    emptied = (seen_s > server.load_end_s) & (frames.per_sample("waiting") == 0)
    end_s = float(seen_s[np.flatnonzero(emptied)[0] - 1]) if emptied.any() else frames.end_s
    window = backlogged_window(replace(frames, end_s=end_s), 0.0)
    start_s = max(frames.mean_residence_s, 0.0 if window is None else window.start_s)
    if window is None or window.end_s <= start_s:
        raise ValueError(
            f"{server.name}: no queue waited beyond one mean residence time of "
            f"{frames.mean_residence_s:.3g} s: a service rate needs a run that was overloaded longer"
        )
    return Backlog(start_s, window.end_s)


def binding(server: MeasuredServer, window: Backlog) -> str:
    """What refused requests in the window, by the thresholds of
    `analysis.verdicts.audit.binding_resource`.

    "kv_cache", "max_num_seqs" or "unknown": steps were not recorded, so that a full token budget cannot
    be told.
    """
    usage, running = occupancy(server, window)
    if usage >= KV_BOUND_USAGE:
        return "kv_cache"
    pinned = running >= (1 - PINNED_SPREAD) * server.max_num_seqs - 1
    return "max_num_seqs" if pinned else "unknown"


def occupancy(server: MeasuredServer, window: Backlog) -> tuple[float, float]:
    """Mean share of the KV cache in use, NaN where not recorded, and mean number running."""
    engine = server.frames.engine
    inside = engine[engine["t_s"].between(window.start_s, window.end_s)]
    return float(inside["kv_usage"].mean()), float(inside["running"].mean())


def departure_rates(server: MeasuredServer, window: Backlog) -> tuple[Estimate, Estimate]:
    """Departures in the window by count, and by work in the unit of what binds, req/s.

    The lengths of all requests of the run stand for the law. Over fewer than five mean residence times
    the intervals are too narrow or too wide: what is served is correlated over one.
    """
    frames, unit = server.frames, binding(server, window)
    unit = "kv_cache" if unit == "unknown" else unit
    prompt, declared, output = (
        frames.requests[column].to_numpy(dtype=float)
        for column in ("prompt_tokens", "max_tokens", "output_tokens")
    )
    demand = float(work_of(unit, prompt, declared, output).mean())
    return (
        completions(frames, window).estimate,
        work_served(frames, window, demand, unit).estimate,
    )


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        limits = meta["engine_kwargs"]
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if not isinstance(limits[name], int):
                raise TypeError(f"{name} is {limits[name]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: does not tell the engine's limits: {error!r}") from error
    return meta


def _requests(folder: Path) -> pd.DataFrame:
    """One row per request, all times in seconds; every request has all of them."""
    path = next((folder / name for name in REQUESTS if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: no {' or '.join(REQUESTS)} in it")
    rows = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows.append({name: float(row[name]) for name in REQUEST_FIELDS})
            except (ValueError, KeyError, TypeError) as error:
                wanted = ", ".join(REQUEST_FIELDS)
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with the numbers {wanted}"
                ) from error
    if len(rows) < 2:
        raise ValueError(f"{path}: fewer than two requests")
    return pd.DataFrame(rows)


def _engine(path: Path) -> pd.DataFrame:
    """Gauges once a second, seconds from the first arrival."""
    try:
        series = pd.read_csv(path)
        columns = {name: series[name].astype(float) for name in SERIES}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a CSV file with the columns {', '.join(SERIES)}") from error
    usage = columns["kv_cache_pct"] / 100.0
    # A gauge that reads 0 while requests run was not connected.
    recorded = bool((usage > 0.0).any())
    return pd.DataFrame(
        {
            "t_s": columns["t"],
            "waiting": columns["waiting"],
            "running": columns["running"],
            "kv_usage": usage if recorded else math.nan,
        }
    )
