"""Cases of the slot and batch models, run over seeds: what is predicted, what was simulated."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.inference.slot_growth import Growth, growth
from analysis.slot_models.batching import (
    WORK_CONSERVING,
    Limits,
    Staircase,
    capped_rate,
    critical_rate,
    faster_transformer_rate,
    run_batches,
    vanilla_vllm_rate,
)
from analysis.slot_models.slots import Load, SlotRun, evenly, run_slots
from analysis.theory.policy_rates import Law, Stability, eviction_free, stability
from harness.hypotheses.theory_config import BatchCase, ClassConfig, SlotCase

POINTS = 601
"""Instants at which N of a batch run is read."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Over independent seeds: the mean and its standard error, NaN of a single seed."""

    value: float
    error: float

    @staticmethod
    def of(values: list[float]) -> Mean:
        error = (
            float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        )
        return Mean(float(np.mean(values)), error)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One case: what its policy's condition says, and what came of it. Rates are per slot, or per s."""

    name: str
    policy: str
    offered: float | None
    """None: the queue was never empty."""
    predicted: Stability
    completed: Mean
    quantities: dict[str, Mean]
    growth: Growth | None
    published: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def law_of(classes: tuple[ClassConfig, ...]) -> Law:
    """The law of all requests: uniform lengths are spread out over their pairs, independent."""
    prompts, outputs, shares = [], [], []
    total = sum(c.share for c in classes)
    for c in classes:
        first, second = (_values(x) for x in (c.prompt_tokens, c.output_tokens))
        grid = np.meshgrid(first, second, indexing="ij")
        prompts.append(grid[0].ravel())
        outputs.append(grid[1].ravel())
        count = len(first) * len(second)
        shares.append(np.full(count, c.share / total / count))
    return Law(
        prompt_tokens=np.concatenate(prompts),
        output_tokens=np.concatenate(outputs),
        shares=np.concatenate(shares),
    )


def _values(tokens: int | tuple[int, int]) -> NDArray[np.int64]:
    low, high = (tokens, tokens) if isinstance(tokens, int) else tokens
    return np.arange(low, high + 1)


def slot_rate(case: SlotCase) -> float | None:
    """Arrivals per slot that are offered; None: the queue is never empty."""
    if case.load is None:
        return case.rate
    return case.load * eviction_free(law_of(case.classes), case.memory_tokens)


def slot_condition(case: SlotCase) -> Stability:
    """What is known of the case's policy before any run."""
    law = law_of(case.classes)
    cap = case.budget
    if case.budget_of_free is not None:
        cap = case.budget_of_free * eviction_free(law, case.memory_tokens)
    if case.drawn_budget is not None:
        cap = sum(case.drawn_budget) / 2
    budgets = None if case.class_budgets is None else np.array(case.class_budgets)
    return stability(case.policy, law, case.memory_tokens, cap, budgets)


def slot_run(case: SlotCase, seed: int) -> SlotRun:
    """One run of a case. Everything random is drawn here."""
    rng = np.random.default_rng(seed)
    law = law_of(case.classes)
    rate, most = slot_rate(case), eviction_free(law, case.memory_tokens)
    if rate is None:
        # A queue of twice what can be served; the budgets of classes may take more.
        needed = 2 * max(most, float(sum(case.class_budgets or (0,)))) * case.slots
        arrival = np.zeros(int(needed) + 100, np.int64)
    else:
        counts = rng.poisson(rate, case.slots)
        counts[0] += case.preload
        arrival = np.repeat(np.arange(case.slots), counts)
    drawn = rng.choice(len(law.shares), len(arrival), p=law.shares)
    prompts, outputs = law.prompt_tokens[drawn], law.output_tokens[drawn]
    lane = np.zeros(len(arrival), np.int64)
    if case.class_budgets is not None:
        # Classes are alike inside: their number is the index of the law.
        lane = drawn
    elif case.shortest_first:
        lane = np.unique(outputs, return_inverse=True)[1]
    load = Load(arrival_slot=arrival, prompt_tokens=prompts, output_tokens=outputs, lane=lane)
    return run_slots(case.policy, case.memory_tokens, load, case.slots, _budgets(case, most, rng))


