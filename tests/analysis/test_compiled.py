"""The compiled engine against the plain one: every step, record and sample the same, bit for bit."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.sglang import longest_request
from analysis.schedulers.simulate import Simulation, StepLog, simulate
from analysis.schedulers.step_time import StepTime

pytest.importorskip("numba")

LAW = StepTime(
    b0_s=0.0137, b1_s_per_token=1.1e-5, b2_s_per_kv_token=4.3e-7, b3_s_per_request=1.7e-5
)


def both(
    limits: EngineLimits,
    arrival_s: Any,
    lengths: Any,
    horizon_s: float,
    ignore_eos: bool = True,
    **factors: Any,
) -> Simulation:
    """The plain engine's run, after every array of it has been held against the compiled one's."""
    plain, fast = (
        simulate(
            *(limits, LAW, np.array(arrival_s), np.array(lengths), horizon_s),
            sample_interval_s=max(0.03, horizon_s / 500),
            ignore_eos=ignore_eos,
            compiled=compiled,
            **factors,
        )
        for compiled in (False, True)
    )
    assert not plain.compiled and fast.compiled
    for field in fields(StepLog):
        one, other = (getattr(run.steps, field.name) for run in (plain, fast))
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist(), field.name
    assert fast.records == plain.records
    assert fast.samples == plain.samples
    return plain


def check_conservation(run: Simulation, limits: EngineLimits) -> None:
    """Blocks, requests and tokens of a run that came to its end."""
    steps, records, last = run.steps, run.records, run.samples[-1]
    assert {r.outcome for r in records} == {"completed"}
    assert (last.waiting, last.running, last.kv_usage) == (0, 0, 0.0)
    assert last.finished == len(records)
    assert last.generation_tokens == sum(r.output_tokens_designed for r in records)
    assert last.prompt_tokens == sum(r.prompt_tokens for r in records)
    assert last.preemptions == steps.preempted.sum()
    assert (steps.used_blocks <= limits.num_blocks).all() and (steps.running >= 0).all()
    if not limits.async_scheduling:
        assert (steps.kv_tokens <= steps.used_blocks * limits.block_size).all()
        # Each token is computed once but for the last of a request. What a preemption lost is computed
        # again, together with the token that came last.
        work = sum(r.prompt_tokens + r.output_tokens - 1 for r in records)
        assert work <= steps.tokens.sum() <= work + steps.recomputed_tokens.sum()


vllm_limits = st.builds(
    EngineLimits,
    num_blocks=st.integers(8, 40),
    block_size=st.sampled_from([1, 4, 16]),
    max_num_seqs=st.none() | st.integers(1, 8),
    max_num_batched_tokens=st.none() | st.integers(4, 64),
    max_model_len=st.none() | st.just(90),
    watermark=st.sampled_from([0.0, 0.1]),
    reserve_full_prompt=st.booleans(),
    long_prefill_token_threshold=st.sampled_from([0, 5]),
    async_scheduling=st.booleans(),
)

sglang_limits = st.builds(
    lambda tokens, page, rules, **other: EngineLimits(
        num_blocks=tokens // page, block_size=page, sglang=rules, **other
    ),
    tokens=st.integers(100, 400),
    page=st.sampled_from([1, 4, 16]),
    max_num_seqs=st.none() | st.integers(1, 8),
    max_num_batched_tokens=st.none() | st.integers(16, 64),
    async_scheduling=st.booleans(),
    rules=st.builds(
        SGLangRules,
        radix_cache=st.booleans(),
        whole_output_of_ignore_eos=st.booleans(),
        schedule_conservativeness=st.sampled_from([0.1, 0.3, 1.0]),
        max_prefill_tokens=st.sampled_from([16, 64, 16384]),
        clip_max_new_tokens=st.sampled_from([20, 4096]),
    ),
)

drawn_requests = st.lists(
    st.tuples(st.floats(0, 1.5), st.integers(1, 60), st.integers(1, 60), st.integers(0, 40)),
    min_size=1,
    max_size=40,
)


factors = st.none() | st.lists(st.floats(0.2, 5.0), min_size=1, max_size=7)


IN_VAIN = EngineLimits(num_blocks=26, block_size=4, max_num_batched_tokens=4, async_scheduling=True)
"""A pass preempts one of the two requests of the example, and then has nothing to run."""


@settings(max_examples=100, deadline=None)
@example(IN_VAIN, [(1.25, 27, 10, 1), (1.0625, 43, 23, 0)], False, None, None, None)
@given(
    *(vllm_limits | sglang_limits, drawn_requests, st.booleans(), st.none() | st.floats(0.01, 3)),
    *(factors, factors),
)
def test_every_step_record_and_sample_is_that_of_the_plain_engine(
    limits: EngineLimits,
    drawn: list[tuple[float, int, int, int]],
    ignore_eos: bool,
    cut_s: float | None,
    step_factors: list[float] | None,
    slowdown: list[float] | None,
) -> None:
    longest = min(limits.pool_tokens, limits.max_model_len or limits.pool_tokens)
    if limits.sglang is not None:
        longest = longest_request(limits) - 40
    fitting = sorted(d for d in drawn if d[1] + d[2] <= longest)
    if not fitting:
        return
    arrival_s = [at for at, *_ in fitting]
    lengths = [(s, o, 0 if more == 40 else o + more) for _, s, o, more in fitting]
    run = both(
        *(limits, arrival_s, lengths, cut_s or 500.0, ignore_eos),
        step_factors=step_factors,
        slowdown=slowdown,
    )
    if cut_s is None:
        check_conservation(run, limits)


UNIFORM = EngineLimits(num_blocks=60, block_size=16, max_num_batched_tokens=64)
SGLANG = replace(UNIFORM, num_blocks=200, block_size=4, sglang=SGLangRules())
HARD = {
    "paper's rules": replace(UNIFORM, max_num_batched_tokens=None, reserve_full_prompt=False),
    "chunks": replace(UNIFORM, long_prefill_token_threshold=20),
    "chunks that reserve nothing": replace(
        UNIFORM, reserve_full_prompt=False, max_num_batched_tokens=24
    ),
    "asynchronous": replace(UNIFORM, async_scheduling=True),
    "asynchronous, blocks of one": replace(
        UNIFORM, async_scheduling=True, num_blocks=960, block_size=1
    ),
    "sequence bound": replace(UNIFORM, max_num_seqs=3, async_scheduling=True),
    "watermark": replace(UNIFORM, watermark=0.1),
    "SGLang": SGLANG,
    "SGLang, pages of one": replace(SGLANG, num_blocks=800, block_size=1),
    "SGLang, whole prompts": replace(SGLANG, max_num_batched_tokens=None),
    "SGLang, overlap": replace(SGLANG, async_scheduling=True),
    "SGLang, looking ahead": replace(
        SGLANG, async_scheduling=True, sglang=SGLangRules(radix_cache=False)
    ),
    "SGLang, sequence bound": replace(SGLANG, async_scheduling=True, max_num_seqs=3),
    "SGLang, over-committed": replace(
        SGLANG,
        async_scheduling=True,
        sglang=SGLangRules(schedule_conservativeness=0.1, clip_max_new_tokens=2),
    ),
}
PREEMPT = {name for name in HARD if "SGLang" not in name and "bound" not in name}
PREEMPT |= {"SGLang, over-committed"}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_saturated_engine_with_hard_settings(name: str, ignore_eos: bool) -> None:
    rng = np.random.default_rng(7)
    lengths = rng.integers(10, 150, (300, 3))
    lengths[:, 2] = lengths[:, 1] + rng.integers(0, 50, 300)
    arrival_s = np.cumsum(rng.exponential(0.05, 300))
    run = both(HARD[name], arrival_s, lengths, 1e3, ignore_eos)
    check_conservation(run, HARD[name])
    assert (run.samples[-1].preemptions > 20) == (name in PREEMPT)
    assert run.steps.waiting.max() > 50


@pytest.mark.parametrize(
    ("limits", "lengths", "message"),
    [
        (UNIFORM, (500, 500, 0), "1000 tokens do not fit the pool of 960"),
        (UNIFORM, (0, 5, 5), "at least one prompt"),
        (replace(UNIFORM, max_model_len=100), (60, 50, 0), "110 tokens exceed max_model_len 100"),
        (SGLANG, (400, 10, 395), "795 declared tokens exceed the 791"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_requests_that_can_never_run_are_refused_alike(
    limits: EngineLimits, lengths: tuple[int, int, int], message: str, compiled: bool
) -> None:
    triples = np.array([(5, 5, 5), lengths])
    with pytest.raises(ValueError, match=message):
        simulate(limits, LAW, np.array([0.0, 0.1]), triples, 10.0, compiled=compiled)
    assert simulate(limits, LAW, np.array([0.0, 20.0]), triples, 10.0, compiled=compiled).records


@pytest.mark.parametrize("compiled", [False, True])
def test_the_factors_multiply_each_step_time(compiled: bool) -> None:
    lengths = np.array([(20, 30, 0)] * 40)
    run = simulate(
        *(SGLANG, LAW, np.zeros(40), lengths, 4.0),
        compiled=compiled,
        step_factors=np.array([1.0, 2.0, 0.5]),
        slowdown=np.array([1.0, 1.0, 3.0, 1.0]),
    )
    plain = simulate(SGLANG, LAW, np.zeros(40), lengths, 4.0, compiled=compiled).steps
    steps, count = run.steps, len(run.steps.start_s)
    factors = np.resize([1.0, 2.0, 0.5], count)
    factors[(steps.start_s >= 2.0) & (steps.start_s < 3.0)] *= 3.0
    expected = plain.duration_s[:count]
    assert count > 50 and (plain.tokens[:count] == steps.tokens).all()
    assert steps.duration_s == pytest.approx(expected * factors, rel=1e-12)


@pytest.mark.parametrize("name", ["step_factors", "slowdown"])
@pytest.mark.parametrize("factors", [[], [1.0, 0.0], [1.0, np.nan], [[1.0]]])
def test_factors_that_are_no_row_of_positive_numbers_are_refused(name: str, factors: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a row of positive"):
        simulate(
            *(UNIFORM, LAW, np.zeros(1), np.array([(5, 5, 5)]), 1.0),
            **{name: np.array(factors)},  # type: ignore[arg-type]
        )
