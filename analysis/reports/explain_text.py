"""An explanation in the terminal: the look of the summary, aligned, at most 100 columns."""

from __future__ import annotations

from rich.text import Text

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import decimals_for, estimate_text, grouped, percent
from analysis.reports.summary import WIDTH, entry, indented, wrapped
from analysis.verdicts.explain import ENOUGH, Cause, Explanation

LABEL = 12
NAME, CHANGE, INTERVAL, PREDICTED = 24, 9, 18, 11
"""Widths of the columns; how a factor was got takes what is left."""


def explanation_text(found: Explanation, about: tuple[str, ...]) -> Text:
    """The whole answer as one rich text; print it with ``soft_wrap=True``.

    ``about`` are lines that say what was measured.
    """
    text = Text()
    entry(text, LABEL, "explain", list(about))
    entry(text, LABEL, "paper", [estimate_text(found.paper), "M / (b E[g]), before the first run"])
    rows = [*found.causes, *([] if found.unexplained is None else [found.unexplained])]
    if rows:
        head = (
            f"  {'factor':<{NAME - 2}}{'found':>{CHANGE}}{'':{INTERVAL}}{'predicted':>{PREDICTED}}"
        )
        text.append(f"{head}   how\n", style="dim")
    for cause in rows:
        _row(text, cause, "bold" if cause is found.unexplained else "")
    entry(text, LABEL, "measured", _measured(found))
    if found.lengths is not None:
        entry(text, LABEL, "lengths", lengths_text(found))
    _answer(text, found)
    for note in found.notes:
        indented(text, f"warning: {note}", style="yellow")
    text.rstrip()
    return text


def change_text(factor: float, half_width: float = 0.0) -> str:
    """A factor as per cent more or less, to the digits that its half width allows."""
    return f"{100 * (factor - 1):+.{_decimals(half_width)}f} %"


def change_interval(factor: Estimate) -> str:
    """The interval of a factor in per cent, such as "[-16.0, -12.3]"; empty for an exact one."""
    if factor.level == 1.0:
        return ""
    decimals = _decimals(factor.half_width)
    low, high = (f"{100 * (x - 1):+.{decimals}f}" for x in (factor.low, factor.high))
    return f"[{low}, {high}]"


def _decimals(half_width: float) -> int:
    return min(decimals_for(100 * half_width), 2) if half_width > 0 else 1


def share_text(share: Estimate) -> str:
    """A share of the gap with its interval in per cent."""
    decimals = decimals_for(100 * share.half_width) if share.half_width > 0 else 1
    low, high = (grouped(100 * x, decimals) for x in (share.low, share.high))
    return f"{percent(share.value, decimals)} [{low}, {high}]"


def answer_text(found: Explanation) -> list[str]:
    """What share of the gap is accounted for; why that cannot be said, where it cannot."""
    if found.share is None:
        assert found.cannot_say is not None
        return [found.cannot_say]
    asked = percent(ENOUGH, None)
    said = {True: "", False: f", less than {asked}", None: f": {asked} or not cannot be said"}
    parts = [f"for {share_text(found.share)} of the gap by what the run showed{said[found.enough]}"]
    if found.share_predicted is not None:
        parts.append(f"for {share_text(found.share_predicted)} by what was predicted before it")
    return parts


def lengths_text(found: Explanation) -> list[str]:
    """KV demand per request: designed, offered, served; and completions counted."""
    seen = found.lengths
    assert seen is not None
    return [
        f"E[g] {grouped(seen.designed)} token-steps designed",
        f"offered {estimate_text(seen.offered)}",
        f"served {estimate_text(seen.served)}",
        f"{estimate_text(seen.counted)} completed",
    ]


def _row(text: Text, cause: Cause, style: str) -> None:
    factor = cause.factor
    change = interval = ""
    if factor is not None:
        change = change_text(factor.value, factor.half_width)
        interval = change_interval(factor)
    predicted = "" if cause.predicted is None else change_text(cause.predicted)
    head = f"  {cause.name:<{NAME - 2}}{change:>{CHANGE}} {interval:<{INTERVAL - 1}}"
    head += f"{predicted:>{PREDICTED}}   "
    lines = wrapped(f"{cause.source}: {cause.how}", WIDTH - len(head))
    text.append(head + lines[0] + "\n", style=style)
    for line in lines[1:]:
        text.append(" " * len(head) + line + "\n", style=style)


def _measured(found: Explanation) -> list[str]:
    if found.measured is None:
        return ["no critical rate"]
    parts = [estimate_text(found.measured)]
    if found.gap is not None:
        change = change_text(found.gap.value, found.gap.half_width)
        parts.append(f"gap to the paper's formula {change} {change_interval(found.gap)}")
    return parts


def _answer(text: Text, found: Explanation) -> None:
    style = {True: "bold green", False: "bold red", None: "bold yellow"}[found.enough]
    label = "cannot say" if found.share is None else "accounts"
    entry(text, LABEL, label, answer_text(found), style)
