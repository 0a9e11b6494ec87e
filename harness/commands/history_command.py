"""The command ``history``: what a file of finished experiments holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analysis.numbers.estimate import ratio
from analysis.numbers.formatting import estimate_text, words
from harness.configs.config import ConfigError
from harness.evidence.history import (
    Entry,
    History,
    environment_change,
    limits_change,
    read_parquet,
    write_parquet,
)
from harness.evidence.history_entry import entry_of
from harness.evidence.history_series import Judged, change_text, series
from harness.records.store import Store
from harness.records.streams import as_json, finite

HIDDEN = {"experiment", "config_digest", "limits", "predicted", "measured"}
"""Shown in another form, or told by a break."""


def history_command(
    file: Annotated[Path, typer.Argument(help="the history, an SQLite file")],
    add: Annotated[
        list[Path] | None, typer.Option(help="add a finished experiment's folder; may be repeated")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the rates by night into this SVG")] = None,
    compare: Annotated[
        tuple[int, int] | None, typer.Option(help="two entries by their numbers in the list")
    ] = None,
    name: Annotated[str | None, typer.Option(help="only experiments of this name")] = None,
    to_parquet: Annotated[Path | None, typer.Option(help="write all entries there")] = None,
    from_parquet: Annotated[Path | None, typer.Option(help="add entries from there")] = None,
    as_json_only: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """List a history of finished experiments: a changed environment is a break, never averaged over."""
    history = History(file)
    if add:
        history.append([entry_of(Store.open(folder)) for folder in add])
    if from_parquet is not None:
        history.append(read_parquet(from_parquet))
    entries = history.entries()
    numbers = {entry.experiment: i for i, entry in enumerate(entries, start=1)}
    if to_parquet is not None:
        write_parquet(entries, to_parquet)
    shown = [entry for entry in entries if name is None or entry.name == name]
    if not shown and name is not None:
        known = ", ".join(sorted({entry.name for entry in entries}))
        raise ConfigError(f"{file} has no experiment called {name}; it has {known or 'none'}")
    found = series(shown)
    if plot is not None:
        # Matplotlib takes a second to import.
        from harness.evidence.history_figure import figure

        Store(plot.parent).write_text(plot.name, figure(found))
    if as_json_only:
        print(json.dumps(finite(json.loads(as_json([e.to_dict() for e in shown]))), indent=2))
        return
    lines = []
    if compare is not None:
        lines = compared(_numbered(entries, compare[0]), _numbered(entries, compare[1]))
    else:
        for key, nights in found.items():
            lines += [key, *_listing(nights, numbers)]
            judged = {night.entry.experiment for night in nights}
            for entry in shown:
                if entry.name == key and entry.experiment not in judged:
                    where = f"{numbers[entry.experiment]:>4}  {entry.began[:16].replace('T', ' ')}"
                    lines.append(f"{where}  no rate to compare: {entry.outcome}")
    console = Console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def compared(before: Entry, after: Entry) -> list[str]:
    """Two entries side by side: what differs, and the ratio of their measured rates."""
    lines = []
    broke = environment_change(before, after)
    if broke:
        lines.append(f"break: {change_text(broke)}")
    for field in fields(Entry):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old != new and not {field.name, field.name.partition("_")[0]} & HIDDEN:
            lines.append(f"{field.name:<20}{_short(old)}  ->  {_short(new)}")
    for name, (old, new) in limits_change(before, after).items():
        lines.append(f"{name:<20}{old}  ->  {new}")
    lines.append(
        f"{'predicted':<20}{estimate_text(before.claim)}  ->  {estimate_text(after.claim)}"
    )
    if before.rate is not None and after.rate is not None:
        change = ratio(after.rate, before.rate, "second over first, errors in quadrature")
        lines.append(
            f"{'measured':<20}{estimate_text(before.rate)}  ->  {estimate_text(after.rate)}"
        )
        lines.append(
            f"{'second over first':<20}{estimate_text(change)} by the runs' own errors; the scatter "
            "from night to night comes on top"
        )
    return lines


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _numbered(entries: list[Entry], number: int) -> Entry:
    if not 1 <= number <= len(entries):
        raise ConfigError(f"there is no entry {number}: the list has 1 to {len(entries)}")
    return entries[number - 1]


def _listing(nights: Sequence[Judged], numbers: dict[str, int]) -> list[str]:
    """The nights of one series as lines, a break between two as a line of its own."""
    lines = []
    for night in nights:
        if night.broke:
            lines.append(f"      -- break: {change_text(night.broke)} --")
        entry, answer = night.entry, night.answer
        said = "" if answer is None else f"{answer.answer}: {answer.text}"
        lines.append(
            f"{numbers[entry.experiment]:>4}  {entry.began[:16].replace('T', ' ')}  "
            f"{estimate_text(entry.rate):<32}{words(entry.outcome):<18}{said}"
        )
    return lines
