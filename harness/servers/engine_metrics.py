"""Reads an engine's metrics page; knows of the engine only what its `EngineFacts` say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache

from analysis.schedulers.engine import EngineSample
from harness.servers.engines import EngineFacts, Metric, MissingMetric

Series = list[tuple[dict[str, str], float]]
"""All label sets of one metric with their values."""

_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_UNESCAPED = {"n": "\n"}


@lru_cache(maxsize=32)
def _line_pattern(wanted: frozenset[str]) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in sorted(wanted, reverse=True))
    # Starting from the line break is nine times as fast as `^` in multiline mode.
    return re.compile(rf"\n({names})(\{{.*\}})?[ \t]+(\S+)")


def parse_metrics(text: str, wanted: frozenset[str]) -> dict[str, Series]:
    """The samples of the ``wanted`` names in a Prometheus text, labels kept, the rest unread.

    A name that does not occur is not in the result. Raises ValueError when the value of a wanted
    sample is no number.
    """
    found: dict[str, Series] = {}
    for name, labels, value in _line_pattern(wanted).findall(f"\n{text}"):
        pairs = {
            key: _ESCAPE.sub(lambda m: _UNESCAPED.get(m[1], m[1]), raw)
            for key, raw in _LABEL.findall(labels)
        }
        found.setdefault(name, []).append((pairs, float(value)))
    return found


@lru_cache(maxsize=8)
def _wanted(names: tuple[tuple[str, ...], ...]) -> frozenset[str]:
    return frozenset(name for aliases in names for name in aliases)


def engine_sample(
    text: str, read_ns: int, t_ns: int, facts: EngineFacts, version: str | None = None
) -> EngineSample:
    """Gauges and counters of the engine in one scrape.

    Counts are summed over label sets, KV usage is their plain mean: with several data-parallel
    ranks the sample describes all of them as one server. ``finished`` counts every
    reason. A quantity that the engine does not have is 0. Raises MissingMetric.
    """
    found = parse_metrics(text, _wanted(tuple(m.all_names for m in facts.metrics.values())))

    def value(quantity: str) -> float:
        total = math.fsum(
            _value(metric, found, lambda: MissingMetric(quantity, facts, version))
            for metric in facts.metrics[quantity].parts
        )
        if not math.isfinite(total):
            raise MissingMetric(quantity, facts, version)
        return total

    def count(quantity: str) -> int:
        return round(value(quantity)) if quantity in facts.metrics else 0

    return EngineSample(
        read_ns=read_ns,
        t_ns=t_ns,
        waiting=count("waiting"),
        running=count("running"),
        kv_usage=value("kv_usage"),
        preemptions=count("preemptions"),
        prompt_tokens=count("prompt_tokens"),
        generation_tokens=count("generation_tokens"),
        steps=count("steps"),
        step_tokens=count("step_tokens"),
        finished=count("finished"),
        rejected=count("rejected"),
        prefix_hit_tokens=count("prefix_hits"),
        new_token_ratio=value("new_token_ratio") if "new_token_ratio" in facts.metrics else None,
        overrun_steps=count("overrun_steps"),
    )


def _value(metric: Metric, found: dict[str, Series], missing: Callable[[], Exception]) -> float:
    series = next((found[name] for name in metric.names if name in found), None)
    values = [] if series is None else [v for labels, v in series if metric.wants(labels)]
    if not values and metric.required:
        raise missing()
    total = math.fsum(values)
    return total / len(values) if values and metric.combine == "mean" else total
