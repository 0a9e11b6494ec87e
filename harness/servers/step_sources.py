"""What the engine itself tells of its steps: vLLM's iteration log, the sums of SGLang's /v1/loads.

Read while the server is idle, before and after each probe; what lies in between is the probe's. The
formats are those of vLLM 0.32.0 (`v1/metrics/loggers.py`, with --enable-logging-iteration-details) and
SGLang 0.5.23 (`managers/scheduler.py`). A source that is not there is None, never zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from analysis.calibration.probe_readings import EngineWord, Iteration
from harness.servers.engines import EngineFacts
from harness.servers.server_limits import get_json

ITERATION_FLAG = "--enable-logging-iteration-details"
MOMENTS = 5
_ITERATION = re.compile(
    r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, (\d+) generation requests, "
    r"(\d+) generation tokens, iteration elapsed time: (\d+\.\d+) ms(?! \(dummy\))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReading:
    """Where the engine's own books stand at one idle instant."""

    log_bytes: int | None
    """Length of the log; None where the server was not started here."""
    decode_moments: tuple[float, ...] | None
    prefill_tokens: int | None
    prefill_busy_us: int | None


async def read_sources(
    session: aiohttp.ClientSession, url: str, facts: EngineFacts, log: Path | None
) -> SourceReading:
    """Raises LimitsUnreadable when the server does not answer at all."""
    loads = None
    if facts.dialect == "sglang":
        loads = await get_json(session, f"{url}/v1/loads?include=core")
    rank = (loads or {}).get("loads") or [{}]
    load = rank[0]
    moments = load.get("decode_moments")
    if moments is None and "decode_moments" in load:
        # The list is there from the first decode step on.
        moments = [0.0] * MOMENTS
    return SourceReading(
        log_bytes=log.stat().st_size if log is not None and log.exists() else None,
        decode_moments=None if moments is None else tuple(moments[:MOMENTS]),
        prefill_tokens=load.get("total_prefill_uncached_tokens"),
        prefill_busy_us=load.get("total_prefill_busy_us"),
    )


def told_between(before: SourceReading, after: SourceReading, log: Path | None) -> EngineWord:
    """What the engine's books gained from one reading to the next."""
    iterations = None
    if log is not None and before.log_bytes is not None and after.log_bytes is not None:
        with log.open("rb") as file:
            file.seek(before.log_bytes)
            text = file.read(after.log_bytes - before.log_bytes).decode(errors="replace")
        iterations = iterations_of(text)
    moments = None
    if before.decode_moments is not None and after.decode_moments is not None:
        pairs = zip(after.decode_moments, before.decode_moments, strict=True)
        moments = tuple(a - b for a, b in pairs)
    tokens, busy_us = (
        None if now is None or then is None else now - then
        for now, then in (
            (after.prefill_tokens, before.prefill_tokens),
            (after.prefill_busy_us, before.prefill_busy_us),
        )
    )
    return EngineWord(
        iterations=iterations,
        decode_moments=moments,
        prefill_tokens=tokens,
        prefill_busy_s=None if busy_us is None else busy_us * 1e-6,
    )


def iterations_of(text: str) -> tuple[Iteration, ...] | None:
    """The iterations that a piece of vLLM's log tells of; None where it tells of none."""
    found = tuple(
        Iteration(
            context_requests=int(line[1]),
            context_tokens=int(line[2]),
            generation_requests=int(line[3]),
            generation_tokens=int(line[4]),
            elapsed_s=float(line[5]) * 1e-3,
        )
        for line in _ITERATION.finditer(text)
    )
    return found or None
