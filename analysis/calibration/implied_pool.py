"""The pool that the occupancy during the probes implies: a server that lies is seen before any load.

While a batch decodes, its lengths and its progress, by the engine's count of steps, say how many blocks
are resident; the engine's gauge says which share of its pool that is. The quotient is the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.calibration.probe_readings import ProbeResult
from analysis.calibration.probes import Probe
from analysis.numbers.estimate import Estimate, combined
from analysis.schedulers.engine import EngineLimits, EngineSample

LEAST_USAGE = 0.05
"""Gauges with two digits are too coarse below this share of the pool."""
PROGRESS_TOKENS = np.linspace(-0.5, 0.5, 5)
"""Where between two reads of the counter a request ended is known to half a step."""
HALF_A_STEP = 0.5
"""A counter is read halfway through the next step, in the mean."""
PROGRESS_ERROR_TOKENS = 0.5


def implied_pool(results: Sequence[ProbeResult], limits: EngineLimits) -> Estimate | None:
    """Tokens of the pool from what was resident and the share that the gauge showed, level 0.95.

    Each probe whose requests all decode at once gives one quotient; they are weighed by their errors
    (scatter of its samples, and half a token of progress per request). None where no probe filled
    `LEAST_USAGE` of the pool.
    """
    found = [pool for result in results if (pool := _of_probe(result, limits)) is not None]
    return combined(found)


def _of_probe(result: ProbeResult, limits: EngineLimits) -> Estimate | None:
    probe = result.probe
    if probe.prompts or result.steps < probe.output_tokens - 1:
        return None
    batch = [
        (r.first_token_ns, r.last_token_ns)
        for r in result.records
        if r.first_token_ns is not None and r.last_token_ns is not None
    ]
    first, last = np.array(batch, dtype=float).T
    begin, end = float(first.max()), float(last.min())
    ended = _steps_counted(result.samples, last)
    used = [
        (_resident_blocks(probe, ended - x.steps, limits), x.kv_usage)
        for x in result.samples
        if x.read_ns >= begin and x.t_ns <= end and x.running == probe.count and not x.waiting
    ]
    blocks, usage = np.array(used, dtype=float).reshape(-1, 2).T
    if len(used) < 2 or usage.mean() < LEAST_USAGE:
        return None
    pool = float(blocks.sum() / usage.sum())
    scatter = (blocks - pool * usage).std(ddof=1) / np.sqrt(len(used)) / usage.mean()
    progress = PROGRESS_ERROR_TOKENS * pool / (probe.prompt_tokens + probe.output_tokens / 2)
    return Estimate.normal(
        pool * limits.block_size,
        float(np.hypot(scatter, progress)) * limits.block_size,
        "tokens",
        "resident blocks over the share that the gauge shows",
    )


def _resident_blocks(probe: Probe, steps_to_come: np.ndarray, limits: EngineLimits) -> float:
    """Whole blocks that hold prompts and outputs so far; the KV of the last output is not written.

    How far a request is, the engine's own count of steps until its end tells: a clock does not, as steps
    that computed the prompts of others lasted longer.
    """
    ahead = 1 if limits.async_scheduling else 0
    tokens = probe.prompt_tokens + probe.output_tokens - steps_to_come - 1 + ahead
    blocks = np.ceil((tokens[:, None] + PROGRESS_TOKENS) / limits.block_size)
    return float(blocks.mean(axis=1).sum())


def _steps_counted(samples: Sequence[EngineSample], at_ns: np.ndarray) -> np.ndarray:
    """Steps that had ended, by the counter, just after the step that ended at each instant.

    After the last of them the counter stands: what it then shows belongs to that instant.
    """
    end_ns = float(at_ns.max())
    read = [((x.read_ns + x.t_ns) / 2, x.steps + HALF_A_STEP) for x in samples]
    seen = [*(point for point in read if point[0] < end_ns), (end_ns, samples[-1].steps)]
    instants, counted = np.array(seen, dtype=float).T
    return np.asarray(np.interp(at_ns, instants, counted))
