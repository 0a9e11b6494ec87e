"""What binds, what raising it gives, what binds next: against the closed forms of the critical rate."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.operation.what_to_change import MOST_FACTOR, what_to_change
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.verdicts.second_opinion import simulated_rate
from loadgen.workload import uniform

LAW = uniform((16, 112), (16, 112))
FLAT = exact_step_time(StepTime(b0_s=20e-3))
COSTLY = exact_step_time(StepTime(b0_s=5e-3, b1_s_per_token=1e-3))


def vllm(pool: int = 8192, seqs: int = 64, budget: int = 2048) -> EngineLimits:
    return EngineLimits(
        num_blocks=pool // 16, block_size=16, max_num_seqs=seqs, max_num_batched_tokens=budget
    )


SGLANG = EngineLimits(num_blocks=8192, block_size=1, max_num_seqs=400, sglang=SGLangRules())


@pytest.mark.parametrize(
    ("limits", "raised", "then"),
    [
        (vllm(seqs=64), ["max_num_seqs"], "kv_cache"),
        (vllm(pool=4096, seqs=400), ["kv_cache"], "kv_cache"),
        (vllm(pool=4096, seqs=60), ["kv_cache"], "max_num_seqs"),
        (
            vllm(pool=65536, seqs=400, budget=128),
            ["max_num_batched_tokens"],
            "max_num_batched_tokens",
        ),
        (vllm(pool=8192, seqs=82), ["max_num_seqs", "kv_cache"], "kv_cache"),
        (SGLANG, ["output_reservation"], "output_reservation"),
    ],
)
def test_the_lowest_ceiling_is_raised_to_the_next(
    limits: EngineLimits, raised: list[str], then: str
) -> None:
    change = what_to_change(LAW, limits, FLAT)
    assert sorted(r.name for r in change.raises) == sorted(raised)
    assert change.raises[0].name == predict(LAW, limits, FLAT, "engine", "P0").binding
    assert change.then in (then, *raised)
    before, after = (
        predict(LAW, of, FLAT, "engine", "P0").critical_rate.value for of in (limits, change.limits)
    )
    assert change.gain.value == pytest.approx(after / before - 1, rel=1e-9)
    assert all(1 < r.factor <= MOST_FACTOR * 1.05 for r in change.raises)


def test_the_line_names_size_gain_and_what_is_next() -> None:
    text = what_to_change(LAW, vllm(seqs=64), FLAT).text
    now, _, rest = text.partition(" binds: ")
    assert now == "max_num_seqs 64"
    size, _, gain = rest.partition(" gives +")
    assert 75 < int(size) < 95
    assert 10 < int(gain.split(" ")[0]) < 40
    assert text.endswith("then the KV cache")


def test_a_step_time_of_tokens_alone_leaves_little_to_gain() -> None:
    flat, costly = (what_to_change(LAW, vllm(pool=4096, seqs=400), line) for line in (FLAT, COSTLY))
    assert costly.gain.value < 0.3 * flat.gain.value
    assert flat.gain.value == pytest.approx(1.0, abs=0.05)


def test_unknown_limits_cannot_bind() -> None:
    hidden = replace(vllm(), max_num_seqs=None, max_num_batched_tokens=None)
    change = what_to_change(LAW, hidden, FLAT)
    assert [r.name for r in change.raises] == ["kv_cache"]
    assert change.gain.low < change.gain.value < change.gain.high
    assert "still binds" in change.text


def test_the_change_gives_what_was_said() -> None:
    limits = vllm(pool=2048, seqs=12)
    change = what_to_change(LAW, limits, FLAT)
    before, after = (
        simulated_rate(LAW, of, FLAT.law, requests=600, seed=3).value
        for of in (limits, change.limits)
    )
    assert after / before - 1 == pytest.approx(change.gain.value, rel=0.25)
