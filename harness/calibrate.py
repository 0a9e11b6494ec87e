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
MAX_REPEATS = 10
"""On an engine whose step time scatters, rounds of probes go on until the fit is good enough."""
SAMPLE_INTERVAL_S = 0.05
SETTLE_S = 0.15
PROBE_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 60.0


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
    enough: Callable[[StepTimeFit], bool],
    progress: Callable[[str, float], None],
) -> Calibration:
    """Run the probes one after another on an otherwise idle server and fit the step time.

    At least `REPEATS` rounds, then more until ``enough`` accepts the fit, at most `MAX_REPEATS`.
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
    prober = _Prober(session, url, model, vocabulary, samples, sampling)
    results: list[ProbeResult] = []
    try:
        progress("warm-up", 0.0)
        await prober.warm_up(probes, seed)
        for round_index in range(MAX_REPEATS):
            for done, probe in enumerate(probes):
                share = (round_index + done / len(probes)) / max(REPEATS, round_index + 1)
                progress(probe.name, share)
                results.append(await prober.run(probe, seed + 100 * round_index))
            if round_index + 1 >= REPEATS and enough(_fitted(results, limits)):
                break
    finally:
        stop.set()
        await asyncio.gather(sampling, return_exceptions=True)
    sequences, budget, notes = _ceilings(results, limits)
    return Calibration(
        fit=_fitted(results, limits),
        observations=_observed(results, limits),
        probes=tuple(r.probe for r in results),
        max_num_seqs=sequences,
        max_num_batched_tokens=budget,
        duration_s=time.monotonic() - begun,
        notes=notes,
    )


def _ceilings(
    results: Sequence[ProbeResult], limits: EngineLimits
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """`max_num_seqs` and the token budget where the probes met them, and what they showed."""
    if limits.sglang is not None:
        return None, None, ("the server shows its ceilings: none was looked for",)
    sequences, sequence_note = sequence_ceiling(results)
    budget, budget_note = token_ceiling(results, limits, sequences)
    return sequences, budget, (sequence_note, budget_note)


def _observed(results: Sequence[ProbeResult], limits: EngineLimits) -> tuple[StepObservation, ...]:
    decoding = [r for r in results if r.probe.output_tokens > 1 and not r.preemptions]
    try:
        return tuple(
            replace(step_observation(r.records, limits.prefill_chunk), probe=r.probe.name)
            for r in decoding
        )
    except ValueError as error:
        raise CalibrationFailed(
            f"a probe's tokens all came at once ({error}): is there a proxy that buffers the stream?"
        ) from error


def _fitted(results: Sequence[ProbeResult], limits: EngineLimits) -> StepTimeFit:
    try:
        return fit_step_time(_observed(results, limits))
    except ValueError as error:
        raise CalibrationFailed(
            f"the probes give no step-time law ({error}); is there a proxy that buffers the stream, or "
            "a pool that holds only a few requests?"
        ) from error


@dataclass(frozen=True, eq=False)
class _Prober:
    """One server, and the samples that are being taken of it."""

    session: aiohttp.ClientSession
    url: str
    model: str
    vocabulary: range
    samples: list[EngineSample]
    sampling: asyncio.Task[Any]

    async def warm_up(self, probes: Sequence[Probe], seed: int) -> None:
        """A cold engine is slower: compile, allocate and connect before anything counts."""
        await self.until_idle()
        for probe in probes:
            few, short = min(probe.count, 64), min(probe.output_tokens, 8)
            await self.send(replace(probe, count=few, output_tokens=short), seed + 7)

    async def run(self, probe: Probe, seed: int) -> ProbeResult:
        """Send one probe to the idle server and wait until it is idle again."""
        before = await self.until_idle()
        records = await self.send(probe, seed)
        after = await self.until_idle()
        finished = after.finished - before.finished
        if finished != probe.requests:
            raise CalibrationFailed(
                f"the server finished {finished} requests during probe {probe.name!r} of "
                f"{probe.requests}: somebody else is using it; calibrate on an idle server"
            )
        during = (x for x in self.samples if before.t_ns <= x.t_ns <= after.t_ns)
        return ProbeResult(probe=probe, records=tuple(records), samples=tuple(during))

    async def send(self, probe: Probe, seed: int) -> list[RequestRecord]:
        """All requests of a probe, the following prompts in turn; every one must complete."""
        lengths = [(probe.prompt_tokens, probe.output_tokens)] * probe.count
        lengths += [(probe.prompt_length, 1)] * probe.prompts
        prompts = make_prompts([prompt for prompt, _ in lengths], seed, self.vocabulary)
        bodies = [
            completion_body(self.model, prompt, output, output)
            for prompt, (_, output) in zip(prompts, lengths, strict=True)
        ]

        async def one(index: int) -> RequestRecord:
            prompt, output = lengths[index]
            record = await complete(
                self.session,
                f"{self.url}/v1/completions",
                bodies[index],
                id=index,
                scheduled_ns=time.monotonic_ns(),
                prompt_tokens=prompt,
                output_tokens_designed=output,
                max_tokens=output,
                timeout_s=PROBE_TIMEOUT_S,
            )
            if record.outcome == "unfinished":
                # A cancelled request ends with a record; here the cancellation has to go on.
                raise asyncio.CancelledError
            return record

        async def in_turn() -> list[RequestRecord]:
            return [await one(i) for i in range(probe.count, probe.requests)]

        async def all_of_them() -> list[RequestRecord]:
            batch = [asyncio.create_task(one(i)) for i in range(probe.count)]
            followers = await in_turn()
            return [*await asyncio.gather(*batch), *followers]

        sent = asyncio.create_task(all_of_them())
        try:
            await asyncio.wait({sent, self.sampling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A probe that was sent in full has a result; one that a dead server holds does not.
            if not sent.done():
                sent.cancel()
                await asyncio.gather(sent, return_exceptions=True)
        if sent.cancelled():
            await self.sampling
            raise CalibrationFailed("sampling ended before the calibration did")
        records = sent.result()
        for r in records:
            if r.outcome != "completed" or r.output_tokens != r.output_tokens_designed:
                raise CalibrationFailed(
                    f"probe {probe.name!r}: a request of {r.prompt_tokens} + "
                    f"{r.output_tokens_designed} tokens was {r.outcome} with {r.output_tokens} "
                    f"output tokens ({r.error or 'no error'})"
                )
        return records

    async def until_idle(self, timeout_s: float = IDLE_TIMEOUT_S) -> EngineSample:
        """The first sample read a little after now with nothing waiting or running."""
        asked_ns = time.monotonic_ns() + round(SETTLE_S * 1e9)
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.sampling.done():
                await self.sampling
                raise CalibrationFailed("sampling ended before the calibration did")
            if self.samples and self.samples[-1].read_ns >= asked_ns:
                latest = self.samples[-1]
                if latest.waiting == 0 and latest.running == 0:
                    return latest
            await asyncio.sleep(SAMPLE_INTERVAL_S / 2)
        raise CalibrationFailed(
            f"the server was not idle for {timeout_s:.0f} s: stop other clients before calibrating"
        )
