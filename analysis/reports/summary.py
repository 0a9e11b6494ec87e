"""The verdict in the terminal: aligned, at most 100 columns, readable without colour."""

from __future__ import annotations

import textwrap

from rich.text import Text

from analysis.numbers.formatting import (
    NO_BREAK,
    NOT_MEASURED,
    estimate_text,
    gap,
    glued,
    grouped,
    load_label,
    percent,
    plain,
    plus_minus,
    value_text,
    words,
)
from analysis.reports.replica_tables import replica_lines
from analysis.verdicts.verdict import RunJudgement, Verdict

WIDTH = 100
OUTCOME_STYLE = {
    "confirmed": "bold green",
    "refuted": "bold red",
    "inconclusive": "bold yellow",
    "premise_violated": "bold magenta",
    "invalid": "bold red",
}
RUN_STYLE = {"stable": "green", "unstable": "", "inconclusive": "yellow", "invalid": "red"}
GAP_COLUMNS = 3


def summary(verdict: Verdict, to_raise: str = "") -> Text:
    """The whole summary as one rich text; print it with ``soft_wrap=True``.

    ``to_raise`` is the line that says what binds and what raising it gives.

    The lines are broken here, at `WIDTH`, with hanging indents. Rich drops the colours where the
    output is no terminal or NO_COLOR is set; nothing is said by colour alone.
    """
    label = max(10, len(words(verdict.outcome))) + 2
    text = Text()
    entry(text, label, "claim", _claim(verdict))
    entry(text, label, "server", [verdict.mode])
    _runs(text, label, verdict.runs)
    entry(text, label, "measured", _measured(verdict))
    for warning in verdict.waves:
        indented(text, f"warning: {warning}", indent=label, style="yellow")
    for name, parts in replica_lines(verdict):
        entry(text, label, name, parts)
    for near in verdict.near_critical:
        parts = [near.answer, near.distance_text, near.text]
        entry(text, label, f"at {load_label(near.load)}", parts)
    if verdict.predictions:
        entry(text, label, "beside it", _beside(verdict))
    if verdict.from_paper:
        entry(text, label, "from paper", _from_paper(verdict))
    style = OUTCOME_STYLE[verdict.outcome]
    entry(text, label, words(verdict.outcome), [verdict.headline], style)
    for line in (*verdict.reasons, *verdict.advice):
        indented(text, line)
    if to_raise:
        indented(text, f"to raise it: {to_raise}")
    for warning in verdict.warnings:
        indented(text, f"warning: {warning}", style="yellow")
    text.rstrip()
    return text


def summary_lines(verdict: Verdict) -> list[str]:
    """The same without colour, one string per line."""
    return summary(verdict).plain.split("\n")


def _claim(verdict: Verdict) -> list[str]:
    return [
        f"{verdict.claim}, {verdict.grade}",
        f"predicted {estimate_text(verdict.predicted)}",
        f"bound by {words(verdict.binding)}",
    ]


def _measured(verdict: Verdict) -> list[str]:
    if verdict.measured is None:
        return ["no critical rate: no run gave one (see the reasons below)"]
    parts = [estimate_text(verdict.measured)]
    if verdict.ratio is None:
        parts.append(f"measured / predicted {NOT_MEASURED}")
    else:
        parts.append(f"measured / predicted {estimate_text(verdict.ratio)}")
    if verdict.gap is not None:
        parts.append(f"GAP {percent(verdict.gap)}")
    return parts


def _beside(verdict: Verdict) -> list[str]:
    parts = []
    for other in verdict.predictions:
        part = f"{other.name} {value_text(other.estimate)}"
        if verdict.measured is not None:
            distance = gap(other.estimate.value, verdict.measured.value)
            part += f" (GAP {percent(distance)})"
        parts.append(part)
    return parts


def _from_paper(verdict: Verdict) -> list[str]:
    """What each mechanism takes from the paper's rate, and what is left to explain."""
    parts = []
    for factor in verdict.from_paper:
        value = factor.estimate
        part = f"{factor.name} {100 * (value.value - 1):+.1f} %"
        if value.high > value.low:
            part += f" [{100 * (value.low - 1):+.1f}, {100 * (value.high - 1):+.1f}]"
        parts.append(part)
    return parts


def _runs(text: Text, label: int, runs: tuple[RunJudgement, ...]) -> None:
    """One line per run, its numbers aligned over the runs, its warnings beneath it."""
    if not runs:
        entry(text, label, "runs", ["none was judged"])
        return
    rates = [f"{grouped(run.arrival_rate, 2)} req/s" for run in runs]
    drifts = [plus_minus(run.drift) for run in runs]
    rate_width, drift_width = max(map(len, rates)), max(map(len, drifts))
    for run, rate, drift in zip(runs, rates, drifts, strict=True):
        head = f"  {load_label(run.load):<{label - 2}}"
        middle = f"{rate:>{rate_width}}   drift {drift:>{drift_width}}   "
        rest = wrapped(run.text, WIDTH - len(head) - len(middle))
        text.append(head + middle)
        text.append(rest[0] + "\n", style=RUN_STYLE[run.verdict])
        for line in rest[1:]:
            text.append(" " * (len(head) + len(middle)) + line + "\n")
        failed = [
            f"load check {c.name} failed: {plain(c.statistic)} against {plain(c.threshold)}, "
            f"{c.meaning}"
            for c in run.fidelity.checks
            if c.passed is False
        ]
        for warning in (*run.warnings, *failed):
            indented(text, f"warning: {warning}", indent=label, style="yellow")


def entry(text: Text, label: int, name: str, parts: list[str], style: str = "bold") -> None:
    """A line of ``parts`` set apart by spaces behind a label; it breaks between parts."""
    lines: list[str] = []
    room = WIDTH - label
    for part in parts:
        if lines and len(lines[-1]) + GAP_COLUMNS + len(part) <= room:
            lines[-1] += " " * GAP_COLUMNS + part
        else:
            lines.extend(wrapped(part, room))
    text.append(f"{name:<{label}}", style=style)
    text.append((lines or [""])[0] + "\n")
    for line in lines[1:]:
        text.append(" " * label + line + "\n")


def indented(text: Text, sentence: str, indent: int = 2, style: str = "") -> None:
    """A sentence of its own, its further lines set in a little more."""
    for i, line in enumerate(wrapped(sentence, WIDTH - indent - 2)):
        text.append(" " * (indent if i == 0 else indent + 2) + line + "\n", style=style)


def wrapped(sentence: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns that never part the groups of a number."""
    lines = textwrap.wrap(glued(sentence), max(width, 20)) or [""]
    return [line.replace(NO_BREAK, " ") for line in lines]
