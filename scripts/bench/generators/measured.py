"""One client, one load, one sink: what was asked for and what came."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from generators.at_sink import Arrivals, arrivals, delivers
from generators.commands import OFFLINE, Client, Load, argv
from generators.schedule import NOTED
from generators.sink import Sink, pinned, recording
from generators.watch import Watch
from numpy.typing import NDArray

START_LIMIT_S = 90.0
SLOWER_THAN_ASKED = 4.0
LOG_LINES = 8
FEW_MS = 1.0
"""What the sink may be late in writing, and critrate in sending, at the 99th percentile."""


@dataclass(frozen=True)
class Bench:
    """The machine's part: the sink's program, cores of sink and clients (None: all), and the like."""

    program: Path
    sink_cores: tuple[int, ...] | None
    client_cores: tuple[int, ...] | None
    interval_ms: float
    sink_processes: int
    tokenizer: Path
    out: Path


@dataclass(frozen=True)
class Row:
    """One measurement. Times of sending and reading are by the sink's stamps against the client's notes,
    99th percentiles in ms, None where a client keeps none; CPU seconds from the first arrival until
    the last answer; memory is PSS of all its processes; busy: CPU time over wall time."""

    client: str
    rate: float
    seconds: float
    seed: int
    tokens: int
    problem: str = ""
    delivers: bool = False
    whole: int = 0
    arrivals: Arrivals | None = None
    send_lag_ms: float | None = None
    read_lag_ms: float | None = None
    last_lag_ms: float | None = None
    one_for_one: bool | None = None
    tokens_per_s: float = 0.0
    cpu_s_per_million: float = 0.0
    busy: float = 0.0
    peak_mb: float = 0.0
    memory_mb: tuple[float, float] = (0.0, 0.0)
    """In the first and the last quarter of the load."""
    start_s: float = 0.0
    sink_busy: float = 0.0
    sink_late_ms: float = 0.0
    sink_cpu_s_per_million: float = 0.0
    open_most: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sink_keeps_up(self) -> bool:
        return self.sink_late_ms < FEW_MS


@dataclass(frozen=True)
class Offered:
    """One load that was offered, and what went wrong, if anything."""

    load: Load
    sink: Sink
    watch: Watch
    begun_ns: int
    problem: str


def measure(
    bench: Bench, client: Client, rate: float, seconds: float, seed: int, tokens: int
) -> Row:
    """One row. Raises CannotRun where the client cannot be installed."""
    asked = (client.name, rate, seconds, seed, tokens)
    came = offer(bench, client, rate, seconds, seed, tokens)
    if not len(came.sink.records):
        return Row(*asked, problem=came.problem or "no request came")
    return row(asked, client, came)


def offer(
    bench: Bench,
    client: Client,
    rate: float,
    seconds: float,
    seed: int,
    tokens: int,
    streams: int = 1,
) -> Offered:
    """Start a sink and the client, wait for the client's end, and read the sink's records.

    Raises CannotRun where the client cannot be installed.
    """
    where = client.installed()
    folder = bench.out / f"{client.name}-{rate:g}".replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    environ = os.environ | OFFLINE | client.environ
    environ["PATH"] = f"{where.commands}:{environ['PATH']}"
    if where.python_path is not None:
        environ["PYTHONPATH"] = str(where.python_path)
    cores = None if bench.client_cores is None else bench.client_cores[: client.cores]
    file, sinks = folder / "sink.bin", (bench.interval_ms, bench.sink_cores, bench.sink_processes)
    with recording(bench.program, file, *sinks) as sink:
        load = Load(sink.url, rate, seconds, seed, tokens, folder, bench.tokenizer, streams)
        load.records.unlink(missing_ok=True)
        words = pinned(argv(client, load), cores)
        begun_ns = time.monotonic_ns()
        limit_s = START_LIMIT_S + SLOWER_THAN_ASKED * seconds
        problem, watch = run(words, environ, folder / "log.txt", limit_s)
    return Offered(load, sink, watch, begun_ns, problem)


def run(
    words: Sequence[str], environ: dict[str, str], log: Path, limit_s: float
) -> tuple[str, Watch]:
    """What went wrong, or nothing, and what was seen of its processes."""
    with log.open("w") as output:
        started = subprocess.Popen(
            words, env=environ, stdout=output, stderr=output, start_new_session=True
        )
        watch = Watch(started.pid)
        thread = watch.begin()
        try:
            status = started.wait(limit_s)
            problem = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"not through after {limit_s:.0f} s"
        finally:
            # Whatever it started belongs to its session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            watch.end()
            thread.join()
    if problem:
        problem += ": " + " / ".join(log.read_text().splitlines()[-LOG_LINES:])[-300:]
    return problem, watch


def row(asked: tuple[str, float, float, int, int], client: Client, came: Offered) -> Row:
    load, sink, watch = came.load, came.sink, came.watch
    records = sink.records
    first_ns, done_ns = int(records["arrival_ns"][0]), int(records["done_ns"].max())
    span_s = max(done_ns - first_ns, 1) / 1e9
    sent_tokens = max(int(records["sent_tokens"].sum()), 1)
    cpu_s = watch.between(first_ns, done_ns)
    found = arrivals((records["arrival_ns"] - first_ns) / 1e9, load.rate)
    noted = read_noted(load.records) if client.exact else None
    share, wanted = found.share, load.count
    whole = int((records["sent_tokens"] == load.tokens).sum())
    lags: Lags | None = None
    if noted is not None:
        share, wanted, lags = achieved(records, noted), len(noted), lags_of(records, noted)
    delivered = share * min(whole / max(wanted, 1), 1.0)
    return Row(
        *asked,
        problem=came.problem,
        delivers=not came.problem and delivers(delivered, found.count, client.exact),
        whole=whole,
        arrivals=found,
        send_lag_ms=lags and lags.send_p99_ms,
        read_lag_ms=lags and lags.read_p99_ms,
        last_lag_ms=lags and lags.last_ms,
        one_for_one=None if noted is None else lags is not None,
        tokens_per_s=sent_tokens / span_s,
        cpu_s_per_million=cpu_s / sent_tokens * 1e6,
        busy=cpu_s / span_s,
        peak_mb=max(watch.memory_bytes, default=0) / 1e6,
        memory_mb=watch.levels_mb(first_ns, done_ns),
        start_s=(first_ns - came.begun_ns) / 1e9,
        sink_busy=sink.cpu_s / span_s / len(sink.said),
        sink_late_ms=sink.late_p99_ms,
        sink_cpu_s_per_million=sink.cpu_s / sent_tokens * 1e6,
        open_most=int(sum(one["open_most"] for one in sink.said)),
    )


def read_noted(path: Path) -> NDArray[np.void]:
    """What the client noted, in order of the requests' numbers."""
    noted = np.fromfile(path, NOTED) if path.exists() else np.zeros(0, NOTED)
    return noted[np.argsort(noted["number"], kind="stable")]


