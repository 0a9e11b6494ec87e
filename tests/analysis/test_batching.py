"""The batching rules of arXiv 2504.07347: their example, their stability, compiled against plain."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.inference.slot_growth import growth
from analysis.slot_models.batching import (
    RULES,
    BatchRun,
    Limits,
    Staircase,
    Work,
    capped_rate,
    critical_rate,
    faster_transformer_rate,
    overload_drift,
    run_batches,
    vanilla_vllm_rate,
)

CODE_LLAMA = Staircase(11.28, 35.47, 128)


def composition(rule: str, budget: int) -> list[str]:
    """Batches of their figure 8: A, B, C decode 2, 4, 3 tokens; D, E (1, 1) come in the first."""
    present = [Work(k, 0, decode) for k, decode in enumerate((2, 4, 3))]
    late, batches = [Work(3, 1, 1), Work(4, 1, 1)], list[str]()
    while present or late:
        batch = RULES[rule](present, Limits(budget))
        parts = [f"{'ABCDE'[w.index]}{'p' if w.prefill else 'd'}" for w, _ in batch]
        batches.append(" ".join(sorted(parts)))
        for work, tokens in batch:
            if work.prefill:
                work.prefill -= tokens
            else:
                work.decode -= tokens
        present = [work for work in present if work.decode] + late
        late = []
    return batches


@pytest.mark.parametrize(
    ("rule", "budget", "expected"),
    [
        ("vanilla_vllm", 4, ["Ad Bd Cd", "Dp Ep", "Ad Bd Cd Dd", "Bd Cd Ed", "Bd"]),
        ("orca", 5, ["Ad Bd Cd", "Ad Bd Cd Dp Ep", "Bd Cd Dd Ed", "Bd"]),
        ("faster_transformer", 4, ["Ad Bd Cd", "Ad Bd Cd", "Bd Cd", "Bd", "Dp Ep", "Dd Ed"]),
        ("sarathi", 4, ["Ad Bd Cd", "Ad Bd Cd Dp", "Bd Cd Dd Ep", "Bd Ed"]),
    ],
)
def test_the_worked_example_of_the_paper(rule: str, budget: int, expected: list[str]) -> None:
    assert composition(rule, budget) == expected


def offered(
    seed: int, rate: float, horizon_ms: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate * horizon_ms)
    arrival = np.sort(rng.uniform(0, horizon_ms, count))
    return arrival, rng.integers(1, 200, count), rng.integers(1, 120, count)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limits", [Limits(256), Limits(256, 9), Limits(128, 300), Limits(300, 40)])
def test_compiled_equals_plain_batch_for_batch(rule: str, limits: Limits) -> None:
    pytest.importorskip("numba")
    for seed, rate in ((1, 0.004), (2, 0.02)):
        plain, fast = (
            run_batches(rule, limits, CODE_LLAMA, *offered(seed, rate, 8000.0), 8000.0, compiled)
            for compiled in (False, True)
        )
        for name in plain.batches.dtype.names or ():
            np.testing.assert_array_equal(fast.batches[name], plain.batches[name], err_msg=name)
        np.testing.assert_array_equal(fast.finished_ms, plain.finished_ms)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compiled", [False, True])
def test_work_is_conserved(rule: str, compiled: bool) -> None:
    if compiled:
        pytest.importorskip("numba")
    arrival, prefill, decode = offered(3, 0.01, 6000.0)
    run = run_batches(rule, Limits(256, 50), CODE_LLAMA, arrival, prefill, decode, 6000.0, compiled)
    batches = run.batches
    brought = np.concatenate([[0], np.cumsum(prefill + decode)])
    arrived = brought[np.searchsorted(arrival, batches["start_ms"], "right")]
    done = batches["prefill_tokens"] + batches["decode_tokens"]
    np.testing.assert_array_equal(batches["backlog_tokens"], arrived - np.cumsum(done) + done)
    assert (done <= 256).all() and (batches["requests"] <= 50).all() and (done > 0).all()
    ended = np.isfinite(run.finished_ms)
    assert batches["completed"].sum() == ended.sum() > 0
    if rule in ("orca", "sarathi"):
        # Work-conserving: a batch that has room has taken all that could be given.
        short = (done < 256) & (batches["requests"] < 50)
        assert (batches["requests"][short] == batches["present"][short]).all()


def evenly(rule: str, budget: int, horizon_ms: float = 140_000.0) -> BatchRun:
    arrival = np.arange(467.5, horizon_ms, 467.5)
    count = len(arrival)
    return run_batches(
        rule,
        Limits(budget, 100),
        CODE_LLAMA,
        arrival,
        np.full(count, 290),
        np.full(count, 990),
        horizon_ms,
    )


def test_only_sarathi_with_128_tokens_serves_290_990_every_467_5_ms() -> None:
    """arXiv 2504.07347, section 6.2: it settles at 29 prompt and 99 decode tokens in each batch."""
    last = evenly("sarathi", 128).batches[-10:]
    assert (last["prefill_tokens"] == 29).all() and (last["decode_tokens"] == 99).all()
    assert 1 / capped_rate(290, 990, Limits(128, 100), CODE_LLAMA) == pytest.approx(467.5)
    settled = evenly("sarathi", 128, 280_000.0).batches["backlog_tokens"]
    middle, end = settled[len(settled) // 2], settled[-1]
    assert abs(end - middle) < 1280 * 3
    for rule, budget in (("orca", 128), ("sarathi", 1024)):
        backlog = evenly(rule, budget).batches["backlog_tokens"]
        assert backlog[-1] - backlog[len(backlog) // 2] > 15_000
    for rule in ("faster_transformer", "vanilla_vllm"):
        assert len(evenly(rule, 128).batches) == 0, "a prompt of 290 never fits 128 whole"


def test_the_published_boundary() -> None:
    assert critical_rate(200, Limits(512), CODE_LLAMA) * 1000 == pytest.approx(16.71, abs=0.01)
    assert critical_rate(241, Limits(512), CODE_LLAMA) * 1000 == pytest.approx(13.87, abs=0.01)


def test_faster_transformer_serves_a_cohort_at_a_time() -> None:
    count = 3000
    run = run_batches(
        "faster_transformer",
        Limits(512),
        CODE_LLAMA,
        np.zeros(count),
        np.full(count, 129),
        np.full(count, 112),
        1e6,
    )
    half = run.batches["start_ms"] > 5e5
    rate = run.batches["completed"][half].sum() / 5e5
    assert rate == pytest.approx(
        faster_transformer_rate(129, 112, Limits(512), CODE_LLAMA), rel=0.02
    )


def test_above_the_boundary_the_backlog_grows_by_the_fluid_limit() -> None:
    most = critical_rate(200, Limits(512), CODE_LLAMA)
    expected = overload_drift(1.2 * most, 200, Limits(512), CODE_LLAMA)
    assert expected == pytest.approx(0.6686, abs=1e-4)
    assert overload_drift(0.9 * most, 200, Limits(512), CODE_LLAMA) == 0
    arrival = np.arange(0.0, 3e5, 1 / (1.2 * most))
    work = np.full(len(arrival), 100)
    for rule in ("orca", "sarathi"):
        run = run_batches(rule, Limits(512), CODE_LLAMA, arrival, work, work, 3e5).batches
        half = run[len(run) // 2 :]
        rise = (half["backlog_tokens"][-1] - half["backlog_tokens"][0]) / np.ptp(half["start_ms"])
        assert rise == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("load", "verdict"), [(0.8, "stable"), (1.1, "grows")])
def test_vanilla_vllm_has_a_boundary_of_its_own(load: float, verdict: str) -> None:
    pytest.importorskip("numba")
    rate = load * vanilla_vllm_rate(129, 112, Limits(512), CODE_LLAMA)
    assert rate < critical_rate(241, Limits(512), CODE_LLAMA)
    at_ms, numbers = np.linspace(2e5, 1.2e6, 301), []
    for seed in (1, 2, 3):
        rng = np.random.default_rng(seed)
        arrival = np.sort(rng.uniform(0, 1.2e6, rng.poisson(rate * 1.2e6)))
        work = [np.full(len(arrival), tokens) for tokens in (129, 112)]
        run = run_batches("vanilla_vllm", Limits(512), CODE_LLAMA, arrival, *work, 1.2e6)
        left = np.sort(run.finished_ms[np.isfinite(run.finished_ms)])
        numbers.append(np.searchsorted(arrival, at_ms) - np.searchsorted(left, at_ms))
    assert growth(numbers, 1000.0, 1000 * rate, 1.0, "req/s").verdict == verdict


def test_what_cannot_run_is_refused() -> None:
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="no rule 'vllm'"):
        run_batches("vllm", Limits(1), CODE_LLAMA, np.zeros(1), one, one, 1.0)
    with pytest.raises(ValueError, match="prefill and decode"):
        run_batches("orca", Limits(1), CODE_LLAMA, np.zeros(1), 0 * one, one, 1.0)
