"""What the probes showed: the steps of a decode, and the ceilings that a burst or a crowd met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.calibration.probes import BUDGET_STEPS, Probe
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.step_time import StepObservation
from loadgen.records import RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One line of vLLM's iteration log."""

    context_requests: int
    context_tokens: int
    generation_requests: int
    generation_tokens: int
    elapsed_s: float
    """What the scheduler waited for the forward pass: without scheduling, bookkeeping, and the pass
    itself where the engine's own process computes it before it waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWord:
    """What the engine itself told of its steps during a probe; None: it does not show that."""

    iterations: tuple[Iteration, ...] | None = None
    """vLLM's log, in its order."""
    decode_moments: tuple[float, ...] | None = None
    """SGLang: n, sum b, sum t, sum b^2, sum b t over decode steps that followed one another, with b
    requests in them and t us from one launch to the next."""
    prefill_tokens: int | None = None
    prefill_busy_s: float | None = None
    """SGLang: time and tokens of the steps that computed prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What one probe gave: its requests and the engine's samples from just before to just after."""

    probe: Probe
    records: tuple[RequestRecord, ...]
    samples: tuple[EngineSample, ...]
    told: EngineWord = EngineWord()

    @property
    def steps(self) -> int:
        return self.samples[-1].steps - self.samples[0].steps

    @property
    def preemptions(self) -> int:
        return self.samples[-1].preemptions - self.samples[0].preemptions


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
    half_step_ns = (last[own] - first[own]) / (output[own] - 1) / 2
    # A client reads the tokens of one step one after another: the first read of each step tells its end.
    alike = output == output[own]
    begin = first[alike & (first > first[own] - half_step_ns)].min()
    end = last[alike & (abs(last - last[own]) < half_step_ns)].min()
    decode_ns = (end - begin) / (output[own] - 1)
    start, stop = np.maximum(first, begin), np.minimum(last, end)
    shared = np.maximum(stop - start, 0.0) / decode_ns
    progress = ((start + stop) / 2 - first) / np.maximum(last - first, 1.0) * (output - 1)
    resident = prompt + progress + 0.5
    joined = (first > begin + half_step_ns) & (first <= end + half_step_ns)
    steps = output[own] - 1
    if prefill_chunk is not None:
        steps += np.ceil(prompt[joined] / prefill_chunk).sum()
    return StepObservation(
        duration_s=(end - begin) / 1e9,
        steps=float(steps),
        tokens=float(shared.sum() + prompt[joined].sum()),
        kv_tokens=float((shared * resident).sum() + prompt[joined].sum()),
        running=float(shared.sum() + joined.sum()),
        begin_ns=int(begin),
        end_ns=int(end),
        joined_prompt_tokens=int(prompt[joined].sum()),
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
