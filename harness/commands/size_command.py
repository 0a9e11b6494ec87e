"""The command ``size``: how many replicas a demand needs, and what that leaves, costs and rests on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, grouped, percent, seconds, words
from analysis.operation.sizing import SURE, CannotSize, Fleet, fleet
from harness.configs.sections import ConfigError
from harness.exits import CANNOT_SAY_EXIT
from harness.records.streams import finite
from harness.rehearsals.size_source import Replica, changed, replica_of
from harness.rehearsals.sizing import (
    WIDEST,
    Demand,
    checked_fleet,
    engine_shares,
    trace_demand,
    waits,
)

HOURS_A_MONTH = 730


def size_command(
    source: Annotated[Path, typer.Argument(help="a results folder, or a config as for predict")],
    rate: Annotated[float | None, typer.Option(help="demand, requests per second")] = None,
    trace: Annotated[Path | None, typer.Option(help="demand from a trace, by its peak")] = None,
    trace_format: Annotated[str, typer.Option("--format", help="of the trace")] = "azure",
    window: Annotated[float, typer.Option(min=1.0, help="seconds of the peak")] = 300.0,
    growth: Annotated[float, typer.Option(min=0.001, help="times the demand")] = 1.0,
    ttft: Annotated[
        float, typer.Option(min=1e-6, help="seconds from arrival to first token")
    ] = 1.0,
    quantile: Annotated[float, typer.Option(min=0.5, max=0.999, help="of that time")] = 0.95,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help="tp=2, kv=fp8, pool=, seqs=, chunk=, context=, gpu=; with commas: together"
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="of a GPU hour")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="of a replica, where not known")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="simulate the whole fleet: both routers, one lost")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the simulated days")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """How many replicas a demand needs so that a quantile of the time to first token meets a target.

    Exit status: 0, 11 no fleet meets the target, 2 usage."""
    if (rate is None) == (trace is None):
        raise ConfigError("give the demand: --rate (requests per second) or --trace")
    if rate is not None and rate <= 0:
        raise ConfigError(f"--rate {rate:g}: a demand is positive")
    asked = Demand(rate, None, None) if rate else trace_demand(_file(trace), trace_format, window)
    demand = asked.scaled(growth)
    replica = replica_of(source)
    others = [changed(replica, wish) for wish in what_if or ()]
    try:
        answers = [answer(replica, demand, ttft, quantile, seed, price, gpus)]
        answers += [answer(other, demand, ttft, quantile, seed, price) for other in others]
    except CannotSize as error:
        if as_json:
            print(json.dumps({"schema": 1, "fleets": [], "reason": str(error)}))
        else:
            Console().print(f"cannot say  {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(CANNOT_SAY_EXIT) from None
    found: dict[str, Any] = {"schema": 1, "demand": asdict(demand), "fleets": answers}
    if check:
        size, mean = answers[0]["fleet"]["replicas"], demand.rate * replica.served
        found["check"] = checked_fleet(replica, size, mean, quantile, seed)
    if as_json:
        print(json.dumps(finite(json.loads(json.dumps(found))), indent=2))
        return
    console = Console()
    for name, text in text_lines(found):
        console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)


def answer(
    replica: Replica,
    demand: Demand,
    target_s: float,
    quantile: float,
    seed: int,
    price: float | None = None,
    gpus: int | None = None,
) -> dict[str, Any]:
    """One fleet as plain JSON types. Raises CannotSize, ConfigError."""
    prediction, law = replica.predicted(), replica.fit.law
    rate = demand.rate * replica.served
    model_rate, critical = prediction.critical_rate.value, replica.critical_rate()
    allowed = engine_shares(replica.workload, replica.limits, law, prediction, seed, quantile)
    found = fleet(rate, critical, target_s, allowed, model_rate)
    speed = critical.value / model_rate
    onset = prediction.onset_rate
    answer: dict[str, Any] = {
        "name": replica.name,
        "target_s": target_s,
        "quantile": quantile,
        "fleet": found.to_dict(),
        "critical_rate": critical.to_dict(),
        "advice": advice(critical, found),
        "binding": prediction.binding,
        "waits": waits(replica, found.replicas, rate, speed, quantile, seed),
        "one_lost": None,
        "preemption_from": None
        if onset is None
        else onset.scaled(speed * found.replicas).to_dict(),
        "gpus": found.replicas * (gpus or replica.gpus),
        "measured": list(replica.measured),
        "assumed": list(replica.assumed),
    }
    if found.replicas > 1:
        answer["one_lost"] = waits(replica, found.replicas - 1, rate, speed, quantile, seed)
    if price is not None:
        answer["cost"] = cost(found, price * (gpus or replica.gpus))
    return answer


def advice(critical: Estimate, found: Fleet) -> str | None:
    """What to do about a critical rate that is known to less than `WIDEST`; None where it is known."""
    half = critical.at_level(0.90).half_width / critical.value if critical.level < 1.0 else 0.0
    if half < WIDEST:
        return None
    return (
        f"the critical rate is known to {percent(half)} only (90 %), for which {found.replicas} "
        f"replicas are taken, not {found.likely}: before buying, `critrate run` on one replica, which "
        "calibrates and measures it; where that was done, once more, or longer (load.horizon_s)"
    )


def cost(found: Fleet, per_replica_hour: float) -> dict[str, float]:
    """Of an hour, with its interval, and of a million requests of the demand."""
    hour = found.replicas * per_replica_hour
    return {
        "per_hour": hour,
        "per_hour_low": found.low * per_replica_hour,
        "per_hour_high": found.high * per_replica_hour,
        "per_million_requests": hour / found.demand / 3600 * 1e6,
    }


def _file(path: Path | None) -> Path:
    if path is None or not path.is_file():
        raise ConfigError(f"--trace {path}: there is no such file")
    return path


# -- as text -------------------------------------------------------------------------------------


def text_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The answer as a reader sees it: a name and a sentence per line."""
    demand, first = found["demand"], found["fleets"][0]
    text = f"{demand['rate']:.4g} req/s"
    if demand["mean"] is not None:
        text += f", the busiest {seconds(demand['window_s'])}; the mean is {demand['mean']:.4g}"
        text += f"; gaps in it vary {demand['burstiness']:.1f} times as much as Poisson's"
    lines = [("demand", text), *_fleet_lines(first)]
    lines += [("measured", what) for what in first["measured"]]
    lines += [("assumed", what) for what in first["assumed"]]
    for other in found["fleets"][1:]:
        more = [what for what in other["assumed"] if what not in first["assumed"]]
        lines.append(
            ("what if", f"{other['name']}: {_count_text(other)}; assumed: {'; '.join(more)}")
        )
    lines += [
        ("checked", f"{c['text']}: {estimate_text(Estimate(**c['wait']))}")
        for c in found.get("check", ())
    ]
    return lines


