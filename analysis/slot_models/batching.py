"""The batching rules of arXiv 2504.07347: who gives how many tokens to the next batch. No memory limit.

A request brings ``prefill`` and then ``decode`` tokens of work. A batch of b tokens takes
c + a ceil(b / b0) (`Staircase`); a request gives one decode token at most, and requests go in order of
arrival. A batch takes ``budget`` tokens and ``most`` requests (their b_max and k_max). Each rule is a
plain function of the state; `run_batches` runs one batch after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaln, xlogy

UNBOUNDED = 1 << 62

BATCH = np.dtype(
    [
        *((name, np.float64) for name in ("start_ms", "duration_ms")),
        *((name, np.int64) for name in ("prefill_tokens", "decode_tokens", "requests")),
        *((name, np.int64) for name in ("present", "completed", "backlog_tokens")),
    ]
)
"""One batch; ``present`` and ``backlog_tokens``: requests, and their work, when it starts."""


@dataclass(frozen=True, slots=True)
class Staircase:
    """Milliseconds of a batch: ``c_ms`` + ``a_ms`` ceil(tokens / ``step_tokens``).

    CodeLlama-34B on one A100, arXiv 2504.07347: 11.28 + 35.47 ceil(b / 128), R^2 > 0.97.
    """

    c_ms: float
    a_ms: float
    step_tokens: int

    def __call__(self, tokens: int) -> float:
        return self.c_ms + self.a_ms * math.ceil(tokens / self.step_tokens)


@dataclass(frozen=True, slots=True)
class Limits:
    """Most tokens and most requests of a batch."""

    budget: int
    most: int = UNBOUNDED


@dataclass(slots=True, eq=False)
class Work:
    """A request that has not ended, and the work that it has left."""

    index: int
    prefill: int
    decode: int


Part = tuple[Work, int]
"""A request and the tokens that it gives: of its prompt, or, once that is done, one of its output."""
Rule = Callable[[Sequence[Work], Limits], list[Part]]


def faster_transformer(present: Sequence[Work], limits: Limits) -> list[Part]:
    """Decodes alone as long as there is one, whole prompts alone otherwise. Not work-conserving."""
    if any(not work.prefill for work in present):
        return _decodes(present, limits, [])
    return _whole_prompts(present, limits)


def vanilla_vllm(present: Sequence[Work], limits: Limits) -> list[Part]:
    """Whole prompts alone as long as there is one, decodes alone otherwise. Not work-conserving."""
    if any(work.prefill for work in present):
        return _whole_prompts(present, limits)
    return _decodes(present, limits, [])


def orca(present: Sequence[Work], limits: Limits) -> list[Part]:
    """Prompts first, in chunks, then decodes in the same batch. Work-conserving."""
    return _decodes(present, limits, _chunks(present, limits, []))


def sarathi(present: Sequence[Work], limits: Limits) -> list[Part]:
    """Decodes first, then prompts in chunks, from as few requests as possible. Work-conserving."""
    return _chunks(present, limits, _decodes(present, limits, []))


RULES: dict[str, Rule] = {
    "faster_transformer": faster_transformer,
    "vanilla_vllm": vanilla_vllm,
    "orca": orca,
    "sarathi": sarathi,
}
WORK_CONSERVING = ("orca", "sarathi")


def critical_rate(mean_tokens: float, limits: Limits, step_time: Staircase) -> float:
    """Requests per ms below which a work-conserving rule is stable: b_max / t(b_max) over E[tokens].

    Theorem 2 of arXiv 2504.07347, with no cap on requests; above it every rule is unstable whose batches
    are never more efficient when smaller, which a whole number of stair steps in the budget ensures.
    """
    return limits.budget / step_time(limits.budget) / mean_tokens


def overload_drift(rate: float, mean_tokens: float, limits: Limits, step_time: Staircase) -> float:
    """Growth of the backlog, tokens per ms: (rate E[tokens] - b_max / t(b_max))+ (their fluid limit)."""
    return max(0.0, rate * mean_tokens - limits.budget / step_time(limits.budget))


def capped_rate(prefill: int, decode: int, limits: Limits, step_time: Staircase) -> float:
    """Requests per ms that Sarathi serves at its fixed point with a cap on requests, all alike.

    In equilibrium a batch has n decodes and n prefill / decode prompt tokens. It takes most - 1
    decodes at most beside a chunk, unless the budget ends it before. [derived: their section 6.2 shows
    it for (290, 990), most 100 and budget 128: 99 decodes and 29 prompt tokens.] A larger budget does
    not keep this point: it lets prompts in faster than they leave, until ``most`` requests decode and
    none is prefilled.
    """
    decodes = min(limits.most - 1, limits.budget * decode // (prefill + decode))
    tokens = min(limits.budget, decodes + math.ceil(decodes * prefill / decode))
    return decodes / decode / step_time(tokens)


def faster_transformer_rate(
    prefill: int, decode: int, limits: Limits, step_time: Staircase
) -> float:
    """Requests per ms of FasterTransformer under backlog, requests all alike: as many whole prompts as
    fit, then as many decode batches as an output has tokens. 0 where no prompt fits. [derived]"""
    together = min(limits.budget // prefill, limits.most)
    if not together:
        return 0.0
    passes = math.ceil(together / limits.budget)
    cycle_ms = step_time(together * prefill) + decode * passes * step_time(
        min(together, limits.budget)
    )
    return together / cycle_ms


def vanilla_vllm_rate(prefill: int, decode: int, limits: Limits, step_time: Staircase) -> float:
    """Poisson rate, requests per ms, at which vanilla vLLM's decodes just keep up while many wait to
    decode; requests all alike. [derived]

    Prompts go first: between two decode batches, all prompts that came in the meantime are prefilled,
    and those that came in these batches. With many waiting to decode, the prompts that wait form a
    Markov chain of their own, and decode batches are full. The rate is the root of (decode tokens made
    per ms) = rate * decode. 0 where no prompt fits.
    """
    together = min(limits.budget // prefill, limits.most)
    if not together:
        return 0.0
    law = (prefill, together, limits, step_time)

    def spare(rate: float) -> float:
        return _decoding_share(rate, *law) - rate * decode

    highest = critical_rate(prefill + decode, limits, step_time)
    return float(brentq(spare, 1e-6 * highest, highest, rtol=1e-6))


def _decoding_share(
    rate: float, prefill: int, together: int, limits: Limits, step_time: Staircase
) -> float:
    """Decode tokens per ms of vanilla vLLM with many waiting to decode, prompts arriving at ``rate``."""
    most = max(100, 8 * together)
    batch = min(limits.budget, limits.most)
    sizes = np.minimum(np.arange(most), together)
    lasts = np.array([step_time(int(k) * prefill if k else batch) for k in range(together + 1)])
    count, mean = np.arange(most), rate * lasts[:, None]
    new = np.exp(xlogy(count, mean) - gammaln(count + 1) - mean)
    step = np.zeros((most, most))
    for waiting, size in enumerate(sizes):
        left = waiting - size
        step[waiting, left:] = new[size, : most - left]
        step[waiting, -1] += 1 - step[waiting].sum()
    balance = step.T - np.eye(most)
    balance[-1] = 1.0
    share = np.linalg.solve(balance, np.eye(most)[-1])
    return float(share[0] * batch / (share @ lasts[sizes]))


# -- filling a batch ---------------------------------------------------------------------------------


def _room(limits: Limits, batch: list[Part]) -> int:
    """Tokens that still fit; 0 where no request does."""
    if len(batch) >= limits.most:
        return 0
    return limits.budget - sum(tokens for _, tokens in batch)


def _decodes(present: Sequence[Work], limits: Limits, batch: list[Part]) -> list[Part]:
    batch = list(batch)
    for work in present:
        if not work.prefill:
            if not _room(limits, batch):
                break
            batch.append((work, 1))
    return batch


def _chunks(present: Sequence[Work], limits: Limits, batch: list[Part]) -> list[Part]:
    batch = list(batch)
    for work in present:
        if work.prefill:
            if not (room := _room(limits, batch)):
                break
            batch.append((work, min(work.prefill, room)))
    return batch


def _whole_prompts(present: Sequence[Work], limits: Limits) -> list[Part]:
    batch: list[Part] = []
    for work in present:
        if work.prefill:
            if work.prefill > _room(limits, batch):
                break
            batch.append((work, work.prefill))
    return batch


# -- batch after batch -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRun:
    """``batches`` of BATCH; ``finished_ms`` of each request, NaN where it did not end."""

    batches: NDArray[np.void]
    finished_ms: NDArray[np.float64]
    compiled: bool


def run_batches(
    rule: str,
    limits: Limits,
    step_time: Staircase,
    arrival_ms: NDArray[np.float64],
    prefill: NDArray[np.int64],
    decode: NDArray[np.int64],
    horizon_ms: float,
    compiled: bool | None = None,
) -> BatchRun:
    """Run a rule (a key of `RULES`) from empty; a batch starts when the one before has ended, or with
    an arrival. Arrays of shape (n,), in order of arrival; every request has prefill and decode tokens.

    A rule that cannot form a batch of who is there waits for the next arrival: a prompt larger than the
    budget blocks it for good where prompts are not cut. ``compiled`` as in
    `analysis.slot_models.slots.run_slots`. Raises ValueError for an unknown rule or a request
    without work.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r}: take one of {', '.join(RULES)}")
    if len(prefill) and min(prefill.min(), decode.min()) < 1:
        raise ValueError("every request has prefill and decode tokens")
    if find_spec("numba") is not None if compiled is None else compiled:
        # Here, so that the plain loop needs no numba.
        from analysis.slot_models.batching_compiled import run_compiled

        batches, finished = run_compiled(
            rule, limits, step_time, arrival_ms, prefill, decode, horizon_ms
        )
        return BatchRun(batches=batches, finished_ms=finished, compiled=True)
    return _plain(RULES[rule], limits, step_time, arrival_ms, prefill, decode, horizon_ms)


