"""What a server shows below saturation: its step time, and the ceilings that it does not tell.

At a stationary load tokens per step, resident KV and running requests are proportional, so a plain
low-load run cannot tell their coefficients apart. The probes here are built to differ: one request
alone, many short ones, few long ones, a typical batch, and prompts beside one decoding request.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import aiohttp
import numpy as np

from analysis.engine import EngineLimits, EngineSample
from analysis.kv_demand import kv_demand_engine, residence_steps
from analysis.step_time import StepObservation, StepTimeFit, fit_step_time
from harness.engines import EngineFacts
from harness.sampler import sample_engine
from loadgen.client import complete
from loadgen.prompts import completion_body, make_prompts
from loadgen.records import RequestRecord
from loadgen.workload import Workload

DECODE_STEPS = 48
"""Decode steps of a probe: the error of two token times is spread over so many steps."""
FILL = 0.7
"""Largest share of the pool that a probe fills: near saturation, and safely without preemption."""
SHORT_PROMPT = 8
REPEATS = 3
BUDGET_STEPS = 48
"""A burst of prompts lasts so many steps if the token budget were what the load needs per step."""
SAMPLE_INTERVAL_S = 0.05
SETTLE_S = 0.15
MAX_PROBE_REQUESTS = 400
PROBE_TIMEOUT_S = 120.0


class CalibrationFailed(Exception):
    """The probes did not give what a step-time law needs; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A batch of equal requests sent at one instant.

    While they decode, ``prompts`` further requests of ``prompt_length`` tokens and one output token
    follow one after another: each adds its prompt to one step of the batch.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    count: int
    prompts: int = 0
    prompt_length: int = 0

    @property
    def requests(self) -> int:
        return self.count + self.prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What one probe gave: its requests and the engine's samples from just before to just after."""

    probe: Probe
    records: tuple[RequestRecord, ...]
    samples: tuple[EngineSample, ...]

    @property
    def steps(self) -> int:
        return self.samples[-1].steps - self.samples[0].steps

    @property
    def preemptions(self) -> int:
        return self.samples[-1].preemptions - self.samples[0].preemptions


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


