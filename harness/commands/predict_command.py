"""The command ``predict``: the critical rate of a server that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness.configs.config import load_config
from harness.configs.hardware import measured_rates
from harness.configs.offline import stated
from harness.experiments.predict import offline_predictions


def predict_command(
    config: Annotated[Path, typer.Argument(help="the experiment's YAML")],
    probe: Annotated[
        Path | None, typer.Option(help="what scripts/gpu-bandwidth wrote, not the data sheet")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """The critical rate from what the config states (limits, and step_time or hardware), without any
    server."""
    measured = None if probe is None else measured_rates(probe)
    rows = offline_predictions(stated(load_config(config)), measured)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console = Console()
    for name, text in rows["summary"].items():
        console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)