def _budgets(case: SlotCase, most: float, rng: np.random.Generator) -> NDArray[np.int64] | None:
    if case.class_budgets is not None:
        return np.array([case.class_budgets])
    if case.drawn_budget is not None:
        low, high = case.drawn_budget
        return rng.integers(low, high + 1, (case.slots, 1))
    cap = case.budget if case.budget_of_free is None else case.budget_of_free * most
    return None if cap is None else evenly(cap, case.slots)


def run_slot_case(case: SlotCase) -> Found:
    """All seeds of a case, and means over them."""
    law = law_of(case.classes)
    rate = slot_rate(case)
    begin, duration = case.warm_up_slots, case.slots - case.warm_up_slots
    rows: list[dict[str, float]] = []
    numbers = []
    for seed in range(1, case.seeds + 1):
        run = slot_run(case, seed)
        rows.append(_slot_quantities(run, begin))
        numbers.append(run.number_in_system[begin:].astype(float))
    found = None
    if rate is not None:
        work = (
            law.prompt_tokens * law.output_tokens + law.output_tokens * (law.output_tokens + 1) / 2
        )
        cv2 = float(law.shares @ work**2) / law.mean_work**2 - 1
        found = growth(numbers, duration, rate, 1 + cv2, "requests/slot")
    means = {key: Mean.of([row[key] for row in rows]) for key in rows[0]}
    return Found(
        name=case.name,
        policy=case.policy,
        offered=rate,
        predicted=slot_condition(case),
        completed=means.pop("completed per slot"),
        quantities=means,
        growth=found,
        published=case.published,
    )


def _slot_quantities(run: SlotRun, begin: int) -> dict[str, float]:
    part = run.slots[begin:]
    completed = float(part["completed"].sum())
    used = float(part["used_tokens"].sum())
    ended = run.finished_slot >= begin
    sojourn = (run.finished_slot - run.load.arrival_slot)[ended] + 1
    return {
        "completed per slot": completed / len(part),
        "evictions per completion": float(part["evicted"].sum()) / max(completed, 1.0),
        "memory-time lost": float(part["lost_token_slots"].sum()) / max(used, 1.0),
        "tokens lost per completion": float(part["lost_tokens"].sum()) / max(completed, 1.0),
        "recomputed per completion": float(part["recomputed_tokens"].sum()) / max(completed, 1.0),
        "used tokens": used / len(part),
        "most used": float(run.slots["used_tokens"].max()),
        "slots that overflow": float(part["overflow"].mean()),
        "waiting": float(part["waiting"].mean()),
        "sojourn, slots": float(sojourn.mean()) if len(sojourn) else math.nan,
    }


def batch_rate(case: BatchCase) -> float:
    """Requests per ms that are offered."""
    if case.interval_ms is not None:
        return 1 / case.interval_ms
    if case.rate_per_s is not None:
        return case.rate_per_s / 1000
    assert case.load is not None
    return case.load * critical_rate(
        case.prefill_tokens + case.decode_tokens, _limits(case), _staircase(case)
    )


def _limits(case: BatchCase) -> Limits:
    if case.most_requests is None:
        return Limits(case.budget_tokens)
    return Limits(case.budget_tokens, case.most_requests)


def _staircase(case: BatchCase) -> Staircase:
    return Staircase(case.step_time.c_ms, case.step_time.a_ms, case.step_time.step_tokens)


