"""Losses one by one: their product is what was served, and theory knows some of them."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.inference.work import work_done
from analysis.schedulers.simulate import simulate
from analysis.slot_models.slots import Load, evenly, run_slots
from analysis.theory.congestion import worst_loss
from analysis.verdicts.evidence import work_demand
from analysis.verdicts.losses import simulated_losses, slot_losses
from harness.rehearsals.error_rates import LAW, SETTINGS
from loadgen.arrivals import poisson
from loadgen.records import Run


@pytest.mark.parametrize(("name", "rate"), [("wide", 60.0), ("fixed", 60.0)])
def test_the_shares_of_an_engine_make_up_what_it_served(name: str, rate: float) -> None:
    setting = SETTINGS[name]
    limits, law = setting.server.limits, setting.workload
    arrival_s = poisson(rate, 40.0, 2)
    lengths = law.sample(np.random.default_rng(2), len(arrival_s))
    done = simulate(limits, LAW, arrival_s, lengths, 40.0)
    run = Run(id="", arrival_rate=rate, horizon_s=40.0, warmup_s=10.0, seed=2)
    frames = done.frames(run)
    found = simulated_losses(done, frames, LAW, law, 10.0, 39.5)
    served = float(np.diff(work_done(frames, np.array([10.0, 39.5])))[0]) / 29.5
    assert found.rate == pytest.approx(served / law.mean(work_demand(law)), rel=2e-3)
    assert found.left == pytest.approx(
        found.filled * found.kept * found.first_time * found.other_step
    )
    assert found.kept == pytest.approx(1.0, abs=0.01), "outputs are kept: theory.md 3.5"
    assert 0.95 < found.filled <= 1 and found.evictions > 0.2
    assert 0.9 < found.first_time < 1 and found.recomputed_tokens > 10


@pytest.mark.parametrize(
    ("policy", "cap", "filled", "kept"),
    [
        ("greedy_restart", 0.0, 1.0, 1 - worst_loss(64, 64)),
        ("look_ahead", 0.0, 1 - worst_loss(64, 64), 1.0),
        ("greedy_restart", 0.97, 0.97, 1.0),
        ("greedy_resume", 0.0, 1.0, 1.0),
    ],
)
def test_in_the_slot_model_each_policy_loses_what_theory_says(
    policy: str, cap: float, filled: float, kept: float
) -> None:
    memory, slots, same = 8192, 640, np.full(1500, 64)
    none = np.zeros(len(same), np.int64)
    load = Load(arrival_slot=none, prompt_tokens=same, output_tokens=same, lane=none)
    best = memory / float(load.work_token_slots.mean())
    budgets = evenly(cap * best, slots) if cap else None
    run = run_slots(policy, memory, load, slots, budgets, compiled=False)
    found = slot_losses(run, slots // 2, memory, LAW)
    assert found.filled == pytest.approx(filled, abs=0.015)
    assert found.kept == pytest.approx(kept, abs=0.015)
    again = policy.startswith("greedy") and not cap
    assert bool(found.recomputed_tokens > 0) is again
    assert bool(found.first_time < 1) is again
