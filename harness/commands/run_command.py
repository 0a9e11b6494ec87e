"""The command ``run``: predict, drive, sample, fit and judge."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from analysis.reports.summary import summary
from harness.configs.config import load_config
from harness.exits import INTERRUPT_EXIT
from harness.experiments.change_line import to_raise_it
from harness.experiments.experiment import run_experiment
from harness.machine.display import Display
from harness.machine.interrupts import until_terminated
from harness.records.store import Store
from harness.records.streams import finite


def run_command(
    config: Annotated[Path, typer.Argument(help="the experiment's YAML")],
    out: Annotated[Path | None, typer.Option(help="results folder to write")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="stop before the load")] = False,
    seed: Annotated[int | None, typer.Option(help="overrides load.seed")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """Predict, drive, sample, fit and judge. Exit status: 0 confirmed, 10 refuted, 11 inconclusive,
    12 premise violated, 13 invalid, 2 usage, 130 interrupted."""
    settings = load_config(config)
    if seed is not None:
        settings = settings.model_copy(
            update={"load": settings.load.model_copy(update={"seed": seed})}
        )
    folder = f"{settings.name}-{datetime.now():%Y%m%d-%H%M%S}"
    store = Store.create(out or Path("results") / folder)
    console = Console(stderr=as_json)
    with Display(console, quiet=as_json) as display:
        try:
            verdict = uvloop.run(until_terminated(run_experiment(settings, store, display, plan)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise typer.Exit(INTERRUPT_EXIT) from None
    if verdict is None:
        return
    if as_json:
        print(json.dumps(finite(verdict.to_dict()), default=list))
    else:
        console.print(summary(verdict, to_raise_it(store)), highlight=False, soft_wrap=True)
        console.print(f"report      {store.path / 'report.html'}", highlight=False, soft_wrap=True)
    raise typer.Exit(verdict.exit_code)
