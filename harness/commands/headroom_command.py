"""The command ``headroom``: how much room a serving engine has left, without any load of ours."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from analysis.operation.headroom import Headroom, headroom
from analysis.operation.headroom_text import headroom_lines
from analysis.operation.serving_window import CannotSay, serving_window
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.step_time import StepTimeFit
from harness.configs.config import ConfigError, ServerConfig
from harness.exits import CANNOT_SAY_EXIT, INTERRUPT_EXIT
from harness.live.connection import connect
from harness.live.sampler import sample_engine
from harness.machine.display import Display
from harness.machine.interrupts import until_terminated
from harness.records.store import Store
from harness.records.streams import JsonLines, finite, read_lines
from harness.servers.engines import ENGINES
from harness.servers.limits import read_limits
from harness.servers.server_limits import ServerLimits, get_text

GONE_AFTER_S = 30.0
"""A production server may be restarted while it is watched: the counters then say so."""
SCRAPE_TIMEOUT_S = 5.0


def headroom_command(
    source: Annotated[str, typer.Argument(help="the server's URL, or a file that --record wrote")],
    minutes: Annotated[float, typer.Option(min=0.1, help="how long to watch")] = 10.0,
    interval: Annotated[float, typer.Option(min=0.05, help="seconds between two reads")] = 0.5,
    calibration: Annotated[
        Path | None, typer.Option(help="folder of `critrate calibrate` (or run) of this server")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="where it is not shown")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="where it is not shown")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="what each request declares (SGLang reserves it)")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="environment variable that holds the key")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="keep the samples in this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """How far a serving engine is from its critical rate, from its metrics alone: it sends no request.
    Exit status: 0, 11 cannot say, 2 usage, 130 interrupted."""
    console = Console(stderr=as_json)
    fit = None if calibration is None else _calibrated(calibration)
    if re.match("https?://", source):
        server = ServerConfig.model_validate({"url": source, "api_key_env": api_key_env})
        with Display(console, quiet=as_json) as display:
            watching = watch(server, 60 * minutes, interval, record, display)
            try:
                limits, samples = asyncio.run(until_terminated(watching))
            except (KeyboardInterrupt, asyncio.CancelledError):
                raise typer.Exit(INTERRUPT_EXIT) from None
    else:
        limits, samples = recorded(Path(source))
    limits = replace(
        limits,
        max_num_seqs=limits.max_num_seqs or max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens or max_num_batched_tokens,
    )
    try:
        found = headroom(serving_window(samples, limits), fit, max_tokens)
    except CannotSay as error:
        if as_json:
            print(json.dumps({"schema": 1, "load": None, "reason": str(error)}))
        else:
            console.print(f"cannot say  {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(CANNOT_SAY_EXIT) from None
    _show(found, console, as_json)
    raise typer.Exit(0 if found.load is not None else CANNOT_SAY_EXIT)


def _show(found: Headroom, console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps(finite(json.loads(json.dumps(found.to_dict()))), indent=2))
        return
    for name, text in headroom_lines(found):
        console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)


async def watch(
    server: ServerConfig, seconds: float, interval_s: float, record: Path | None, display: Display
) -> tuple[EngineLimits, list[EngineSample]]:
    """The limits of a server and its samples over ``seconds``; also into the file ``record``.

    Whether it is vLLM or SGLang is read from its metrics. Raises LimitsUnreadable, MissingMetric,
    ServerGone with what to do.
    """
    assert server.url is not None
    url = server.url.rstrip("/")
    samples: list[EngineSample] = []
    async with connect(server) as session:
        _, page = await get_text(session, f"{url}/metrics")
        facts = ENGINES["sglang" if re.search("^sglang:", page, re.MULTILINE) else "vllm"]
        shown = await read_limits(session, url, facts)
        limits = limits_of(shown)
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stop.set)
        lines = None if record is None else JsonLines(record)
        keep: Callable[[Any], None] = (lambda _: None) if lines is None else lines.write
        keep({"limits": asdict(limits)})

        def on_sample(sample: EngineSample) -> None:
            samples.append(sample)
            keep(sample)
            watched_s = (sample.t_ns - samples[0].t_ns) / 1e9
            display.phase(f"watching {url}", watched_s / seconds, seconds - watched_s)

        try:
            await sample_engine(
                session,
                url,
                facts,
                interval_s,
                stop,
                on_sample,
                version=shown.version,
                timeout_s=SCRAPE_TIMEOUT_S,
                gone_after_s=GONE_AFTER_S,
            )
        finally:
            if lines is not None:
                lines.close()
    return limits, samples


def limits_of(shown: ServerLimits) -> EngineLimits:
    """What the server shows of its limits; those that it hides are None."""
    return EngineLimits(
        num_blocks=shown.num_blocks,
        block_size=shown.block_size,
        max_num_seqs=shown.max_num_seqs,
        max_num_batched_tokens=shown.max_num_batched_tokens,
        max_model_len=shown.max_model_len,
        watermark=shown.watermark or 0.0,
        reserve_full_prompt=shown.reserve_full_prompt is not False,
        long_prefill_token_threshold=shown.long_prefill_token_threshold or 0,
        async_scheduling=bool(shown.async_scheduling),
        sglang=shown.sglang,
    )


def recorded(path: Path) -> tuple[EngineLimits, list[EngineSample]]:
    """Limits and samples from a file that ``--record`` wrote. Raises ConfigError, DamagedRecord."""
    if not path.is_file():
        raise ConfigError(f"{path}: neither a URL (http://...) nor a file that --record wrote")
    lines, _ = read_lines(path, dict)
    if not lines or "limits" not in lines[0]:
        raise ConfigError(
            f"{path} does not begin with the server's limits: give a file of --record"
        )
    try:
        return EngineLimits.from_dict(lines[0]["limits"]), [EngineSample(**x) for x in lines[1:]]
    except TypeError as error:
        raise ConfigError(f"{path} is no record of this version: {error}") from error


def _calibrated(folder: Path) -> StepTimeFit:
    """The step-time line of a folder that `critrate calibrate` or `critrate run` wrote."""
    return StepTimeFit.from_dict(Store.open(folder).read_json("calibration.json")["fit"])
