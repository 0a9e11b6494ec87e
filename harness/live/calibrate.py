"""Runs the probes on an idle server: its step time, and the ceilings that it does not tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from analysis.calibration.cross_checks import CrossCheck, cross_checks
from analysis.calibration.implied_pool import implied_pool
from analysis.calibration.probe_readings import (
    ProbeResult,
    read_probes,
    sequence_ceiling,
    token_ceiling,
)
from analysis.calibration.probes import Probe, design_probes
from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.step_time import StepObservation, StepTimeFit
from harness.live.prober import SAMPLE_INTERVAL_S, CalibrationFailed, Prober
from harness.live.sampler import sample_engine
from harness.servers.engines import EngineFacts
from loadgen.workload import Workload

REPEATS = 3
MAX_REPEATS = 10
"""On an engine whose step time scatters, rounds of probes go on until the fit is good enough."""
BENT_BELOW_P = 0.01
"""A lack of fit this sure ends them: stricter than the test itself, which is asked after each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The step-time law with its errors, and the ceilings that the probes met (None: not met)."""

    fit: StepTimeFit
    observations: tuple[StepObservation, ...]
    probes: tuple[Probe, ...]
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    pool_shown_tokens: int
    """What the server says that its KV cache holds."""
    pool_implied: Estimate | None
    """What the occupancy during the probes says of it; None where they filled too little."""
    checks: tuple[CrossCheck, ...]
    """The engine's own word on its steps, beside the client's."""
    duration_s: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def limits(self, shown: EngineLimits) -> EngineLimits:
        """``shown`` with the ceilings that the probes met in place of the unknown ones."""
        return replace(
            shown,
            max_num_seqs=shown.max_num_seqs or self.max_num_seqs,
            max_num_batched_tokens=shown.max_num_batched_tokens or self.max_num_batched_tokens,
        )


async def calibrate(
    session: aiohttp.ClientSession,
    url: str,
    facts: EngineFacts,
    model: str,
    workload: Workload,
    limits: EngineLimits,
    vocabulary: range,
    seed: int,
    enough: Callable[[StepTimeFit], bool],
    progress: Callable[[str, float], None],
    log: Path | None = None,
) -> Calibration:
    """Run the probes one after another on an otherwise idle server and fit the step time.

    At least `REPEATS` rounds, then more until ``enough`` accepts the fit, at most `MAX_REPEATS`; a
    step time that is not linear ends them at once, as repeating makes its interval no smaller. ``log``
    is the file that a server started here writes to.
    ``progress`` hears a probe's name and the share that is done. Raises CalibrationFailed when a
    probe fails or the server is not idle, and what the sampler raises.
    """
    begun = time.monotonic()
    probes = design_probes(workload, limits)
    stop = asyncio.Event()
    samples: list[EngineSample] = []
    sampling = asyncio.create_task(
        sample_engine(session, url, facts, SAMPLE_INTERVAL_S, stop, samples.append)
    )
    prober = Prober(session, url, facts, model, vocabulary, samples, sampling, log)
    results: list[ProbeResult] = []
    try:
        progress("warm-up", 0.0)
        await prober.warm_up(probes, seed)
        for round_index in range(MAX_REPEATS):
            for done, probe in enumerate(probes):
                share = (round_index + done / len(probes)) / max(REPEATS, round_index + 1)
                progress(probe.name, share)
                results.append(await prober.run(probe, seed + 100 * round_index))
            if round_index == 0:
                probes = design_probes(workload, _met(results, limits))
            if round_index + 1 >= REPEATS and good_enough(fitted(results, limits)[0], enough):
                break
    finally:
        stop.set()
        await asyncio.gather(sampling, return_exceptions=True)
    fit, pairs = fitted(results, limits)
    sequences, budget, notes = _ceilings(results, limits)
    return Calibration(
        fit=fit,
        observations=tuple(seen for _, seen in pairs),
        probes=tuple(r.probe for r in results),
        max_num_seqs=sequences,
        max_num_batched_tokens=budget,
        pool_shown_tokens=limits.pool_tokens,
        pool_implied=implied_pool([r for r in results if not r.preemptions], limits),
        checks=cross_checks([pair for pair in pairs if not pair[1].disturbed], fit),
        duration_s=time.monotonic() - begun,
        notes=notes,
    )


def good_enough(fit: StepTimeFit, enough: Callable[[StepTimeFit], bool]) -> bool:
    """Would more rounds be of no use?"""
    bent = fit.lack_of_fit is not None and fit.lack_of_fit.p_value < BENT_BELOW_P
    return enough(fit) or bent


def _ceilings(
    results: Sequence[ProbeResult], limits: EngineLimits
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """`max_num_seqs` and the token budget where the probes met them, and what they showed."""
    if limits.sglang is not None:
        return None, None, ("the server shows its ceilings: none was looked for",)
    sequences, sequence_note = sequence_ceiling(results)
    budget, budget_note = token_ceiling(results, limits, sequences)
    return sequences, budget, (sequence_note, budget_note)


def _met(results: Sequence[ProbeResult], limits: EngineLimits) -> EngineLimits:
    """``limits`` with the token budget that a burst met, so that further prompts fit it."""
    found = limits.max_num_batched_tokens or _ceilings(results, limits)[1]
    return replace(limits, max_num_batched_tokens=found)


def fitted(
    results: Sequence[ProbeResult], limits: EngineLimits
) -> tuple[StepTimeFit, list[tuple[ProbeResult, StepObservation]]]:
    """The law of the probes that decoded without preemption, and what each one's token times say.

    Raises CalibrationFailed where they give none.
    """
    budget = _met(results, limits).mixed_budget
    decoding = [
        r
        for r in results
        if r.probe.output_tokens > 1 and not r.preemptions and r.probe.in_one_step(budget)
    ]
    try:
        fit, seen = read_probes(
            [(r.probe.name, r.records, r.reads) for r in decoding], limits.prefill_chunk
        )
    except ValueError as error:
        raise CalibrationFailed(
            f"the probes give no step-time law ({error}); is there a proxy that buffers the stream, or "
            "a pool that holds only a few requests?"
        ) from error
    return fit, list(zip(decoding, seen, strict=True))
