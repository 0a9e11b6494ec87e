"""Simulated experiments at nearly the critical rate: exponents, and servers that changed their speed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.schedulers.frames import run_frames
from analysis.schedulers.step_time import StepTime
from analysis.verdicts.evidence import MeasuredRun
from harness.rehearsals import near_critical
from harness.rehearsals.error_rates import SETTINGS, Known, known
from harness.rehearsals.near_critical import highest_exponent, near_runs
from harness.rehearsals.rehearsal import SimulatedServer, offered
from loadgen.records import Run
from loadgen.workload import Workload

WIDE = SETTINGS["wide"]


@pytest.fixture(scope="module")
def truth() -> Known:
    return known(WIDE, requests=5000, theta=0.1)


@pytest.mark.parametrize("factor", [0.96, 1.04])
def test_a_server_that_changed_its_speed_is_not_taken_for_critical(
    truth: Known, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = WIDE.server.law
    scaled = StepTime(
        b0_s=factor * law.b0_s,
        b1_s_per_token=factor * law.b1_s_per_token,
        b2_s_per_kv_token=factor * law.b2_s_per_kv_token,
        b3_s_per_request=factor * law.b3_s_per_request,
    )
    changed = replace(WIDE.server, law=scaled)

    def served(server: SimulatedServer, workload: Workload, run: Run) -> MeasuredRun:
        return offered(changed if run.id.endswith("1.00") else server, workload, run)

    monkeypatch.setattr(near_critical, "offered", served)
    (found,) = near_runs(WIDE, truth, (1.0,), theta=0.1, seed=1)
    assert found.settling is not None
    assert found.settling.growth == "cannot say"


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_exponent_of_a_queue_that_grows_by_a_power(exponent: float) -> None:
    run = Run(id="r", arrival_rate=1.0, horizon_s=110.0, warmup_s=10.0, seed=1)
    t = np.arange(0.0, 110.0, 0.01)
    waiting = 1e6 * np.maximum(t - 10.0, 0.0) ** exponent
    frames = replace(
        run_frames(run, 0, 110 * 10**9, [], []), engine=pd.DataFrame({"t_s": t, "waiting": waiting})
    )
    assert highest_exponent(frames) == pytest.approx(exponent, abs=0.01)
    # Only its highest so far counts, not that it empties in between.
    empties = frames.engine.assign(waiting=np.where(np.arange(len(t)) % 10 < 5, waiting, 0.0))
    assert highest_exponent(replace(frames, engine=empties)) == pytest.approx(exponent, abs=0.02)
    nobody = frames.engine.assign(waiting=0.0)
    assert np.isnan(highest_exponent(replace(frames, engine=nobody)))
