"""Laws of lengths read from files: public trace formats, marginals, and the law that ships."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
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
    """Azure LLM inference trace 2023: columns ``ContextTokens`` and ``GeneratedTokens``."""
    return _read(path, lambda p: _csv_rows(p, "ContextTokens", "GeneratedTokens"))


def read_burstgpt(path: Path) -> Workload:
    """BurstGPT: columns ``Request tokens`` and ``Response tokens``, wherever they stand.

    A request without response tokens is a failure of the service: it is left out, and the law's
    notes say how many were.
    """
    columns = ("Request tokens", "Response tokens")
    return _read(path, lambda p: _csv_rows(p, *columns), without_output="failed")


def read_mooncake(path: Path) -> Workload:
    """Mooncake trace, one JSON object a line: ``input_length`` and ``output_length``.

    The shared prefixes that ``hash_ids`` describes are ignored: only lengths are read.
    """
    return _read(path, lambda p: _json_rows(p, "input_length", "output_length"))


def read_sharegpt(path: Path) -> Workload:
    """ShareGPT lengths of LLMServingSim: columns ``prompt_tokens`` and ``output_tokens``."""
    return _read(path, lambda p: _csv_rows(p, "prompt_tokens", "output_tokens"))


def read_vidur(path: Path) -> Workload:
    """Processed trace of vidur: columns ``num_prefill_tokens`` and ``num_decode_tokens``."""
    return _read(path, lambda p: _csv_rows(p, "num_prefill_tokens", "num_decode_tokens"))


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

Rows = Iterator[tuple[int, object, object]]


def _read(path: Path, rows: Callable[[Path], Rows], without_output: str | None = None) -> Workload:
    """Lengths of all rows; ValueError names file and line of the first that is not a request.

    Rows with an output of zero are left out and counted if ``without_output`` says what they are.
    """
    lengths: list[tuple[int, int]] = []
    left_out = 0
    try:
        for line, prompt, output in rows(path):
            if without_output and str(output).strip() == "0":
                left_out += 1
            else:
                lengths.append((_length(path, line, prompt), _length(path, line, output)))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a trace: {error}") from error
    if not lengths:
        raise ValueError(f"{path}: the trace has no requests")
    notes: tuple[str, ...] = ()
    if left_out:
        total = left_out + len(lengths)
        notes = (
            f"{_name(path)}: {left_out} of {total} requests ({percent(left_out / total)}) "
            f"{without_output} without output and are left out",
        )
    prompts, outputs = np.array(lengths, dtype=np.int64).T
    return pairs(prompts, outputs, name=_name(path), source=path.name, notes=notes)


def _read_marginal(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Lengths and their probabilities; ValueError names file and line of what is not one."""
    values, shares = [], []
    try:
        for line, value, share in _csv_rows(path, 0, "probability"):
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


def _csv_rows(path: Path, first: str | int, second: str) -> Rows:
    """Two columns, by name or, the first, by its place."""
    with _open(path) as lines:
        reader = csv.DictReader(lines)
        fields = list(reader.fieldnames or [])
        if isinstance(first, int):
            first = fields[first] if fields else "of lengths"
        for column in (first, second):
            if column not in fields:
                found = ", ".join(fields)
                raise ValueError(f"{path}, line 1: no column {column!r} among {found}")
        for row in reader:
            yield reader.line_num, row[first], row[second]


def _json_rows(path: Path, prompt: str, output: str) -> Rows:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield number, row[prompt], row[output]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with {prompt} and {output}"
                ) from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