def _plain(
    rule: Rule,
    limits: Limits,
    step_time: Staircase,
    arrival_ms: NDArray[np.float64],
    prefill: NDArray[np.int64],
    decode: NDArray[np.int64],
    horizon_ms: float,
) -> BatchRun:
    """The reference."""
    arrivals = arrival_ms.tolist()
    work = list(map(Work, range(len(arrivals)), prefill.tolist(), decode.tolist()))
    present: list[Work] = []
    rows: list[tuple[float | int, ...]] = []
    finished = np.full(len(arrivals), np.nan)
    now_ms, arrived = 0.0, 0
    while now_ms < horizon_ms:
        while arrived < len(arrivals) and arrivals[arrived] <= now_ms:
            present.append(work[arrived])
            arrived += 1
        batch = rule(present, limits)
        if not batch:
            now_ms = arrivals[arrived] if arrived < len(arrivals) else horizon_ms
            continue
        prompts = sum(tokens for one, tokens in batch if one.prefill)
        decodes = sum(tokens for one, tokens in batch if not one.prefill)
        backlog = sum(one.prefill + one.decode for one in present)
        duration_ms = step_time(prompts + decodes)
        for one, tokens in batch:
            if one.prefill:
                one.prefill -= tokens
            else:
                one.decode -= tokens
        before, begun_ms = len(present), now_ms
        now_ms += duration_ms
        for one in present:
            if not one.decode:
                finished[one.index] = now_ms
        present = [one for one in present if one.decode]
        rows.append(
            (
                begun_ms,
                duration_ms,
                prompts,
                decodes,
                len(batch),
                before,
                before - len(present),
                backlog,
            )
        )
    return BatchRun(batches=np.array(rows, BATCH), finished_ms=finished, compiled=False)
