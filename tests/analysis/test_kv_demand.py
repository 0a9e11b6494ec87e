"""Each closed form of the KV demand against the sum over steps that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.schedulers.engine import EngineLimits, Request
from analysis.schedulers.vllm import VLLMEngine
from analysis.theory import kv_demand


def paper_footprints(s: int, o: int, chunk: int) -> list[int]:
    chunks = [min(k * chunk, s) for k in range(1, -(-s // chunk) + 1)]
    return chunks + [s + j for j in range(1, o + 1)]


def random_lengths(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(1, 300, count),
        rng.integers(1, 120, count),
        rng.integers(1, 150, count),
        rng.integers(1, 40, count),
    )


def test_closed_forms_equal_the_sum_over_steps() -> None:
    for s, o, chunk, block in zip(*(a.tolist() for a in random_lengths(4000, 1)), strict=True):
        footprints = paper_footprints(s, o, chunk)
        engine = footprints[:-1]
        args = (np.array([s]), np.array([o]), chunk)
        assert kv_demand.kv_demand_whole_chunk(*args)[0] == sum(footprints)
        assert kv_demand.kv_demand_engine(*args)[0] == sum(engine)
        assert kv_demand.second_moment(*args)[0] == sum(f * f for f in footprints)
        assert kv_demand.residence_steps(*args)[0] == len(engine)
        rounded = [-(-f // block) * block for f in engine]
        assert kv_demand.kv_demand_blocks(*args, block)[0] == sum(rounded)
        assert kv_demand.kv_demand_blocks(*args, block, True)[0] == sum(rounded) + rounded[-1]


def test_arrays_give_what_single_requests_give() -> None:
    s, o, _, _ = random_lengths(500, 2)
    together = kv_demand.kv_demand_blocks(s, o, 37, 16)
    alone = [
        int(kv_demand.kv_demand_blocks(s[i : i + 1], o[i : i + 1], 37, 16)[0]) for i in range(500)
    ]
    assert together.tolist() == alone


@given(s=st.integers(1, 5000), o=st.integers(1, 5000), chunk=st.integers(1, 3000))
@settings(max_examples=300)
def test_the_forms_are_ordered(s: int, o: int, chunk: int) -> None:
    args = (np.array([s]), np.array([o]), chunk)
    paper, whole = kv_demand.kv_demand_paper(*args)[0], kv_demand.kv_demand_whole_chunk(*args)[0]
    rest = s - (-(-s // chunk) - 1) * chunk
    surplus = (chunk - rest) * ((-(-s // chunk) - 1) + rest / (2 * chunk))
    assert whole - paper == pytest.approx(surplus, abs=1e-9 * whole)
    assert kv_demand.kv_demand_engine(*args)[0] < whole
    assert kv_demand.kv_demand_engine(*args)[0] <= kv_demand.kv_demand_blocks(*args, 16)[0]
    assert kv_demand.kv_demand_blocks(*args, 1)[0] == kv_demand.kv_demand_engine(*args)[0]


@pytest.mark.parametrize(
    ("s", "o", "whole", "engine", "blocks"),
    [
        (805, 805, 0.03, -0.14, 0.49),
        (2048, 16, 0.0, -5.4, -5.1),
        (1000, 10, 0.3, -8.5, -8.0),
        (300, 5, 3.5, -13.9, -13.3),
        (8000, 100, 0.3, -0.6, -0.5),
    ],
)
def test_relative_size_of_the_conventions(
    s: int, o: int, whole: float, engine: float, blocks: float
) -> None:
    args = (np.array([s]), np.array([o]), 512)
    paper = kv_demand.kv_demand_paper(*args)[0]
    digits = 2 if s == 805 else 1
    found = [
        100 * (g[0] / paper - 1)
        for g in (
            kv_demand.kv_demand_whole_chunk(*args),
            kv_demand.kv_demand_engine(*args),
            kv_demand.kv_demand_blocks(*args, 16),
        )
    ]
    assert found == pytest.approx([whole, engine, blocks], abs=0.6 * 10**-digits)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize(
    ("s", "o", "chunk", "block"),
    [
        (1, 1, 8, 16),
        (5, 1, 8, 4),
        (100, 50, 32, 16),
        (64, 3, 64, 1),
        (33, 17, 7, 5),
        (200, 90, 999, 16),
    ],
)
def test_the_engine_holds_what_the_closed_form_says(
    s: int, o: int, chunk: int, block: int, async_scheduling: bool
) -> None:
    limits = EngineLimits(
        num_blocks=10_000,
        block_size=block,
        max_num_batched_tokens=chunk + 1,
        long_prefill_token_threshold=chunk,
        async_scheduling=async_scheduling,
    )
    engine = VLLMEngine(limits)
    # A second request keeps the engine stepping, so that an asynchronous one is never idle.
    engine.submit(Request(0, 1, 2000))
    for _ in range(3):
        step = engine.start()
        assert step is not None
        engine.complete(step)
    request = Request(1, s, o)
    engine.submit(request)
    held = resident = kv_tokens = 0
    while request.state != "finished":
        step = engine.start()
        assert step is not None
        held += request.blocks * block
        resident += request.state == "running"
        kv_tokens += step.kv_tokens
        engine.complete(step)
    args = (np.array([s]), np.array([o]), chunk)
    assert held == kv_demand.kv_demand_blocks(*args, block, async_scheduling)[0]
    assert resident == kv_demand.residence_steps(*args, async_scheduling)[0]


def test_lengths_must_be_integers_and_chunks_positive() -> None:
    ones = np.ones(1, dtype=np.int64)
    with pytest.raises(ValueError, match="integers"):
        kv_demand.kv_demand_engine(np.ones(1), ones, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk"):
        kv_demand.kv_demand_paper(ones, ones, 0)
    with pytest.raises(ValueError, match="block_size"):
        kv_demand.kv_demand_blocks(ones, ones, 8, 0)
