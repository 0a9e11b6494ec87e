"""What the probes showed: the steps of a decode, and the ceilings that a burst or a crowd met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.calibration.probes import BUDGET_STEPS, Probe
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.step_time import StepObservation
from loadgen.records import RequestRecord

FLATTER = 1e-3
"""Weight of how flat a line is beside how well it fits: it decides where two points leave it open."""


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
    steps of their own of at most ``prefill_chunk`` tokens, those of the prompts in between. A prompt
    that completes in between adds all its tokens to one step. A request that decodes alongside adds
    one token and its context to each step that it shares: one of as many output tokens shares all
    but those by which it ends earlier (`_steps_ahead`), of another the times of its tokens tell.
    """
    first = np.array([r.first_token_ns for r in records], dtype=float)
    last = np.array([r.last_token_ns for r in records], dtype=float)
    prompt = np.array([r.prompt_tokens for r in records], dtype=float)
    output = np.array([r.output_tokens for r in records], dtype=float)
    own = int(np.lexsort((first, output))[-1])
    decodes = output[own] - 1
    half_step_ns = (last[own] - first[own]) / decodes / 2
    # A client reads the tokens of one step one after another: the first read of each step tells its end.
    alike = output == output[own]
    together = alike & (first > first[own] - half_step_ns)
    begin, end = first[together].min(), last[together].min()
    decode_ns = (end - begin) / decodes
    start, stop = np.maximum(first, begin), np.minimum(last, end)
    shared = np.maximum(stop - start, 0.0) / decode_ns
    progress = ((start + stop) / 2 - first) / np.maximum(last - first, 1.0) * (output - 1)
    ahead = _steps_ahead(
        first[alike], last[alike], decodes, begin, end, beside=prefill_chunk is None
    )
    shared[alike] = np.maximum(decodes - ahead, 0.0)
    progress[alike] = np.minimum((decodes + ahead) / 2, decodes)
    resident = prompt + progress + 0.5
    joined = (first > begin + half_step_ns) & (first <= end + half_step_ns)
    steps = decodes
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


def _steps_ahead(
    first_ns: NDArray[np.float64],
    last_ns: NDArray[np.float64],
    decodes: float,
    begin_ns: float,
    end_ns: float,
    *,
    beside: bool,
) -> NDArray[np.float64]:
    """How many steps before the last ones each of a batch of equal requests began and ended, shape (n,).

    The last ones decode from ``begin_ns`` to ``end_ns``, in ``decodes`` steps. Those that began in one
    step end in one step, so many steps before the next group as they began before it. Where groups
    decode ``beside`` the prompts of the others, those steps were equally many for all, or as many as
    full steps fit between, and not fewer than one: what makes the length of a step a line in the
    number of requests is taken. Otherwise their mean length tells. Shares of the time would not do:
    steps become shorter as requests end.
    """
    step_ns = (end_ns - begin_ns) / decodes
    order = np.argsort(first_ns)
    group = np.cumsum(np.diff(first_ns[order], prepend=first_ns.min()) > step_ns / 2)
    members = [order[group == g] for g in range(group[-1] + 1)]
    begun = np.array([first_ns[m].min() for m in members])
    ended = np.array([np.median(last_ns[m]) for m in members])
    seen = int(np.searchsorted(ended, begin_ns + step_ns / 2))
    before = np.full(len(members), decodes)
    if beside:
        sizes = np.array([len(m) for m in members[seen:]])
        before[seen:] = _beside_prompts(begun[seen:], ended[seen:] - begin_ns, sizes, decodes)
    else:
        before[seen:] = np.rint((end_ns - ended[seen:]) / step_ns)
    ahead = np.empty(len(first_ns))
    ahead[order] = before[group]
    return ahead


def _beside_prompts(
    begun_ns: NDArray[np.float64],
    ended_ns: NDArray[np.float64],
    sizes: NDArray[np.int_],
    decodes: float,
) -> NDArray[np.float64]:
    """Steps by which each group of ``sizes`` was before the last, when whose first tokens came is 0
    for ``ended_ns``."""
    gaps = len(sizes) - 1
    if gaps == 0:
        return np.zeros(1)
    begun = np.diff(begun_ns)
    times = np.maximum(np.diff(ended_ns, prepend=0.0), 1.0)
    running = np.cumsum(sizes[::-1])[::-1]
    best, least = np.ones(gaps), math.inf
    for shortest in range(1, int(decodes // gaps) + 1):
        for steps in (np.full(gaps, float(shortest)), _full_steps(begun, shortest)):
            left = decodes - steps.sum()
            if left <= 0:
                continue
            lengths = times / np.concatenate([[left], steps])
            off = _off_a_line(running, lengths)
            if off < least:
                best, least = steps, off
    return np.concatenate([np.cumsum(best[::-1])[::-1], [0.0]])


def _off_a_line(running: NDArray[np.int_], lengths: NDArray[np.float64]) -> float:
    """Squares of what a line leaves of each step's length, as shares, and a little for a steep one."""
    design = np.stack([np.ones(len(running)), running], axis=1) / lengths[:, None]
    coefficients = np.linalg.lstsq(design, np.ones(len(running)), rcond=None)[0]
    left = np.square(design @ coefficients - 1).sum()
    return float(left + FLATTER * np.square(np.diff(np.log(lengths))).sum())


def _full_steps(gaps_ns: NDArray[np.float64], shortest: int) -> NDArray[np.float64]:
    """So many steps as fit each gap, ``shortest`` in the shortest; they grow with what is cached.

    The last one may not be full, since no prompt follows.
    """
    step_ns = gaps_ns[: max(1, len(gaps_ns) - 1)].min() / shortest
    steps = np.ones(len(gaps_ns))
    for g, gap_ns in enumerate(gaps_ns[:-1]):
        steps[g] = max(1, round(gap_ns / step_ns))
        step_ns = gap_ns / steps[g]
    steps[-1] = max(1, math.ceil(gaps_ns[-1] / step_ns - 0.1))
    return steps


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
