"""The command ``calibrate``: the pool, the step-time law and how far both can be trusted."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.markup import escape

from analysis.calibration.calibration_lines import calibration_lines
from analysis.reports.figures_of_steps import step_time_figure
from harness.configs.config import ExperimentConfig, load_config
from harness.exits import INTERRUPT_EXIT
from harness.experiments.experiment import calibrated, write_inputs
from harness.experiments.saturated import calibration_record
from harness.live.target import assumptions, require_fitting, target_server
from harness.machine.display import Display
from harness.machine.interrupts import until_terminated
from harness.records.store import Store
from harness.servers.step_sources import ITERATION_FLAG

FIGURE = "calibration.svg"


def calibrate_command(
    config: Annotated[Path, typer.Argument(help="the experiment's YAML")],
    out: Annotated[Path | None, typer.Option(help="results folder to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """The pool and the step time of a server from small batches, checked against its own word."""
    settings = load_config(config)
    folder = f"{settings.name}-calibration-{datetime.now():%Y%m%d-%H%M%S}"
    store = Store.create(out or Path("results") / folder)
    console = Console(stderr=as_json)
    with Display(console, quiet=as_json) as display:
        try:
            record = uvloop.run(until_terminated(calibrate_server(settings, store, display)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise typer.Exit(INTERRUPT_EXIT) from None
    if as_json:
        print(json.dumps(record, indent=2))
        return
    for name, text in calibration_lines(record):
        console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"picture     {store.path / FIGURE}", highlight=False, soft_wrap=True)


async def calibrate_server(
    config: ExperimentConfig, store: Store, display: Display
) -> dict[str, Any]:
    """Attach to the config's server or start it, probe it, and write calibration.json and its picture.

    What is returned is the record as it lies in the file. A vLLM that is started here logs its
    iterations. Raises what `harness.live.calibrate.calibrate` and the server's start raise.
    """
    workload = config.estimated_law()
    write_inputs(config, store)
    display.phase("starting the server")
    async with target_server(_talkative(config), store) as target:
        require_fitting(workload, target.limits)
        for line in assumptions(target.shown, config):
            display.say(escape(f"note        {line}"))
        calibration = await calibrated(config, target, workload, display, store)
        limits = {"shown": target.shown, "used": calibration.limits(target.limits)}
        store.write_json("limits.json", limits)
        record = calibration_record(config, workload, target.limits, calibration)
    store.write_json("calibration.json", record)
    figure = step_time_figure(record)
    if figure is not None:
        store.write_text(FIGURE, figure)
    return record


def _talkative(config: ExperimentConfig) -> ExperimentConfig:
    """The config with vLLM's iteration log on, where it is started here."""
    server = config.server
    if server is None or server.launch is None or server.launch.runs != "vllm":
        return config
    if ITERATION_FLAG in server.launch.arguments:
        return config
    arguments = (*server.launch.arguments, ITERATION_FLAG)
    launch = server.launch.model_copy(update={"arguments": arguments})
    return config.model_copy(update={"server": server.model_copy(update={"launch": launch})})
