"""What the probes showed: the steps of a decode, and the ceilings that a burst or a crowd met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.calibration.disturbances import disturbed, disturbed_share
from analysis.calibration.probes import BUDGET_STEPS, Probe
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.step_time import StepObservation, StepTime, StepTimeFit, fit_step_time
from loadgen.request_record import RequestRecord, TokenRead

READINGS = 3
"""Of the probes, each with the law that the one before gave; a fourth moves nothing that matters."""
LAST_TOKENS = 0.25
"""Of a request's tokens, the last whose mean ends what is timed."""
ALIKE = StepTime(b0_s=1.0)
"""All steps take the same time: what a first reading has to go by."""


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
    reads: tuple[tuple[TokenRead, ...], ...] = ()
    """When the tokens of each request came, where the server counted them as they came."""

    @property
    def steps(self) -> int:
        return self.samples[-1].steps - self.samples[0].steps

    @property
    def preemptions(self) -> int:
        return self.samples[-1].preemptions - self.samples[0].preemptions


def read_probes(
    probes: Sequence[tuple[str, Sequence[RequestRecord], Sequence[Sequence[TokenRead]]]],
    prefill_chunk: int | None = None,
) -> tuple[StepTimeFit, list[StepObservation]]:
    """The step-time law of probes that decoded, and what each one says.

    Each has its design's name, its records and the times of their tokens (none: first and last alone).
    Those that something held up are marked, and left out of the law.

    How many of a probe's steps held a request that was not there all the time depends on how long its
    steps took, which is what is asked for: so they are read again with the law that they gave.
    Raises ValueError as `fit_step_time` does, or where tokens of a probe all came at once.
    """
    law = ALIKE
    for _ in range(READINGS):
        seen = [
            replace(step_observation(records, prefill_chunk, law, reads), probe=name)
            for name, records, reads in probes
        ]
        far = disturbed(seen)
        seen = [replace(o, disturbed=bool(held)) for o, held in zip(seen, far, strict=True)]
        fit = fit_step_time([o for o in seen if not o.disturbed])
        law = fit.law
    return replace(fit, disturbed_share=disturbed_share(seen)), seen


def step_observation(
    records: Sequence[RequestRecord],
    prefill_chunk: int | None = None,
    law: StepTime = ALIKE,
    reads: Sequence[Sequence[TokenRead]] = (),
) -> StepObservation:
    """The decode steps of the longest output (of those, the one that began last).

    Between its first token and its n-th lie exactly n - 1 steps, and, where prompts are computed in
    steps of their own of at most ``prefill_chunk`` tokens, those of the prompts in between. The n-th is
    the mean of the last quarter that came before any of the batch ended, as ``reads`` tell it: ends are
    told late, many at once, with their counts and reasons. Without such tokens in the second half the
    last one stands.

    What the other requests add to those steps follows from the times of their own tokens: a prompt
    that completes in between adds all its tokens to one step, a request that decodes alongside one
    token and its context to each. The n - 1 steps lie in that time as ``law`` spreads them: fuller ones
    take longer.
    """
    first = np.array([r.first_token_ns for r in records], dtype=float)
    last = np.array([r.last_token_ns for r in records], dtype=float)
    prompt = np.array([r.prompt_tokens for r in records], dtype=float)
    output = np.array([r.output_tokens for r in records], dtype=float)
    own = int(np.lexsort((first, output))[-1])
    half_step_ns = (last[own] - first[own]) / (output[own] - 1) / 2
    # A client reads the tokens of one step one after another: the first read of each step tells its end.
    together = (output == output[own]) & (first > first[own] - half_step_ns)
    begin, end = first[together].min(), last[together].min()
    in_step = [each for each, same in zip(reads, together, strict=False) if same]
    begun = _count_at(in_step, begin + half_step_ns)
    before = _before_the_ends(in_step, last[output == output[own]].min() - half_step_ns)
    steps = output[own] - begun
    if before is not None and before[1] - begun >= steps / 2:
        end, steps = before[0], before[1] - begun
    if not end > begin:
        raise ValueError("all tokens of a probe came at one instant")
    start, stop = np.clip(first, begin, end), np.clip(last, begin, end)
    joined = (first > begin + half_step_ns) & (first <= end + half_step_ns)
    alone_steps = np.ceil(prompt / prefill_chunk) if prefill_chunk else np.zeros(len(records))
    progress = (start + stop) / 2 - first
    progress *= (output - 1) / np.maximum(last - first, 1.0)
    held = prompt + np.minimum((stop - first) / (last - first + 1.0), 1.0) * (output - 1)
    edges, position = _clock(
        (start, stop, held),
        np.where(joined, alone_steps, 0.0),
        np.where(joined, prompt, 0.0),
        (end - begin) / steps,
        law,
    )
    position *= steps / position[-1]
    shared = np.interp(stop, edges, position) - np.interp(start, edges, position)
    # Counted back from the end: what came before took steps of another length.
    ended = last <= end + half_step_ns
    resident = prompt + np.where(ended, output - 1 - shared / 2, progress) + 0.5
    return StepObservation(
        duration_s=(end - begin) / 1e9,
        steps=float(steps + alone_steps[joined].sum()),
        tokens=float(shared.sum() + prompt[joined].sum()),
        kv_tokens=float((shared * resident).sum() + prompt[joined].sum()),
        running=float(shared.sum() + joined.sum()),
        begin_ns=int(begin),
        end_ns=int(end),
        joined_prompt_tokens=int(prompt[joined].sum()),
        left_out_steps=float(output[own] - begun - steps),
        left_out_s=float(last[together].min() - end) / 1e9,
    )


