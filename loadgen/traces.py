"""Laws of lengths read from files: public trace formats, marginals, and the law that ships."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from loadgen.length_laws import marginals
from loadgen.workload import Workload, pairs, percent

SHIPPED = {
    "azure_2023_conv": "Microsoft Azure Public Dataset, AzureLLMInferenceTrace_conv, 2023, CC-BY-4.0 "
    "(Patel et al., Splitwise, ISCA 2024), in joint bins",
}
"""Laws that come with the package, by name, and where they come from."""


def read_azure(path: Path) -> Workload:
    """Azure LLM inference traces 2023 and 2024: ``ContextTokens`` and ``GeneratedTokens``."""
    return _law(path, "azure")


def read_burstgpt(path: Path) -> Workload:
    """BurstGPT: columns ``Request tokens`` and ``Response tokens``, wherever they stand.

    A request without response tokens is a failure of the service: it is left out, and the law's
    notes say how many were.
    """
    return _law(path, "burstgpt")


def read_mooncake(path: Path) -> Workload:
    """Mooncake trace, one JSON object a line: ``input_length`` and ``output_length``.

    The shared prefixes that ``hash_ids`` describes are ignored: only lengths are read.
    """
    return _law(path, "mooncake")


def read_servegen(path: Path) -> Workload:
    """A workload that ServeGen generated and saved: ``input_tokens`` and ``output_tokens``."""
    return _law(path, "servegen")


def read_sharegpt(path: Path) -> Workload:
    """ShareGPT lengths of LLMServingSim: columns ``prompt_tokens`` and ``output_tokens``."""
    return _law(path, "sharegpt")


def read_vidur(path: Path) -> Workload:
    """Processed trace of vidur: columns ``num_prefill_tokens`` and ``num_decode_tokens``."""
    return _law(path, "vidur")


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests as a trace has them, in its order: arrays of shape (n,)."""

    instants_ns: NDArray[np.int64] | None
    """From the first of them on, where they were asked for; traces are not always in order of time."""
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    left_out: int
    """Requests that failed, of formats that have such."""


def read_requests(path: Path, format: str, instants: bool = True) -> Requests:
    """What a trace of one of the formats holds, with its ``instants`` or without.

    Raises ValueError that names file and line of the first row that is not a request, and for instants
    of a format that has none.
    """
    law = FORMATS[format]
    if instants and law.time is None:
        raise ValueError(
            f"{path}: traces of the format {format} have no instants: replay one of "
            + ", ".join(name for name, other in FORMATS.items() if other.time)
        )
    columns = (law.prompt, law.output, *([law.time] if instants and law.time else []))
    rows = (_json_rows if law.json else _csv_rows)(path, *columns)
    lengths: list[tuple[int, int]] = []
    times: list[int] = []
    left_out = 0
    try:
        for line, (prompt, output, *time) in rows:
            if law.without_output and str(output).strip() == "0":
                left_out += 1
                continue
            lengths.append((_length(path, line, prompt), _length(path, line, output)))
            times += [_instant(path, line, text, law.to_ns) for text in time]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a trace: {error}") from error
    if not lengths:
        raise ValueError(f"{path}: the trace has no requests")
    prompts, outputs = np.array(lengths, dtype=np.int64).T
    instants_ns = np.array(times, dtype=np.int64) if times else None
    if instants_ns is not None:
        instants_ns -= instants_ns.min()
    return Requests(instants_ns, prompts, outputs, left_out)


def read_marginals(prompt: Path, output: Path) -> Workload:
    """Two marginal laws, prompt and output taken as independent: `loadgen.length_laws.marginals`.

    Each file has a line for each length, under two columns of which the second is ``probability``.
    """
    return marginals(
        _read_marginal(prompt),
        _read_marginal(output),
        name=f"{_name(prompt)} x {_name(output)}",
        source=f"{prompt.name} and {output.name}",
    )


