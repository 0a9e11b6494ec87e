"""Waves of equal outputs: what one server is served, by hand and in the mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.theory import wave_walk
from analysis.theory.room_walk import Charges
from analysis.theory.wave_walk import Admission, Waves
from loadgen.workload import Workload, fixed, uniform


def admission(law: Workload, room: float, lags: bool = False, rows: int | None = None) -> Admission:
    """Requests that take their prompts and whole outputs, and nothing besides."""
    size = (law.prompt_tokens + law.output_tokens).astype(float)
    return Admission(
        charges=Charges(asked=size - 1, charged=size, kept=size, released=size),
        room_tokens=room,
        rows=rows,
        chunk=None,
        max_prefill_tokens=1 << 20,
        page=1,
        lags=lags,
    )


def waves(law: Workload, by: Admission, start: float, seed: int = 0) -> Waves:
    """Residences as of a request alone."""
    prompt_steps = -(-int(law.prompt_tokens.max()) // (by.chunk or 1 << 20))
    return wave_walk.waves(law, by, start, int(law.output_tokens.max()) - 1 + prompt_steps, seed)


def test_one_at_a_time_pays_one_prefill_step_each() -> None:
    law = fixed(10, 21)
    found = waves(law, admission(law, 31.0), 1 / 21)
    assert found.requests == pytest.approx(1 / 20)
    assert found.prefill_steps == 1.0
    assert found.scatter == 0.0


def test_room_that_is_back_late_gathers_the_waves() -> None:
    """Who leaves in the step meanwhile is replaced in the same prefill step."""
    law = fixed(10, 21)
    late, at_once = (waves(law, admission(law, 8 * 31.0 + 8, lags), 0.2) for lags in (True, False))
    assert late.requests < at_once.requests <= 1.01 * 8 / 20
    assert late.prefill_steps < at_once.prefill_steps


def test_rows_bind_as_room_does() -> None:
    law = fixed(10, 21)
    by_rows = waves(law, admission(law, 1e6, rows=8), 0.3)
    by_room = waves(law, admission(law, 8 * 31.0), 0.3)
    # The window may end within a wave.
    assert by_rows.requests == by_room.requests == pytest.approx(8 / 20, rel=0.01)
    assert by_rows.prefill_steps == by_room.prefill_steps


def test_what_is_served_is_what_was_offered_for_it() -> None:
    """From either side the search ends within what one fill differs from the next by."""
    law = fixed(32, 32)
    found = [waves(law, admission(law, 2048.0), start) for start in (0.55, 0.75)]
    rates = np.array([w.requests / (1 + w.prefill_steps * w.requests) for w in found])
    assert abs(rates[0] / rates[1] - 1) < max(w.scatter for w in found)
    # Waves of several: fewer prefill steps than requests, more than one wave for all.
    assert all(1 / 32 < w.prefill_steps < 0.9 for w in found)


def test_outputs_that_differ_leave_fewer_to_a_wave() -> None:
    equal, differing = fixed(32, 32), uniform((32, 32), (28, 36))
    alike, apart = (waves(law, admission(law, 2048.0), 0.65) for law in (equal, differing))
    assert apart.prefill_steps > alike.prefill_steps
    assert apart.scatter < alike.scatter


def test_long_prompts_are_computed_over_several_steps() -> None:
    law = fixed(100, 21)
    whole = admission(law, 121.0)
    cut = replace(whole, chunk=40)
    assert waves(law, cut, 1 / 23).prefill_steps == pytest.approx(3.0, rel=0.01)
    assert waves(law, whole, 1 / 21).prefill_steps == 1.0


def test_the_same_seed_gives_the_same_waves() -> None:
    law = fixed(32, 32)
    first, again, other = (waves(law, admission(law, 2048.0), 0.65, seed) for seed in (1, 1, 2))
    assert first == again != other
