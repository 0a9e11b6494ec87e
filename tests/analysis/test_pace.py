"""Was a set step time kept?"""

from __future__ import annotations

import pytest

from analysis.calibration.pace import PACE_LIMIT, Pace


@pytest.mark.parametrize(
    ("off", "kept", "words"),
    [
        (0.0, True, "20.00 ms by the law, kept within +0.0 %"),
        (0.9 * PACE_LIMIT, True, "+2.7 %"),
        (-0.9 * PACE_LIMIT, True, "-2.7 %"),
        (1.1 * PACE_LIMIT, False, "paced engine: its steps were +3.3 % off"),
        (-1.1 * PACE_LIMIT, False, "paced engine: its steps were -3.3 % off"),
    ],
)
def test_what_counts_as_kept(off: float, kept: bool, words: str) -> None:
    pace = Pace(0.02 * (1 + off), 0.02)
    assert pace.off == pytest.approx(off)
    assert pace.kept is kept
    assert words in (pace.text() if kept else pace.complaint())
