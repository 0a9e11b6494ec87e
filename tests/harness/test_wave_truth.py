"""The settings in which the walk of the waves is held against SGLang's scheduler model."""

from __future__ import annotations

from itertools import islice

from harness.rehearsals.wave_truth import chosen, drawn


def test_the_walk_holds_in_the_first_of_each_list() -> None:
    found = [*islice(chosen(), 1), *islice(drawn(), 2)]
    assert all(f.held and abs(f.off) < 0.05 for f in found), [(f.lengths, f.off) for f in found]
