"""The recording server of the bench: compiled on first use, started for one load, read at its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SOURCE = Path(__file__).resolve().parents[1] / "loadgen_sink.c"
STOP_S = 20.0
RECORD = np.dtype(
    [
        ("arrival_ns", "<i8"),
        ("done_ns", "<i8"),
        ("number", "<i8"),
        ("max_tokens", "<i4"),
        ("sent_tokens", "<i4"),
    ]
)


class NoCompiler(RuntimeError):
    """The sink cannot be compiled; the message says what to do."""


@dataclass(slots=True)
class Sink:
    """One sink. Once it has ended: ``records`` in order of arrival, and what it says of itself, of each
    of its processes; ``cpu_s`` until then is that of starting."""

    url: str
    pids: tuple[int, ...]
    records: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, RECORD))
    said: tuple[dict[str, float], ...] = ()

    @property
    def cpu_s(self) -> float:
        return sum(one["cpu_s"] for one in self.said)

    @property
    def late_p99_ms(self) -> float:
        """99th percentile of how late it wrote its events, of its worst process."""
        return max(one["late_p99_us"] for one in self.said) / 1e3


def compiled(folder: Path) -> Path:
    """The sink's program in ``folder``, compiled now if that was not yet done. Raises NoCompiler."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    program = folder / f"loadgen_sink-{digest}"
    if program.exists():
        return program
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoCompiler("the sink is written in C and there is no `cc` here: install gcc or clang")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [compiler, "-O2", "-o", fresh, SOURCE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NoCompiler(f"{compiler} could not compile {SOURCE}:\n{done.stderr}")
    fresh.replace(program)
    return program


@contextlib.contextmanager
def recording(
    program: Path,
    out: Path,
    interval_ms: float,
    cores: Sequence[int] | None = None,
    processes: int = 1,
) -> Iterator[Sink]:
    """A sink that writes ``interval_ms`` apart, on these cores; its records are there afterwards."""
    argv = [program, "--interval-ms", f"{interval_ms}", "--processes", f"{processes}", "--out", out]
    server = subprocess.Popen(pinned(argv, cores), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        first = server.stdout.readline()
        if not first.startswith("listening on "):
            raise RuntimeError(f"the sink did not start: {first!r}")
        sink = Sink(first.split()[-1], (server.pid,))
        yield sink
    finally:
        server.terminate()
        said, _ = server.communicate(timeout=STOP_S)
    files = [out] if processes == 1 else [Path(f"{out}.{i}") for i in range(processes)]
    records = np.concatenate([np.fromfile(file, RECORD) for file in files])
    sink.records = records[np.argsort(records["arrival_ns"], kind="stable")]
    sink.said = tuple(json.loads(line) for line in said.splitlines())


def pinned(argv: Sequence[object], cores: Sequence[int] | None) -> list[str]:
    """The command on these cores only; None: wherever the system puts it."""
    words = [str(word) for word in argv]
    if not cores:
        return words
    return ["taskset", "-c", ",".join(map(str, cores)), *words]