def _fleet_lines(one: dict[str, Any]) -> list[tuple[str, str]]:
    sized, name = one["fleet"], f"p{100 * one['quantile']:g}"
    lines = [
        ("replicas", _count_text(one)),
        ("target", f"{name} of the time to first token under {seconds(one['target_s'])}"),
        (
            "critical",
            f"{estimate_text(Estimate(**one['critical_rate']))} a replica, bound by "
            f"{words(one['binding'])}",
        ),
        (
            "load",
            f"{estimate_text(Estimate(**sized['load']))}; the target holds up to "
            f"{percent(sized['share']['value'])}",
        ),
        ("fits", f"{estimate_text(Estimate(**sized['fits']))} in all"),
        ("waits", _waits_text(one["waits"], name)),
    ]
    if one["one_lost"] is not None:
        lines.append(("one lost", _waits_text(one["one_lost"], name)))
    if one["advice"] is not None:
        lines.insert(1, ("known badly", one["advice"]))
    onset = one["preemption_from"]
    if onset is None:
        lines.append(("preemption", f"none to speak of: {words(one['binding'])} binds before"))
    else:
        lines.append(
            (
                "preemption",
                f"from {estimate_text(Estimate(**onset))} on the pool is full 5 % of the time",
            )
        )
    if "cost" in one:
        paid = one["cost"]
        month = grouped(HOURS_A_MONTH * paid["per_hour"])
        lines.append(
            (
                "cost",
                f"{paid['per_hour']:.2f} an hour [{paid['per_hour_low']:.2f}, "
                f"{paid['per_hour_high']:.2f}], {month} a month, "
                f"{paid['per_million_requests']:.2f} per million requests",
            )
        )
    return lines


def _count_text(one: dict[str, Any]) -> str:
    sized = one["fleet"]
    text = f"{sized['replicas']} ({percent(SURE, 0)} sure; needed {sized['likely']} "
    text += f"[{sized['low']}, {sized['high']}])"
    return text if one["gpus"] == sized["replicas"] else f"{text}, {one['gpus']} GPUs"


def _waits_text(found: dict[str, Any], name: str) -> str:
    p50, high = (Estimate(**found[key]) for key in ("p50", "tail"))
    at = f"at {percent(found['load'], 0)} of critical"
    if not high.value < float("inf"):
        return f"{at} the queue grows"
    return f"{at} p50 {estimate_text(p50)}, {name} {estimate_text(high)}"