def batch_condition(case: BatchCase) -> Stability:
    """What is known of the case's rule before any run, in requests per s."""
    lengths = case.prefill_tokens, case.decode_tokens
    limits, law = _limits(case), _staircase(case)
    most = 1000 * critical_rate(sum(lengths), limits, law)
    if case.rule == "faster_transformer":
        rate = 1000 * faster_transformer_rate(*lengths, limits, law)
        return Stability(rate, rate, "a cohort of whole prompts at a time [derived]")
    if case.rule == "vanilla_vllm":
        rate = 1000 * vanilla_vllm_rate(*lengths, limits, law)
        return Stability(rate, rate, "drift with many waiting to decode [derived]")
    if case.most_requests is None:
        assert case.rule in WORK_CONSERVING
        return Stability(most, most, "arXiv 2504.07347, theorem 2")
    if case.rule == "sarathi":
        rate = 1000 * capped_rate(*lengths, limits, law)
        return Stability(0.0, max(rate, 0.0), "fixed point with a cap on requests [derived]")
    return Stability(0.0, most, "arXiv 2504.07347, theorem 2; no condition with a cap on requests")


def run_batch_case(case: BatchCase) -> Found:
    """All seeds of a case, and means over them; rates per s."""
    rate = batch_rate(case)
    horizon_ms, begin_ms = case.horizon_s * 1000, case.warm_up_s * 1000
    at_ms = np.linspace(begin_ms, horizon_ms, POINTS)
    rows: list[dict[str, float]] = []
    numbers = []
    for seed in range(1, case.seeds + 1):
        rng = np.random.default_rng(seed)
        if case.interval_ms is not None:
            # Seeds differ by when the first comes.
            arrival = np.arange(rng.uniform(0, case.interval_ms), horizon_ms, case.interval_ms)
        else:
            arrival = np.sort(rng.uniform(0, horizon_ms, rng.poisson(rate * horizon_ms)))
        prefill, decode = (
            np.full(len(arrival), x) for x in (case.prefill_tokens, case.decode_tokens)
        )
        run = run_batches(
            case.rule, _limits(case), _staircase(case), arrival, prefill, decode, horizon_ms
        )
        ended = np.sort(run.finished_ms[np.isfinite(run.finished_ms)])
        here = np.searchsorted(arrival, at_ms, "right") - np.searchsorted(ended, at_ms, "right")
        numbers.append(here.astype(float))
        part = run.batches[run.batches["start_ms"] >= begin_ms]
        done = float(((ended >= begin_ms) & (ended < horizon_ms)).sum())
        rows.append(
            {"completed per s": done / (horizon_ms - begin_ms) * 1000}
            | _batch_quantities(part)
            | {"number at the end": float(here[-1])}
        )
    seconds = case.horizon_s - case.warm_up_s
    variance = 1.0 if case.interval_ms is None else 0.0
    means = {key: Mean.of([row[key] for row in rows]) for key in rows[0]}
    return Found(
        name=case.name,
        policy=case.rule,
        offered=1000 * rate,
        predicted=batch_condition(case),
        completed=means.pop("completed per s"),
        quantities=means,
        growth=growth(numbers, seconds, 1000 * rate, variance, "req/s"),
        published=case.published,
    )


def _batch_quantities(part: NDArray[np.void]) -> dict[str, float]:
    """Of the batches after the warm-up; NaN where there was none."""
    names = ("tokens in a batch", "prompt tokens in a batch", "backlog growth, tokens/ms")
    if len(part) < 2:
        return dict.fromkeys(names, math.nan)
    tokens = part["prefill_tokens"] + part["decode_tokens"]
    rise = float(part["backlog_tokens"][-1] - part["backlog_tokens"][0])
    spent_ms = float(part["start_ms"][-1] - part["start_ms"][0])
    values = (tokens.mean(), part["prefill_tokens"].mean(), rise / spent_ms)
    return dict(zip(names, map(float, values), strict=True))


def run_case(case: SlotCase | BatchCase) -> Found:
    """Either kind."""
    return run_slot_case(case) if isinstance(case, SlotCase) else run_batch_case(case)
