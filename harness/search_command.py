"""The command ``search``: the critical rate of an unknown server, without any prediction."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from analysis.search_result import SearchResult, search_lines
from harness.config import ExperimentConfig, load_config
from harness.display import Display
from harness.experiment import gpus_of, write_inputs
from harness.interrupts import until_terminated
from harness.offer import Stage
from harness.search import search_live
from harness.search_rehearsal import design_for
from harness.store import Store
from harness.streams import finite
from harness.target import assumptions, require_fitting, target_server

INTERRUPT_EXIT = 130


def search_command(
    config: Annotated[Path, typer.Argument(help="the experiment's YAML")],
    precision: Annotated[
        float, typer.Option(min=0.001, max=0.2, help="half width of the 95 % interval, as a share")
    ] = 0.02,
    out: Annotated[Path | None, typer.Option(help="results folder to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
    seed: Annotated[int | None, typer.Option(help="overrides load.seed")] = None,
    first_rate: Annotated[float, typer.Option(min=1e-3, help="req/s to begin with")] = 1.0,
    max_rate: Annotated[float, typer.Option(min=1e-3, help="req/s never exceeded")] = 1000.0,
    max_minutes: Annotated[float, typer.Option(min=0.1, help="give up after")] = 30.0,
) -> None:
    """Find the critical rate of an unknown server, in the least time. Exit status: 0 found, 11 cannot
    say, 13 invalid load, 2 usage, 130 interrupted."""
    settings = load_config(config)
    folder = f"{settings.name}-search-{datetime.now():%Y%m%d-%H%M%S}"
    store = Store.create(out or Path("results") / folder)
    console = Console(stderr=as_json)
    with Display(console, quiet=as_json) as display:
        try:
            result = asyncio.run(
                until_terminated(
                    search_server(
                        settings,
                        store,
                        display,
                        precision,
                        settings.load.seed if seed is None else seed,
                        (first_rate, max_rate),
                        60 * max_minutes,
                    )
                )
            )
        except (KeyboardInterrupt, asyncio.CancelledError):
            console.print(f"interrupted: what was measured is in {store.path / 'search.json'}")
            raise typer.Exit(INTERRUPT_EXIT) from None
    if as_json:
        print(json.dumps(finite(result.to_dict()), default=list))
    else:
        for name, text in search_lines(result):
            console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"looks       {store.path / 'search.json'}", highlight=False, soft_wrap=True)
    raise typer.Exit(result.exit_code)


async def search_server(
    config: ExperimentConfig,
    store: Store,
    display: Display,
    precision: float,
    seed: int,
    rates: tuple[float, float],
    max_duration_s: float,
) -> SearchResult:
    """Attach to the config's server or start it, and search. Writes config, environment, limits, records
    and search.json into the folder."""
    workload = config.law()
    write_inputs(config, store)
    design = design_for(workload, precision, config.theta, *rates, max_duration_s)
    display.phase("starting the server")
    async with target_server(config, store) as target:
        require_fitting(workload, target.limits)
        for line in assumptions(target.shown, config):
            display.say(escape(f"note        {line}"))
        store.write_json("limits.json", {"shown": target.shown, "used": target.limits})
        stage = Stage(config, target, workload, store, display, gpus_of(target), design.first_rate)
        return await search_live(stage, design, seed)
