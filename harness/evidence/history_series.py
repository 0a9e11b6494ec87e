"""The history as series: what each night says against those before it, and where a break lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.numbers.estimate import Estimate
from analysis.operation.regression import NightAnswer, judge_nights
from harness.evidence.history import Entry, environment_change, segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One measured night in its series."""

    entry: Entry
    answer: NightAnswer | None
    """None where there is nothing to compare it with: the first night, or another config."""
    broke: dict[str, tuple[Any, Any]]
    """What changed in the environment before this night."""
    before: tuple[Entry, ...]
    """The nights that it was compared with: those since the last break, or those before this break."""


def series(entries: Sequence[Entry]) -> dict[str, list[Judged]]:
    """The measured nights of each name, judged. Nights that are invalid or without a rate are left out.

    A night after a break begins a new level; it is still compared with the level before, unless the
    config itself changed: that is another experiment.
    """
    names = dict.fromkeys(entry.name for entry in entries)
    return {name: _judged([e for e in entries if e.name == name and usable(e)]) for name in names}


def usable(entry: Entry) -> bool:
    """Has it a measured rate that can be compared?"""
    return entry.outcome != "invalid" and entry.rate is not None and entry.rate.standard_error > 0


def _judged(entries: Sequence[Entry]) -> list[Judged]:
    found: list[Judged] = []
    previous: list[Entry] = []
    for segment in segments(entries):
        first, *others = segment
        broke = environment_change(previous[0], first) if previous else {}
        across = None
        if previous and "config_digest" not in broke:
            across = judge_nights([_rate(e) for e in (*previous, first)])[-1]
        found.append(Judged(entry=first, answer=across, broke=broke, before=tuple(previous)))
        answers = judge_nights([_rate(e) for e in segment])
        for i, entry in enumerate(others, start=1):
            before = tuple(segment[:i])
            found.append(Judged(entry=entry, answer=answers[i], broke={}, before=before))
        previous = segment
    return found


def _rate(entry: Entry) -> Estimate:
    rate = entry.rate
    assert rate is not None
    return rate


def change_text(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Such as "engine_version 0.31 to 0.32, driver 570 to 575"; digests shortened."""
    return ", ".join(
        f"{name} {_shown(old)} to {_shown(new)}" for name, (old, new) in changed.items()
    )


def _shown(value: Any) -> str:
    text = str(value)
    return text[:8] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
