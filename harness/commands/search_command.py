"""The command ``search``: the critical rate of an unknown server, without any prediction."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.markup import escape

from analysis.theory.prediction import Prediction
from analysis.verdicts.search_result import SearchResult, search_lines
from analysis.verdicts.search_verdict import SearchVerdict, search_verdict, verdict_lines
from harness.configs.config import ConfigError, ExperimentConfig, load_config
from harness.exits import INTERRUPT_EXIT
from harness.experiments.experiment import gpus_of, predicted, write_inputs
from harness.experiments.search import search_live
from harness.live.offer import Stage
from harness.live.target import assumptions, require_fitting, target_server
from harness.machine.display import Display
from harness.machine.interrupts import until_terminated
from harness.records.store import Store
from harness.records.streams import finite
from harness.rehearsals.search_rehearsal import design_for
from loadgen.processes import POISSON


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
    verdict: Annotated[
        bool, typer.Option("--verdict", help="predict first, and say whether that is confirmed")
    ] = False,
) -> None:
    """Find the critical rate of an unknown server, in the least time. Exit status: 0 found, 11 cannot
    say, 13 invalid load, 2 usage, 130 interrupted; with --verdict 0 confirmed, 10 refuted."""
    settings = load_config(config)
    folder = f"{settings.name}-search-{datetime.now():%Y%m%d-%H%M%S}"
    store = Store.create(out or Path("results") / folder)
    console = Console(stderr=as_json)
    with Display(console, quiet=as_json) as display:
        try:
            result, judged = uvloop.run(
                until_terminated(
                    search_server(
                        settings,
                        store,
                        display,
                        precision,
                        settings.load.seed if seed is None else seed,
                        (first_rate, max_rate),
                        60 * max_minutes,
                        verdict,
                    )
                )
            )
        except (KeyboardInterrupt, asyncio.CancelledError):
            console.print(f"interrupted: what was measured is in {store.path / 'search.json'}")
            raise typer.Exit(INTERRUPT_EXIT) from None
    found = result.to_dict() | ({"verdict": judged.to_dict()} if judged else {})
    if as_json:
        print(json.dumps(finite(found), default=list))
    else:
        for name, text in search_lines(result) + (verdict_lines(judged) if judged else []):
            console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"looks       {store.path / 'search.json'}", highlight=False, soft_wrap=True)
    raise typer.Exit(judged.exit_code if judged else result.exit_code)


async def search_server(
    config: ExperimentConfig,
    store: Store,
    display: Display,
    precision: float,
    seed: int,
    rates: tuple[float, float],
    max_duration_s: float,
    verdict: bool = False,
) -> tuple[SearchResult, SearchVerdict | None]:
    """Attach to the config's server or start it, and search. Writes config, environment, limits, records
    and search.json into the folder.

    With ``verdict`` the server is calibrated and its rate predicted before: prediction.json is on disk
    then, the search begins at that rate, and search_verdict.json says what became of it.
    """
    workload = config.law()
    if config.arrivals() != POISSON:
        raise ConfigError(
            "load.arrivals: a search changes its rate as it goes, which only Poisson arrivals allow: "
            "remove it, or use `critrate run`"
        )
    if config.load.cluster is not None:
        raise ConfigError(
            "load.cluster: a search decides its load as it goes, in this process: remove it, or use "
            "`critrate run`"
        )
    write_inputs(config, store)
    design = design_for(workload, precision, config.theta, *rates, max_duration_s)
    display.phase("starting the server")
    async with target_server(config, store) as target:
        require_fitting(workload, target.limits)
        for line in assumptions(target.shown, config):
            display.say(escape(f"note        {line}"))
        gpus = gpus_of(config, target, store, display)
        if not verdict:
            store.write_json("limits.json", {"shown": target.shown, "used": target.limits})
            stage = Stage(config, (target,), workload, store, display, gpus, design.first_rate)
            return await search_live(stage, design, seed), None
        prediction, probe_requests = await predicted(config, target, workload, display, store)
        claim = Prediction.from_dict(prediction["claim"])
        rate = claim.critical_rate.value
        stage = Stage(config, (target,), workload, store, display, gpus, rate)
        digest = store.digest("prediction.json")
        result = await search_live(stage, replace(design, first_rate=rate), seed, digest)
        judged = search_verdict(claim, result, config.theta, probe_requests)
        store.write_json("search_verdict.json", judged.to_dict())
        return result, judged
