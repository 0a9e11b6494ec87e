"""Experiments on servers that slow down: what the shapes are, and what is concluded of them."""

import numpy as np
import pytest

from analysis.reports.summary import summary_lines
from analysis.verdicts.verdict import Verdict
from harness.rehearsals.error_rates import Known, experiment, known
from harness.rehearsals.slowing import SERVERS, Drift, Shape, drifting
from loadgen.records import Run

THETA = 0.10


@pytest.mark.parametrize(
    ("shape", "ends"),
    [
        ("steady", [(1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]),
        ("ramp", [(1.0, 1.3), (1.0, 1.3), (1.0, 1.3), (1.0, 1.3)]),
        ("one ramp", [(1.0, 1.0), (1.0, 1.3), (1.0, 1.0), (1.0, 1.0)]),
        ("step", [(1.0, 1.0), (1.0, 1.3), (1.3, 1.3), (1.3, 1.3)]),
        ("throughout", [(1.0, 1.1), (1.1, 1.2), (1.2, 1.3), (1.3, 1.3)]),
    ],
)
def test_the_shapes_of_a_drift(shape: Shape, ends: list[tuple[float, float]]) -> None:
    drift = Drift(shape, 0.3)
    for index, (first, last) in enumerate(ends):
        run = Run(id=f"{index:02d}-1.30", arrival_rate=1.0, horizon_s=60.0, warmup_s=9.0, seed=1)
        factors = drift(run)
        assert (factors[0], factors[-1]) == pytest.approx((first, last), abs=1e-3)
        assert (np.diff(factors) >= 0).all()


@pytest.fixture(scope="module", params=["vLLM, noisy steps", "SGLang"])
def server(request: pytest.FixtureRequest) -> tuple[str, Known]:
    return request.param, known(SERVERS[request.param], 1000, THETA)


def concluded(server: tuple[str, Known], drift: Drift, true_ratio: float = 1.0) -> Verdict:
    name, truth = server
    return experiment(drifting(SERVERS[name], drift), truth, true_ratio, seed=2, theta=THETA)[0]


def test_a_steady_server_is_confirmed(server: tuple[str, Known]) -> None:
    verdict = concluded(server, Drift("steady", 0.0))
    assert verdict.outcome == "confirmed", verdict.reasons
    assert next(c for c in verdict.premises if c.name == "steady step time").holds is True


@pytest.mark.parametrize("shape", ["ramp", "throughout"])
def test_a_server_that_slows_down_by_theta_is_named(
    server: tuple[str, Known], shape: Shape
) -> None:
    verdict = concluded(server, Drift(shape, THETA))
    assert verdict.outcome == "inconclusive"
    assert "speed changed" in verdict.headline
    shown = " ".join(" ".join(summary_lines(verdict)).split())
    assert "the engine became" in shown and "% slower [" in shown


def test_what_a_drift_cannot_explain_stays_refuted(server: tuple[str, Known]) -> None:
    verdict = concluded(server, Drift("ramp", THETA), true_ratio=0.7)
    assert verdict.outcome == "refuted"
    assert any("% slower [" in reason for reason in verdict.reasons)