def shipped(name: str) -> Workload:
    """The law of this name that comes with the package, one of `SHIPPED`.

    Each of its points stands for the requests of one joint bin: their mean lengths and how many
    they are, so that sampling errors are those of the whole trace. Raises ValueError for another name.
    """
    if name not in SHIPPED:
        raise ValueError(f"no law {name!r} comes with the package, only {', '.join(SHIPPED)}")
    text = (files("loadgen") / "data" / f"{name}.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    table = np.array([[int(value) for value in row.values()] for row in rows])
    prompt, output, count = table.T
    note = f"{name}: {count.sum()} requests in {len(count)} joint bins"
    return pairs(prompt, output, name=name, source=SHIPPED[name], count=count, notes=(note,))


# -- files ---------------------------------------------------------------------------------------


def _seconds_ns(text: str) -> int:
    return round(float(text) * 1e9)


def _milliseconds_ns(text: str) -> int:
    return round(float(text) * 1e6)


def _stamp_ns(text: str) -> int:
    """``2023-11-16 18:15:46.6805900``, with any number of digits and with or without a zone."""
    whole, _, rest = text.strip().partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    moment = datetime.fromisoformat(whole + rest[len(digits) :])
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1_000_000_000 + int(digits[:9].ljust(9, "0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """Names of the columns, and the unit of the instants."""

    prompt: str
    output: str
    time: str | None = None
    to_ns: Callable[[str], int] = _seconds_ns
    json: bool = False
    without_output: str = ""
    """What requests with an output of zero did: they are left out and counted."""


FORMATS = {
    "azure": _Format(
        time="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens", to_ns=_stamp_ns
    ),
    "burstgpt": _Format(
        time="Timestamp",
        prompt="Request tokens",
        output="Response tokens",
        without_output="failed",
    ),
    "mooncake": _Format(
        time="timestamp",
        prompt="input_length",
        output="output_length",
        to_ns=_milliseconds_ns,
        json=True,
    ),
    "servegen": _Format(time="timestamp", prompt="input_tokens", output="output_tokens"),
    "sharegpt": _Format(time="arrival_s", prompt="prompt_tokens", output="output_tokens"),
    "vidur": _Format(prompt="num_prefill_tokens", output="num_decode_tokens"),
}

Rows = Iterator[tuple[int, tuple[object, ...]]]


def _law(path: Path, format: str) -> Workload:
    """The law of all rows, in their order."""
    found = read_requests(path, format, instants=False)
    notes: tuple[str, ...] = ()
    if found.left_out:
        total = found.left_out + len(found.prompt_tokens)
        notes = (
            f"{_name(path)}: {found.left_out} of {total} requests ({percent(found.left_out / total)}) "
            f"{FORMATS[format].without_output} without output and are left out",
        )
    return pairs(
        found.prompt_tokens,
        found.output_tokens,
        name=_name(path),
        source=path.name,
        notes=notes,
    )


def _read_marginal(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Lengths and their probabilities; ValueError names file and line of what is not one."""
    values, shares = [], []
    try:
        for line, (value, share) in _csv_rows(path, 0, "probability"):
            values.append(_length(path, line, value))
            try:
                shares.append(float(str(share)))
            except ValueError:
                shares.append(-1.0)
            if not 0 <= shares[-1] <= 1:
                raise ValueError(f"{path}, line {line}: {share!r} is no probability")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a law of lengths: {error}") from error
    return np.array(values, dtype=np.int64), np.array(shares)


def _name(path: Path) -> str:
    return path.name.split(".")[0]


def _length(path: Path, line: int, text: object) -> int:
    try:
        value = int(str(text))
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{path}, line {line}: a length must be a positive integer, got {text!r}")
    return value


def _instant(path: Path, line: int, text: object, to_ns: Callable[[str], int]) -> int:
    try:
        return to_ns(str(text))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}, line {line}: {text!r} is no instant") from error


def _csv_rows(path: Path, *columns: str | int) -> Rows:
    """Some columns, by name or by place."""
    with _open(path) as lines:
        reader = csv.DictReader(lines)
        fields = list(reader.fieldnames or [])
        names = [
            column if isinstance(column, str) else fields[column] if fields else "of lengths"
            for column in columns
        ]
        for name in names:
            if name not in fields:
                found = ", ".join(fields)
                raise ValueError(f"{path}, line 1: no column {name!r} among {found}")
        for row in reader:
            yield reader.line_num, tuple(row[name] for name in names)


def _json_rows(path: Path, *keys: str) -> Rows:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield number, tuple(row[key] for key in keys)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                wanted = " and ".join(keys)
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with {wanted}"
                ) from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
