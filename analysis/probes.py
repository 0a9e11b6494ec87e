"""Probes below saturation: which batches to send, and what their times and counters show.

At a stationary load tokens per step, resident KV and running requests are proportional, so a plain
low-load run cannot tell their coefficients apart. These batches are built to differ: one request
alone, many short ones, few long ones, a typical batch, and prompts beside one decoding request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.engine import EngineLimits, EngineSample
from analysis.kv_demand import kv_demand_engine, residence_steps
from analysis.step_time import StepObservation
from loadgen.records import RequestRecord
from loadgen.workload import Workload

DECODE_STEPS = 48
"""Decode steps of a probe: the error of two token times is spread over so many steps."""
FILL = 0.7
"""Largest share of the pool that a probe fills: near saturation, and safely without preemption."""
SHORT_PROMPT = 8
BUDGET_STEPS = 48
"""A burst of prompts lasts so many steps if the token budget were what the load needs per step."""
MAX_PROBE_REQUESTS = 400


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


def step_observation(
    records: Sequence[RequestRecord], prefill_chunk: int | None = None
) -> StepObservation:
    """The decode steps of the longest output (of those, the one that began last).

    Between its first and last token lie exactly o - 1 steps, and, where prompts are computed in
    steps of their own of at most ``prefill_chunk`` tokens, those of the prompts in between. What
    the other requests add to those steps follows from the times of their own tokens: a prompt that
    completes in between adds all its tokens to one step, a request that decodes alongside one token
    and its context to each.
    """
    first = np.array([r.first_token_ns for r in records], dtype=float)
    last = np.array([r.last_token_ns for r in records], dtype=float)
    prompt = np.array([r.prompt_tokens for r in records], dtype=float)
    output = np.array([r.output_tokens for r in records], dtype=float)
    own = int(np.lexsort((first, output))[-1])
    begin, end = first[own], last[own]
    decode_ns = (end - begin) / (output[own] - 1)
    start, stop = np.maximum(first, begin), np.minimum(last, end)
    shared = np.maximum(stop - start, 0.0) / decode_ns
    progress = ((start + stop) / 2 - first) / np.maximum(last - first, 1.0) * (output - 1)
    resident = prompt + progress + 0.5
    joined = (first > begin) & (first <= end)
    steps = output[own] - 1
    if prefill_chunk is not None:
        steps += np.ceil(prompt[joined] / prefill_chunk).sum()
    return StepObservation(
        duration_s=(end - begin) / 1e9,
        steps=float(steps),
        tokens=float(shared.sum() + prompt[joined].sum()),
        kv_tokens=float((shared * resident).sum() + prompt[joined].sum()),
        running=float(shared.sum() + joined.sum()),
    )


def sequence_ceiling(results: Sequence[ProbeResult]) -> tuple[int | None, str]:
    """`max_num_seqs`, where requests waited beside a pool that had room for them."""
    short = [r for r in results if r.probe.name == "short"]
    met = [
        max(crowded) for r in short if (crowded := [x.running for x in r.samples if x.waiting > 0])
    ]
    count = short[0].probe.count
    if len(met) == len(short) and max(met) < count:
        return max(met), f"max_num_seqs {max(met)}: seen with {count} short requests offered"
    most = max(x.running for r in short for x in r.samples)
    return None, f"max_num_seqs is at least {most}: so many ran at once; taken as not binding"


def token_ceiling(
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
