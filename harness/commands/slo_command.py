"""The command ``slo``: up to which share of the critical rate a target for the first token holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, percent, seconds
from analysis.operation.slo import Draws, largest_share, mean_ttft
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTimeFit
from analysis.theory.prediction import Prediction
from harness.configs.config import load_config
from harness.records.store import Store
from harness.records.streams import finite
from loadgen.workload import Workload

DAYS, REQUESTS = 4, 4000
NEVER_EXIT = 11


def slo_command(
    folder: Annotated[Path, typer.Argument(help="a results folder, judged")],
    ttft: Annotated[float, typer.Option(min=1e-6, help="seconds to the first token")] = 1.0,
    quantile: Annotated[float, typer.Option(min=0.5, max=0.999)] = 0.95,
    seed: Annotated[int, typer.Option(help="of the simulated days")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """The largest share of the critical rate at which a quantile of the time to first token stays under
    a target: predicted, and beside it what the runs measured. Exit status: 0, 11 at no rate, 2 usage."""
    found = slo(Store.open(folder), ttft, quantile, seed)
    if as_json:
        print(json.dumps(finite(json.loads(json.dumps(found))), indent=2))
    else:
        console = Console()
        for name, text in _lines(found):
            console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(NEVER_EXIT if found["share"] is None else 0)


def slo(store: Store, target_s: float, quantile: float, seed: int) -> dict[str, Any]:
    """Share and rate that are predicted, and each run's measured p95 beside that at its realised rate.

    Everything is plain JSON. Raises StoreError where the folder lacks a file.
    """
    limits = EngineLimits.from_dict(store.read_json("limits.json")["used"])
    fit = StepTimeFit.from_dict(store.read_json("calibration.json")["fit"])
    law = load_config(store.path / "config.yaml").law()
    critical = Prediction.from_dict(store.read_json("prediction.json")["engine"]).critical_rate
    days = drawn(law, seed)
    eos = law.ignore_eos
    share = largest_share(limits, fit.law, critical.value, days, target_s, quantile, eos)
    runs = [
        {
            "id": run["id"],
            "share": run["realised_rate"] / critical.value,
            "measured_p95_s": run["ttft_p95_s"],
            "predicted_p95_s": asdict(
                mean_ttft(limits, fit.law, days, run["realised_rate"], ignore_eos=eos)
            ),
        }
        for run in store.read_json("verdict.json")["runs"]
        if run["arrival_rate"] < critical.value
    ]
    return {
        "schema": 1,
        "target_s": target_s,
        "quantile": quantile,
        "critical_rate": asdict(critical),
        "share": None if share is None else asdict(share),
        "rate": None if share is None else share.value * critical.value,
        "runs": runs,
    }


def drawn(law: Workload, seed: int, count: int = DAYS, requests: int = REQUESTS) -> list[Draws]:
    """Arrivals at rate 1 and lengths of ``count`` days, each from a seed of its own."""
    rngs = [np.random.default_rng([seed, 6, day]) for day in range(count)]
    return [
        Draws(np.cumsum(rng.exponential(1.0, requests)), law.sample(rng, requests)) for rng in rngs
    ]


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    name = f"p{100 * found['quantile']:g} time to first token"
    target = f"under {seconds(found['target_s'])}"
    lines = []
    if found["share"] is None:
        lines.append(("predicted", f"{name} is {target} at no rate"))
    else:
        share = Estimate(**found["share"])
        text = f"{name} stays {target} up to {estimate_text(share)}, {found['rate']:.3g} req/s"
        lines.append(("predicted", f"{text} ({share.method})"))
    lines.append(("critical", estimate_text(Estimate(**found["critical_rate"]))))
    for run in found["runs"]:
        predicted = estimate_text(Estimate(**run["predicted_p95_s"]))
        measured = seconds(run["measured_p95_s"])
        at = percent(run["share"], 0)
        lines.append(
            (f"run {run['id']}", f"at {at}: p95 measured {measured}, predicted {predicted}")
        )
    return lines