def _count_at(reads: Sequence[Sequence[TokenRead]], until_ns: float) -> int:
    """Tokens that the earliest read of requests in step brought; 1 where none came until then, as a
    server counts at the end alone."""
    first = min((each[0] for each in reads if each), default=None)
    return 1 if first is None or first.t_ns > until_ns else first.tokens


def _before_the_ends(
    reads: Sequence[Sequence[TokenRead]], ends_ns: float
) -> tuple[float, float] | None:
    """Mean instant and mean number of the last tokens that requests in step had before ``ends_ns``.

    Of each token the read that came first tells when. The mean of several, as one read may be late.
    """
    came: dict[int, int] = {}
    for read in (read for each in reads for read in each if read.t_ns < ends_ns):
        came[read.tokens] = min(read.t_ns, came.get(read.tokens, read.t_ns))
    if not came:
        return None
    first, last = min(came), max(came)
    late = [n for n in came if last - n <= LAST_TOKENS * (last - first)]
    return float(np.mean([came[n] for n in late])), float(np.mean(late))


def _clock(
    decoding: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    alone_steps: NDArray[np.float64],
    joined_tokens: NDArray[np.float64],
    step_ns: float,
    law: StepTime,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Instants, and how many decode steps ``law`` sees done by then, both of shape (m,).

    ``decoding`` is from when to when each request decodes, in ns, and its tokens in the cache at last,
    one more with each step of ``step_ns``; the two that follow are what prompts that join add, in the
    step that ends when they start. Shapes (n,).
    """
    start, stop, held = decoding
    edges = np.unique(np.concatenate([start, stop]))
    middle = (edges[:-1] + edges[1:]) / 2
    present = (start[:, None] <= middle) & (middle < stop[:, None])
    count = present.sum(axis=0)
    resident = held @ present - ((stop[:, None] - middle) * present).sum(axis=0) / step_ns
    decode_s = law.b0_s + (law.b1_s_per_token + law.b3_s_per_request) * count
    decode_s = decode_s + law.b2_s_per_kv_token * resident
    prompt_s = law.b0_s * alone_steps + law.b3_s_per_request * (joined_tokens > 0)
    prompt_s = prompt_s + (law.b1_s_per_token + law.b2_s_per_kv_token) * joined_tokens
    piece = np.maximum(np.searchsorted(edges, start) - 1, 0)
    spent_s = np.diff(edges) / 1e9 - np.bincount(piece, prompt_s, len(middle))
    return edges, np.concatenate([[0.0], np.cumsum(np.maximum(spent_s, 0.0) / decode_s)])


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