def design_probes(workload: Workload, limits: EngineLimits) -> list[Probe]:
    """Probes whose tokens, KV and running requests differ, sized by the pool and the workload.

    "short" is large enough to meet a ``max_num_seqs`` that would bind before the KV cache, "burst" to
    meet such a token budget.
    """
    s, o = workload.prompt_tokens, workload.output_tokens
    chunk = int(s.max())
    per_step = limits.pool_tokens / workload.mean(kv_demand_engine(s, o, chunk))
    running = per_step * workload.mean(residence_steps(s, o, chunk))
    mean_prompt = max(round(workload.mean(s)), SHORT_PROMPT)
    longest = min(limits.max_model_len or limits.pool_tokens, limits.pool_tokens)
    decode = max(2, min(DECODE_STEPS, longest - SHORT_PROMPT - 1))
    room = FILL * limits.num_blocks

    def fitting(prompt: int, output: int, wanted: float) -> int:
        blocks = math.ceil((prompt + output) / limits.block_size)
        return max(1, min(round(wanted), int(room / blocks), MAX_PROBE_REQUESTS))

    few = max(2, round(running / 10))
    long_prompt = max(
        SHORT_PROMPT, min(longest - decode - 1, int(FILL * limits.pool_tokens / few) - decode)
    )
    typical = min(mean_prompt, longest - decode - 1)
    needed_tokens = per_step * workload.mean(s + o - 1)
    burst = round(min(max(32.0, needed_tokens / 4), longest - 2))
    chunk_sized = round(min(3 * needed_tokens, longest - 2, 0.2 * limits.pool_tokens))
    short_decode = min(decode, 32)
    return [
        Probe(name="alone", prompt_tokens=SHORT_PROMPT, output_tokens=decode, count=1),
        Probe(
            name="short",
            prompt_tokens=SHORT_PROMPT,
            output_tokens=short_decode,
            count=fitting(SHORT_PROMPT, short_decode, 1.3 * running),
        ),
        Probe(
            name="long",
            prompt_tokens=long_prompt,
            output_tokens=decode,
            count=fitting(long_prompt, decode, few),
        ),
        Probe(
            name="typical",
            prompt_tokens=typical,
            output_tokens=decode,
            count=fitting(typical, decode, running),
        ),
        Probe(
            name="prompts",
            prompt_tokens=SHORT_PROMPT,
            output_tokens=decode,
            count=1,
            prompts=max(1, decode // 4),
            prompt_length=max(SHORT_PROMPT, chunk_sized),
        ),
        Probe(
            name="burst",
            prompt_tokens=burst,
            output_tokens=1,
            count=max(4, min(MAX_PROBE_REQUESTS, math.ceil(BUDGET_STEPS * needed_tokens / burst))),
        ),
    ]


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
    sequences, note_1 = _sequence_ceiling(results)
    budget, note_2 = _token_ceiling(results, limits, sequences)
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


# -- what the probes show ------------------------------------------------------------------------


def step_observation(records: Sequence[RequestRecord]) -> StepObservation:
    """The decode steps of the longest output (of those, the one that began last).

    Between its first and last token lie exactly o - 1 steps. What the other requests add to those
    steps follows from the times of their own tokens: a prompt that completes in between adds all its
    tokens to one step, a request that decodes alongside one token and its context to each.
    """
    first = np.array([r.first_token_ns for r in records], dtype=float)
    last = np.array([r.last_token_ns for r in records], dtype=float)
    prompt = np.array([r.prompt_tokens for r in records], dtype=float)
    output = np.array([r.output_tokens for r in records], dtype=float)
    own = int(np.lexsort((first, output))[-1])
    begin, end = first[own], last[own]
    steps = output[own] - 1
    step_ns = (end - begin) / steps
    start, stop = np.maximum(first, begin), np.minimum(last, end)
    shared = np.maximum(stop - start, 0.0) / step_ns
    progress = ((start + stop) / 2 - first) / np.maximum(last - first, 1.0) * (output - 1)
    resident = prompt + progress + 0.5
    joined = (first > begin) & (first <= end)
    return StepObservation(
        duration_s=(end - begin) / 1e9,
        steps=float(steps),
        tokens=float(shared.sum() + prompt[joined].sum()),
        kv_tokens=float((shared * resident).sum() + prompt[joined].sum()),
        running=float(shared.sum() + joined.sum()),
    )


def _sequence_ceiling(results: Sequence[ProbeResult]) -> tuple[int | None, str]:
    """`max_num_seqs`, where requests waited beside a pool that had room for them."""
    short = [r for r in results if r.probe.name == "short"]
    met = [
        max(crowded) for r in short if (crowded := [x.running for x in r.samples if x.waiting > 0])
    ]
    count = short[0].probe.count
    if len(met) == len(short) and max(met) < count:
        return max(met), f"max_num_seqs {max(met)}: seen with {count} short requests offered"
    return None, f"max_num_seqs is at least {count}: so many ran at once"


def _token_ceiling(
    results: Sequence[ProbeResult], limits: EngineLimits, sequences: int | None
) -> tuple[int | None, str]:
    """The token budget, where bursts of prompts ran through many equally full steps."""
    burst = [r for r in results if r.probe.name == "burst"]
    per_step = [v for r in burst if (v := _tokens_per_full_step(r)) is not None]
    if len(per_step) < len(burst):
        return None, "the token budget is not near: a burst of prompts took only a few steps"
    found = float(np.median(per_step))
    prompt = burst[0].probe.prompt_tokens
    if found > 0.6 * limits.pool_tokens:
        return None, f"the token budget is not near: {found:.0f} tokens per step fill the pool"
    if sequences is not None and found > 0.9 * sequences * prompt:
        return None, f"the token budget is not near: {sequences} prompts in every step"
    return round(found), f"max_num_batched_tokens about {found:.0f}: tokens of each step of a burst"


def _tokens_per_full_step(result: ProbeResult) -> float | None:
    """Prompt tokens per step in the middle of a burst; None if the burst took only a few steps."""
    if result.steps < BUDGET_STEPS / 3:
        return None
    busy = [x for x in result.samples if x.waiting > 0]
    if len(busy) < 3:
        return None
    steps = busy[-1].steps - busy[0].steps
    return (busy[-1].prompt_tokens - busy[0].prompt_tokens) / steps if steps > 0 else None
