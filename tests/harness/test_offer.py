"""How many requests a run may have in flight at once: for so many files must be free."""

import pytest

from harness.offer import SPARE_IN_FLIGHT, most_in_flight
from loadgen.records import Run


@pytest.mark.parametrize(
    ("rate", "preload", "expected"),
    [
        # Half of the predicted 10 req/s: what is offered above 5 may stay.
        (4.0, 0, SPARE_IN_FLIGHT),
        (10.0, 0, 5_000 + SPARE_IN_FLIGHT),
        (20.0, 0, 15_000 + SPARE_IN_FLIGHT),
        (10.0, 700, 700 + 5_000 + SPARE_IN_FLIGHT),
        (4.0, 700, 700 + SPARE_IN_FLIGHT),
    ],
)
def test_the_burst_may_be_in_flight_whole(rate: float, preload: int, expected: int) -> None:
    run = Run(
        id="00-1.00", arrival_rate=rate, horizon_s=1000.0, warmup_s=1.0, seed=1, preload=preload
    )
    assert most_in_flight(preload + round(rate * 1000.0), run, 10.0) == expected


def test_no_more_are_in_flight_than_are_offered() -> None:
    run = Run(id="00-1.00", arrival_rate=1.0, horizon_s=60.0, warmup_s=1.0, seed=1, preload=30)
    assert most_in_flight(90, run, 10.0) == 90
