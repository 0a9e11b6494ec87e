"""Headroom from metrics alone: closed forms on made windows, and runs of simulated servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from analysis.operation.headroom import Headroom, headroom
from analysis.operation.headroom_text import headroom_lines
from analysis.operation.serving_window import CannotSay, assumed_law, passive_fit, serving_window
from analysis.schedulers.engine import EngineLimits, EngineSample, SGLangRules
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from loadgen.workload import Workload, uniform

LIMITS = EngineLimits(num_blocks=256, block_size=16, max_num_seqs=128, max_num_batched_tokens=2048)
LAW = uniform((16, 112), (16, 112))
FLAT = StepTime(b0_s=20e-3)
STEEP = StepTime(b0_s=8e-3, b1_s_per_token=40e-6, b2_s_per_kv_token=1e-6, b3_s_per_request=30e-6)


def served(
    rate: float,
    step_time: StepTime = FLAT,
    limits: EngineLimits = LIMITS,
    law: Workload = LAW,
    seconds: float = 120.0,
    interval_s: float = 0.5,
) -> list[EngineSample]:
    """Samples of a simulated server after 10 s."""
    rng = np.random.default_rng(5)
    arrival_s = np.cumsum(rng.exponential(1 / rate, round(1.3 * rate * (seconds + 10))))
    run = simulate(
        limits,
        step_time,
        arrival_s[arrival_s < seconds + 10],
        law.sample(rng, len(arrival_s))[arrival_s < seconds + 10],
        seconds + 10,
        sample_interval_s=interval_s,
        compiled=False,
    )
    return [s for s in run.samples if s.t_ns >= 10e9]


@pytest.fixture(scope="module")
def flat() -> list[EngineSample]:
    return served(12.0, seconds=80.0)


@pytest.fixture(scope="module")
def steep() -> list[EngineSample]:
    return served(16.0, STEEP, seconds=60.0)


def steady(
    fill: float, tokens: int = 20, running: int = 10, step_s: float = 0.02, n: int = 61
) -> list[EngineSample]:
    """A server whose every second is alike: 50 steps of 20 ms, one request a second."""
    steps = round(1 / step_s)
    return [
        EngineSample(
            read_ns=i * 10**9,
            t_ns=i * 10**9,
            waiting=0,
            running=running,
            kv_usage=fill,
            preemptions=0,
            prompt_tokens=(tokens - running) * steps * i,
            generation_tokens=running * steps * i,
            steps=steps * i,
            step_tokens=tokens * steps * i,
            finished=i,
            rejected=0,
            prefix_hit_tokens=0,
        )
        for i in range(n)
    ]


def ceiling(found: Headroom, name: str) -> float:
    use = next(u for u in found.ceilings if u.name == name)
    assert use.load is not None
    return use.load.value


@pytest.mark.parametrize("fixed_s", [0.02, 0.015, 0.005])
def test_load_of_a_ceiling_is_one_less_the_fixed_time_of_steps_that_could_be_spared(
    fixed_s: float,
) -> None:
    samples = [replace(s, finished=2 * s.finished) for s in steady(0.4)]
    line = exact_step_time(StepTime(b0_s=fixed_s, b3_s_per_request=(0.02 - fixed_s) / 10))
    found = headroom(serving_window(samples, LIMITS), line)
    # Two requests finish per second of 50 steps, and hold their last step besides.
    fill = (10 * 50 + 2) / 50 / 128
    assert ceiling(found, "max_num_seqs") == pytest.approx(
        1 - fixed_s / 0.02 * (1 - fill), abs=1e-9
    )
    assert found.fixed_s.value == pytest.approx(fixed_s)
    assert found.binding == "kv_cache"
    assert found.at_least.value == pytest.approx(0.4, abs=0.02)


def test_a_flat_step_time_makes_the_occupancy_the_load(flat: list[EngineSample]) -> None:
    found = headroom(serving_window(flat, LIMITS), exact_step_time(FLAT))
    use = next(u for u in found.ceilings if u.name == "max_num_seqs")
    assert use.load is not None and use.fill is not None
    assert use.load.value == pytest.approx(use.fill, abs=1e-3)
    assert found.load is not None
    assert found.load.value == pytest.approx(found.at_least.value, rel=0.03)


def test_the_lines_own_scale_does_not_matter(steep: list[EngineSample]) -> None:
    window = serving_window(steep, LIMITS)
    slow = replace(
        STEEP,
        **{name: 1.5 * getattr(STEEP, name) for name in StepTime.__slots__},
    )
    one, other = (headroom(window, exact_step_time(line)) for line in (STEEP, slow))
    assert one.load is not None and other.load is not None
    assert one.load.value == pytest.approx(other.load.value, rel=1e-9)
    assert not one.notes and "another server" in other.notes[0]


def test_the_window_tells_its_own_fixed_part(steep: list[EngineSample]) -> None:
    fit = passive_fit(serving_window(steep, LIMITS))
    error = fit.standard_errors()[0]
    assert fit.law.b0_s == pytest.approx(STEEP.b0_s, abs=max(4 * error, 0.03 * STEEP.b0_s))
    assert error < 0.05 * STEEP.b0_s


def test_moments_of_the_lengths_are_found(flat: list[EngineSample]) -> None:
    law = assumed_law(serving_window(flat, LIMITS))
    for side in ("prompt_tokens", "output_tokens"):
        seen, true = getattr(law, side), getattr(LAW, side)
        assert law.mean(seen) == pytest.approx(64, rel=0.05)
        assert np.sqrt(law.mean(seen**2)) == pytest.approx(np.sqrt(LAW.mean(true**2)), rel=0.08)


def test_sglang_counts_what_it_sets_aside() -> None:
    limits = EngineLimits(num_blocks=4096, block_size=1, max_num_seqs=256, sglang=SGLangRules())
    critical = predict(LAW, limits, exact_step_time(FLAT), "engine", "P0").critical_rate.value
    found = headroom(serving_window(served(0.6 * critical, limits=limits, seconds=70.0), limits))
    assert found.load is not None
    assert found.load.value == pytest.approx(found.rate / critical, rel=0.06)
    assert found.binding == "output_reservation"
    assert found.at_least.value < 0.95 * found.load.value


def broken(samples: Sequence[EngineSample], how: str) -> list[EngineSample]:
    if how == "few":
        return list(samples[:20])
    if how == "restart":
        return [*samples[:40], *(replace(s, steps=s.steps - 900) for s in samples[40:])]
    if how == "order":
        return [*samples[30:], *samples[:30]]
    return [replace(s, finished=0) for s in samples]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("few", "watch longer or oftener"),
        ("restart", "the counter steps went back"),
        ("order", "order of time"),
        ("nothing", "0 requests finished"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    flat: list[EngineSample], how: str, why: str
) -> None:
    with pytest.raises(CannotSay, match=why):
        serving_window(broken(flat, how), LIMITS)


def test_a_window_without_variation_gives_no_line() -> None:
    samples = [replace(s, finished=2 * s.finished) for s in steady(0.4)]
    with pytest.raises(CannotSay, match="does not vary enough"):
        headroom(serving_window(samples, LIMITS))


def test_a_queue_that_never_empties_is_at_or_above_critical(flat: list[EngineSample]) -> None:
    waiting = [replace(s, waiting=3) for s in flat]
    found = headroom(serving_window(waiting, LIMITS), exact_step_time(FLAT))
    assert found.load is None and found.fits is None and "at its critical rate" in found.reason
    assert headroom_lines(found)[0][0] == "cannot say"


def test_equal_ceilings_cannot_be_told_apart(flat: list[EngineSample]) -> None:
    window = serving_window(flat, LIMITS)
    kv, _, tokens = (use.fill for use in headroom(window, exact_step_time(FLAT)).ceilings)
    assert kv is not None and tokens is not None
    mean_tokens = tokens * 2048
    alike = replace(LIMITS, max_num_batched_tokens=round(mean_tokens / kv))
    found = headroom(serving_window(flat, alike), exact_step_time(FLAT))
    assert found.binding is None
    assert set(found.rivals) == {"kv_cache", "max_num_batched_tokens"}
    assert any("cannot say which binds" in text for _, text in headroom_lines(found))


def test_hidden_limits_are_named(flat: list[EngineSample]) -> None:
    hidden = replace(LIMITS, max_num_seqs=None, max_num_batched_tokens=None)
    found = headroom(serving_window(flat, hidden), exact_step_time(FLAT))
    assert len(found.notes) == 2 and all("not known" in note for note in found.notes)
    assert "its size is not known" in dict(headroom_lines(found))["ceiling"]
