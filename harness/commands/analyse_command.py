"""The commands ``analyse`` and ``report``: a results folder again, from its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analysis.reports.summary import summary
from analysis.theory.prediction import Claim
from analysis.verdicts.replica_verdict import verdict_of
from harness.experiments.analyse import analyse, load_evidence, write_report
from harness.experiments.change_line import to_raise_it
from harness.records.store import Store, missing
from harness.records.streams import finite

Folder = Annotated[Path, typer.Argument(help="a results folder")]


def analyse_command(
    folder: Folder,
    claim: Annotated[
        Claim | None,
        typer.Option(help="ask the same records about this claim; nothing is written"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """Judge a results folder again, from its files alone. Exit status as that of run."""
    store = Store.open(folder)
    verdict = analyse(store) if claim is None else verdict_of(load_evidence(store, claim))
    if as_json:
        plain = {**verdict.to_dict(), "missing": missing(store.path)}
        print(json.dumps(finite(plain), default=list))
        raise typer.Exit(verdict.exit_code)
    console = Console()
    if claim is not None:
        console.print("asked       of these records; the claim under test is that of the config")
    console.print(summary(verdict, to_raise_it(store)), highlight=False, soft_wrap=True)
    for sentence in missing(store.path):
        console.print(f"missing     {sentence}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(verdict.exit_code)


def report_command(folder: Folder) -> None:
    """Write report.html and report.md of a results folder again."""
    store = Store.open(folder)
    evidence = load_evidence(store)
    write_report(store, evidence, verdict_of(evidence))
    print(store.path / "report.html")
