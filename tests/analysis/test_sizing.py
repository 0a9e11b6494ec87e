"""The rule that sizes a fleet: closed forms, and what no prediction can turn round."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from analysis.numbers.estimate import Estimate
from analysis.operation.sizing import (
    ANCHORS,
    SHARES,
    Allowed,
    CannotSize,
    Share,
    crossing,
    fleet,
    nearest_anchor,
    simulated_shares,
    smallest_fleet,
    squared_variation,
)
from analysis.operation.slo import Draws
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime

REQUESTS = 6_000
EXACT = Estimate.exact(10.0, "req/s", "stated")


def kingman(work_cv2: float, error: float = 0.0) -> Allowed:
    """Mean wait rho/(1-rho) (1/N + cv2)/2 of a service of one second, solved for rho."""

    def allowed(replicas: int, target_s: float) -> Share:
        spread = (1 / replicas + work_cv2) / 2
        return Share(target_s / (target_s + spread), error)

    return allowed


@pytest.mark.parametrize(
    ("demand", "share", "replicas"),
    [
        (0.1, 0.9, 1),
        (9.0, 0.9, 1),
        (9.1, 0.9, 2),
        (90.0, 0.9, 10),
        (100.0, 0.5, 20),
        (101, 0.5, 21),
    ],
)
def test_a_constant_share_needs_the_quotient_rounded_up(
    demand: float, share: float, replicas: int
) -> None:
    found = fleet(demand, EXACT, 1.0, lambda n, s: Share(share, 0.0))
    assert (found.low, found.likely, found.replicas, found.high) == (replicas,) * 4
    assert found.fits.value == pytest.approx(10 * share * replicas)
    assert found.load.value == pytest.approx(demand / replicas / 10)


@pytest.mark.parametrize("demand", [3.0, 40.0, 123.0, 555.0])
@pytest.mark.parametrize("target_s", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("work_cv2", [0.0, 0.6, 2.0])
def test_kingmans_formula_inverted(demand: float, target_s: float, work_cv2: float) -> None:
    found = fleet(demand, EXACT, target_s, kingman(work_cv2))

    def wait_s(replicas: int) -> float:
        rho = demand / replicas / 10
        return math.inf if rho >= 1 else rho / (1 - rho) * (1 / replicas + work_cv2) / 2

    assert wait_s(found.replicas) <= target_s * (1 + 1e-9)
    assert found.replicas == 1 or wait_s(found.replicas - 1) > target_s


def test_a_faster_server_has_the_same_waits_on_a_faster_clock() -> None:
    twice = Estimate.exact(20.0, "req/s", "measured")
    measured = fleet(200.0, twice, 0.5, kingman(0.6), model_rate=10.0)
    assert measured.replicas == fleet(100.0, EXACT, 1.0, kingman(0.6)).replicas


def test_more_demand_never_needs_fewer_and_a_wider_interval_never_less() -> None:
    rng = np.random.default_rng(1)
    rough = [Share(float(rng.uniform(0.4, 1.0)), float(rng.uniform(0, 0.02))) for _ in range(99)]
    for allowed in (kingman(0.6, 0.01), lambda n, s: rough[n % 99]):
        before = (0, 0, 0, 0)
        for demand in np.geomspace(5, 800, 40):
            high = 0
            for relative in (0.0, 0.01, 0.03, 0.1):
                rate = Estimate.log_normal(10.0, relative, "req/s", "predicted")
                found = fleet(float(demand), rate, 0.5, allowed)
                assert found.low <= found.likely <= found.replicas <= found.high
                assert found.high >= high
                high = found.high
            after = (found.low, found.likely, found.replicas, found.high)
            assert all(b >= a for a, b in zip(before, after, strict=True))
            before = after


def test_the_crossing_grows_with_the_target_whatever_the_waits() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        rough = rng.lognormal(0, 1, len(SHARES)) * np.linspace(0.1, 3, len(SHARES))
        found = [crossing(lambda i: float(rough[i]), t) for t in np.geomspace(0.01, 10, 50)]  # noqa: B023
        shares = [0.0 if share is None else share for share in found]
        assert shares == sorted(shares)


def test_the_crossing_is_where_the_logarithm_of_the_wait_is() -> None:
    waits = [math.exp(3 * share) for share in SHARES]
    for share in (0.33, 0.87, 0.95):
        assert crossing(lambda i: waits[i], math.exp(3 * share)) == pytest.approx(share)
    assert crossing(lambda i: waits[i], 1.0) is None
    assert crossing(lambda i: waits[i], math.exp(3.1)) == SHARES[-1]


def test_anchors_are_their_own_nearest() -> None:
    assert [nearest_anchor(n) for n in ANCHORS] == list(ANCHORS)
    assert [nearest_anchor(n) for n in (3, 11, 12, 5000)] == [4, 8, 16, ANCHORS[-1]]


def test_the_scatter_of_a_law() -> None:
    assert squared_variation(np.array([0.5, 0.5]), np.array([1.0, 3.0])) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("demand", "rate", "target_s"),
    [
        (0.0, EXACT, 1.0),
        (math.nan, EXACT, 1.0),
        (1.0, EXACT, 0.0),
        (1.0, Estimate.normal(1.0, 1.0, "req/s", "vague"), 1.0),
    ],
)
def test_what_is_not_positive_is_refused(demand: float, rate: Estimate, target_s: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        fleet(demand, rate, target_s, kingman(0.6))


def test_a_target_below_the_time_of_a_prompt_cannot_be_met() -> None:
    with pytest.raises(CannotSize, match="at any rate"):
        fleet(100.0, EXACT, 0.01, lambda n, s: None)
    with pytest.raises(CannotSize, match="more than"):
        smallest_fleet(1e9, lambda n: 1e-9)


def test_one_request_at_a_time_is_m_d_1_and_more_even_arrivals_allow_more() -> None:
    """On the engine model: one request at a time, 0.1 s each, is M/D/1 and E_N/D/1."""
    limits, law = EngineLimits(num_blocks=100, block_size=16, max_num_seqs=1), StepTime(b0_s=0.1)

    @cache
    def days(replicas: int) -> list[Draws]:
        rngs = [np.random.default_rng([7, day]) for day in range(2)]
        return [
            Draws(
                np.cumsum(rng.gamma(replicas, 1 / replicas, REQUESTS)),
                np.tile(np.array([[16, 1, 1]]), (REQUESTS, 1)),
            )
            for rng in rngs
        ]

    allowed = simulated_shares(limits, law, 10.0, 0.0, days)
    poisson, even = allowed(1, 0.3), allowed(32, 0.3)
    assert poisson is not None
    assert even is not None
    assert poisson.value < even.value
    # M/D/1 with a wait of at most 0.2 s before the service in 95 %: P(W <= 2) = 0.95 at rho = 0.49.
    assert poisson.value == pytest.approx(_mdone_share(2.0), abs=0.02)


def _mdone_share(wait: float) -> float:
    """rho at which P(W <= wait) = 0.95 in M/D/1 with services of 1 (Erlang's formula)."""

    def below(rho: float) -> float:
        terms = (
            (rho * (k - wait)) ** k / math.factorial(k) * math.exp(-rho * (k - wait))
            for k in range(int(wait) + 1)
        )
        return (1 - rho) * sum(terms)

    low, high = 0.01, 0.99
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) >= 0.95 else (low, middle)
    return low
