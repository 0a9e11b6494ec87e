"""The Prometheus text format 0.0.4 from a template: a scrape costs a fraction of a millisecond."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

StateT = TypeVar("StateT")
Labels = dict[str, str]
"""An empty value leaves the label out."""


class Histogram:
    """Counts of observations below each edge, and their sum."""

    __slots__ = ("counts", "edges", "sum")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.sum += value * times


@dataclass(frozen=True, slots=True)
class Family(Generic[StateT]):
    """One metric that is a number, with its label sets and where their values come from."""

    name: str
    kind: str
    help: str
    children: Sequence[tuple[Labels, Callable[[StateT], float]]]


@dataclass(frozen=True, slots=True)
class HistogramFamily:
    """One metric that is a histogram, with its label sets."""

    name: str
    help: str
    children: Sequence[tuple[Labels, Histogram]]


class Page(Generic[StateT]):
    """Renders its families in their order. Counters have the suffix ``_total``."""

    def __init__(
        self,
        families: Sequence[Family[StateT] | HistogramFamily],
        born_s: float | None = None,
    ) -> None:
        """``born_s`` is the wall time shown as the birth of every counter; None shows none."""
        self._values: list[Callable[[StateT], float]] = []
        self._parts: list[str] = []
        self._sources: list[Histogram | None] = []
        self._born = None if born_s is None else repr(born_s)
        for family in families:
            if isinstance(family, HistogramFamily):
                self._add_histograms(family)
            else:
                self._add_numbers(family)
        self._template = "".join(self._parts)

    def render(self, state: StateT) -> bytes:
        """The page as bytes."""
        values: list[float] = []
        numbers = iter(self._values)
        for source in self._sources:
            if source is None:
                values.append(float(next(numbers)(state)))
            else:
                values.extend(map(float, accumulate(source.counts)))
                values.append(values[-1])
                values.append(float(source.sum))
        return (self._template % tuple(values)).encode()

    def _add_numbers(self, family: Family[StateT]) -> None:
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        self._parts.append(_head(name, family.kind, family.help))
        for labels, value in family.children:
            self._parts.append(_line(name, labels))
            self._values.append(value)
            self._sources.append(None)
        if family.kind == "counter":
            self._add_births(family.name, family.help, [labels for labels, _ in family.children])

    def _add_histograms(self, family: HistogramFamily) -> None:
        name = family.name
        self._parts.append(_head(name, "histogram", family.help))
        for labels, histogram in family.children:
            edges = [*map(_edge, histogram.edges), "+Inf"]
            self._parts += [_line(f"{name}_bucket", labels | {"le": edge}) for edge in edges]
            self._parts += [_line(f"{name}_count", labels), _line(f"{name}_sum", labels)]
            self._sources.append(histogram)
        self._add_births(name, family.help, [labels for labels, _ in family.children])

    def _add_births(self, name: str, text: str, children: list[Labels]) -> None:
        if self._born is not None:
            self._parts.append(_head(f"{name}_created", "gauge", text))
            self._parts += [_line(f"{name}_created", labels, self._born) for labels in children]


def _edge(edge: float) -> str:
    """As prometheus_client writes it: from 1e6 on with an exponent."""
    whole, _, rest = repr(float(edge)).partition(".")
    if len(whole) < 7:
        return f"{whole}.{rest}"
    digits = f"{whole[0]}.{whole[1:]}{rest}".rstrip("0").rstrip(".")
    return f"{digits}e+{len(whole) - 1:02}"


def _line(name: str, labels: Labels, value: str = "%r") -> str:
    """One sample line as a template."""
    inner = ",".join(
        f'{key}="{_escape(label)}"' for key, label in sorted(labels.items()) if label != ""
    )
    return f"{name}{{{inner}}} {value}\n"


def _escape(value: str) -> str:
    value = value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    return value.replace("%", "%%")


def _head(name: str, kind: str, text: str) -> str:
    text = text.replace("%", "%%")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