def achieved(records: NDArray[np.void], noted: NDArray[np.void]) -> float:
    """The drawn schedule's length over the time that it took: to the last arrival, or by how much longer
    the last answer was read than written, whichever is later."""
    if len(noted) < 2 or not noted["done_ns"].all():
        return 0.0
    first_ns, last_ns = int(noted["due_ns"].min()), int(noted["due_ns"].max())
    sent_late_ns = int(records["arrival_ns"].max()) - last_ns
    read_late_ns = int(noted["done_ns"].max()) - int(records["done_ns"].max())
    return (last_ns - first_ns) / (last_ns - first_ns + max(sent_late_ns, read_late_ns, 0))


@dataclass(frozen=True)
class Lags:
    """99th percentiles of the time from a request's instant to its arrival, and from the sink's last
    write to the client's last read; and the first of these of the last request; ms."""

    send_p99_ms: float
    read_p99_ms: float
    last_ms: float


def lags_of(records: NDArray[np.void], noted: NDArray[np.void]) -> Lags | None:
    """None where the arrivals are not those of the schedule, each once."""
    if not len(noted) or not np.array_equal(np.sort(records["number"]), noted["number"]):
        return None
    came = records[np.argsort(records["number"], kind="stable")]
    send_ms = (came["arrival_ns"] - noted["due_ns"]) / 1e6
    read_ms = (noted["done_ns"] - came["done_ns"])[noted["done_ns"] > 0] / 1e6
    return Lags(
        send_p99_ms=float(np.quantile(send_ms, 0.99)),
        read_p99_ms=float(np.quantile(read_ms, 0.99)) if len(read_ms) else np.inf,
        last_ms=float(send_ms[np.argmax(noted["due_ns"])]),
    )
