"""The command ``selftest``: what this machine's load generator can do at most."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from harness.machine.machine_limits import MachineLimits, save
from harness.machine.selftest import MAX_LAG_MS, measure


def selftest_command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """Measure how many requests, tokens and streams this machine can take in; runs that ask for more
    are then refused. Takes half a minute; nothing else should run meanwhile."""
    console = Console(stderr=as_json)

    def say(line: str) -> None:
        console.print(f"tried       {line}", highlight=False, markup=False, soft_wrap=True)

    limits = uvloop.run(measure(say))
    path = save(limits)
    if as_json:
        print(json.dumps(limits.to_dict(), indent=2))
        return
    for name, text in lines_of(limits):
        console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"kept        {path}", highlight=False, markup=False, soft_wrap=True)


def lines_of(limits: MachineLimits) -> tuple[tuple[str, str], ...]:
    """Name and text of each line of the answer."""
    bound = "; the sink beside it was late too, so it may take more" if limits.sink_bound else ""
    files = "no limit" if limits.open_files is None else f"at most {limits.open_files}"
    return (
        (
            "send lag",
            f"{limits.send_lag_p50_ms:.2f} ms, {limits.send_lag_p99_ms:.2f} ms at the 99th "
            "percentile of a light load",
        ),
        (
            "rate",
            f"{limits.requests_per_s:.0f} requests/s, {limits.tokens_per_s:.0f} streamed tokens/s "
            f"with less than {MAX_LAG_MS:g} ms at the 99th percentile, one process{bound}",
        ),
        ("streams", f"{limits.streams} at once; open files: {files}"),
    )
