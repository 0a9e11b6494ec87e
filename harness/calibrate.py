"""Runs the probes on an idle server: its step time, and the ceilings that it does not tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import aiohttp

from analysis.engine import EngineLimits, EngineSample
from analysis.probes import (
    Probe,
    ProbeResult,
    design_probes,
    sequence_ceiling,
    step_observation,
    token_ceiling,
)
from analysis.step_time import StepObservation, StepTimeFit, fit_step_time
from harness.engines import EngineFacts
from harness.sampler import sample_engine
from loadgen.client import complete
from loadgen.prompts import completion_body, make_prompts
from loadgen.records import RequestRecord
from loadgen.workload import Workload

REPEATS = 3
SAMPLE_INTERVAL_S = 0.05
SETTLE_S = 0.15
PROBE_TIMEOUT_S = 120.0


class CalibrationFailed(Exception):
    """The probes did not give what a step-time law needs; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The step-time law with its errors, and the ceilings that the probes met (None: not met)."""

    fit: StepTimeFit
    observations: tuple[StepObservation, ...]
    probes: tuple[Probe, ...]
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
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
    progress: Callable[[str, float], None] | None = None,
) -> Calibration:
    """Run the probes one after another on an otherwise idle server and fit the step time.

    ``progress`` hears a probe's name and the share that is done. Raises CalibrationFailed when a probe
    fails or the server is not idle, and what the sampler raises.
    """
    begun = time.monotonic()
    probes = design_probes(workload, limits)
    samples: list[EngineSample] = []
    stop = asyncio.Event()
    sampling = asyncio.create_task(
        sample_engine(session, url, facts, SAMPLE_INTERVAL_S, stop, samples.append)
    )
    results: list[ProbeResult] = []
    try:
        await _warm_up(session, url, model, probes, vocabulary, seed)
        await _until_idle(samples, sampling)
        rounds = [(i, p) for i in range(REPEATS) for p in probes]
        for done, (index, probe) in enumerate(rounds):
            if progress is not None:
                progress(probe.name, done / len(rounds))
            results.append(
                await _run_probe(
                    session, url, model, probe, vocabulary, seed + 100 * index, samples, sampling
                )
            )
    finally:
        stop.set()
        await sampling
    observations = tuple(
        step_observation(r.records)
        for r in results
        if r.probe.output_tokens > 1 and not r.preemptions
    )
    sequences, note_1 = sequence_ceiling(results)
    budget, note_2 = token_ceiling(results, limits, sequences)
    return Calibration(
        fit=fit_step_time(observations),
        observations=observations,
        probes=tuple(probes),
        max_num_seqs=sequences,
        max_num_batched_tokens=budget,
        duration_s=time.monotonic() - begun,
        notes=(note_1, note_2),
    )


# -- probes --------------------------------------------------------------------------------------


async def _send(
    session: aiohttp.ClientSession, url: str, model: str, probe: Probe, vocabulary: range, seed: int
) -> list[RequestRecord]:
    lengths = [(probe.prompt_tokens, probe.output_tokens)] * probe.count
    lengths += [(probe.prompt_length, 1)] * probe.prompts
    prompts = make_prompts([prompt for prompt, _ in lengths], seed, vocabulary)
    bodies = [
        completion_body(model, prompt, output, output)
        for prompt, (_, output) in zip(prompts, lengths, strict=True)
    ]

    async def one(index: int) -> RequestRecord:
        prompt, output = lengths[index]
        return await complete(
            session,
            f"{url}/v1/completions",
            bodies[index],
            id=index,
            scheduled_ns=time.monotonic_ns(),
            prompt_tokens=prompt,
            output_tokens_designed=output,
            max_tokens=output,
            timeout_s=PROBE_TIMEOUT_S,
        )

    async def in_turn() -> list[RequestRecord]:
        return [await one(i) for i in range(probe.count, probe.requests)]

    batch = [asyncio.create_task(one(i)) for i in range(probe.count)]
    followers = await in_turn()
    records = [*await asyncio.gather(*batch), *followers]
    bad = [
        r
        for r in records
        if r.outcome != "completed" or r.output_tokens != r.output_tokens_designed
    ]
    if bad:
        first = bad[0]
        raise CalibrationFailed(
            f"probe {probe.name!r}: {len(bad)} of {len(records)} requests did not complete with the "
            f"asked length; the first, {first.prompt_tokens} + {first.output_tokens_designed} tokens, "
            f"was {first.outcome} with {first.output_tokens} ({first.error})"
        )
    return records


async def _warm_up(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    probes: Sequence[Probe],
    vocabulary: range,
    seed: int,
) -> None:
    """A cold engine is slower: compile, allocate and connect before anything counts."""
    for probe in probes:
        await _send(
            session,
            url,
            model,
            replace(probe, count=min(probe.count, 64), output_tokens=min(probe.output_tokens, 8)),
            vocabulary,
            seed + 7,
        )


async def _run_probe(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    probe: Probe,
    vocabulary: range,
    seed: int,
    samples: list[EngineSample],
    sampling: asyncio.Task[Any],
) -> ProbeResult:
    before = await _until_idle(samples, sampling)
    records = await _send(session, url, model, probe, vocabulary, seed)
    after = await _until_idle(samples, sampling)
    finished = after.finished - before.finished
    if finished != probe.requests:
        raise CalibrationFailed(
            f"the server finished {finished} requests during probe {probe.name!r} of {probe.requests}: "
            "somebody else is using it; calibrate on an idle server"
        )
    return ProbeResult(
        probe=probe,
        records=tuple(records),
        samples=tuple(x for x in samples if before.t_ns <= x.t_ns <= after.t_ns),
    )


async def _until_idle(
    samples: list[EngineSample], sampling: asyncio.Task[Any], timeout_s: float = 60.0
) -> EngineSample:
    """The first sample read after now with nothing waiting or running."""
    asked_ns = time.monotonic_ns() + round(SETTLE_S * 1e9)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if sampling.done():
            await sampling
            raise CalibrationFailed("sampling ended before the calibration did")
        if samples and samples[-1].read_ns >= asked_ns:
            latest = samples[-1]
            if latest.waiting == 0 and latest.running == 0:
                return latest
        await asyncio.sleep(SAMPLE_INTERVAL_S / 2)
    raise CalibrationFailed(
        f"the server was not idle for {timeout_s:.0f} s: stop other clients before calibrating"
    )
