"""The command line: each command is a few lines around one stage."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analysis.kv_cache import ImpossibleCache
from analysis.model_shape import UnknownShape
from analysis.prediction import Claim
from analysis.replica_verdict import verdict_of
from analysis.summary import summary
from harness.analyse import analyse, load_evidence, write_report
from harness.calibrate_command import calibrate_command
from harness.change_line import to_raise_it
from harness.config import ConfigError, load_config, load_mock_config
from harness.display import Display
from harness.engines import MissingMetric
from harness.experiment import run_experiment
from harness.explain_command import explain_command
from harness.hardware import measured_rates
from harness.headroom_command import headroom_command
from harness.interrupts import until_terminated
from harness.kv_cache_command import kv_cache_command
from harness.machine_limits import BeyondThisMachine
from harness.offline import stated
from harness.plan import HorizonTooShort
from harness.predict import offline_predictions
from harness.prober import CalibrationFailed
from harness.sampler import ServerGone
from harness.search_command import search_command
from harness.selftest_command import selftest_command
from harness.server import ServerFailed
from harness.server_limits import LimitsUnreadable
from harness.slo_command import slo_command
from harness.store import Store, StoreError, missing
from harness.streams import finite
from loadgen.drive import TooFewFileDescriptors
from loadgen.workers import WorkerFailed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Predict the critical request rate of an LLM server, drive it there, and judge.",
)
USAGE_ERRORS = (
    ConfigError,
    StoreError,
    ServerFailed,
    LimitsUnreadable,
    MissingMetric,
    CalibrationFailed,
    TooFewFileDescriptors,
    WorkerFailed,
    BeyondThisMachine,
    ServerGone,
    HorizonTooShort,
    UnknownShape,
    ImpossibleCache,
)
USAGE_EXIT, INTERRUPT_EXIT = 2, 130
ConfigPath = Annotated[Path, typer.Argument(help="the experiment's YAML")]
Folder = Annotated[Path, typer.Argument(help="a results folder")]
Json = Annotated[bool, typer.Option("--json", help="print JSON only")]


@app.command()
def run(
    config: ConfigPath,
    out: Annotated[Path | None, typer.Option(help="results folder to write")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="stop before the load")] = False,
    seed: Annotated[int | None, typer.Option(help="overrides load.seed")] = None,
    as_json: Json = False,
) -> None:
    """Predict, drive, sample, fit and judge. Exit status: 0 confirmed, 10 refuted, 11 inconclusive,
    12 premise violated, 13 invalid, 2 usage, 130 interrupted."""
    settings = load_config(config)
    if seed is not None:
        settings = settings.model_copy(
            update={"load": settings.load.model_copy(update={"seed": seed})}
        )
    store = Store.create(out or _new_folder(settings.name))
    console = Console(stderr=as_json)
    with Display(console, quiet=as_json) as display:
        try:
            verdict = asyncio.run(until_terminated(run_experiment(settings, store, display, plan)))
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


@app.command()
def predict(
    config: ConfigPath,
    probe: Annotated[
        Path | None, typer.Option(help="what scripts/gpu-bandwidth wrote, not the data sheet")
    ] = None,
    as_json: Json = False,
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


@app.command("analyse")
def analyse_folder(
    folder: Folder,
    claim: Annotated[
        Claim | None,
        typer.Option(help="ask the same records about this claim; nothing is written"),
    ] = None,
) -> None:
    """Judge a results folder again, from its files alone."""
    store = Store.open(folder)
    console = Console()
    if claim is None:
        verdict = analyse(store)
    else:
        verdict = verdict_of(load_evidence(store, claim))
        console.print("asked       of these records; the claim under test is that of the config")
    console.print(summary(verdict, to_raise_it(store)), highlight=False, soft_wrap=True)
    for sentence in missing(store.path):
        console.print(f"missing     {sentence}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(verdict.exit_code)


@app.command()
def report(folder: Folder) -> None:
    """Write report.html and report.md of a results folder again."""
    store = Store.open(folder)
    evidence = load_evidence(store)
    write_report(store, evidence, verdict_of(evidence))
    print(store.path / "report.html")


@app.command()
def mock(
    config: Annotated[Path, typer.Argument(help="YAML with the mock server's parameters")],
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
    step_log: Annotated[Path | None, typer.Option(help="write every step here")] = None,
) -> None:
    """A server that speaks the dialect of vLLM, or SGLang, around a model of its scheduler."""
    from harness.mock_http import run_mock

    run_mock(load_mock_config(config).server(port, step_log))


app.command("kv-cache")(kv_cache_command)
app.command("calibrate")(calibrate_command)
app.command("search")(search_command)
app.command("explain")(explain_command)
app.command("headroom")(headroom_command)
app.command("slo")(slo_command)
app.command("selftest")(selftest_command)


def _new_folder(name: str) -> Path:
    return Path("results") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def main() -> None:
    """Entry point: errors that the user can mend are one line, without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPT_EXIT)
    except USAGE_ERRORS as error:
        console = Console(stderr=True)
        console.print("error ", style="red", end=" ")
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        sys.exit(USAGE_EXIT)


if __name__ == "__main__":
    main()
