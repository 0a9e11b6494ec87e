"""The tables of a report as rows of text, the same for HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.calibration.calibration_lines import TERMS, calibration_lines
from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import (
    NOT_MEASURED,
    estimate_text,
    gap,
    grouped,
    interval_text,
    load_label,
    percent,
    plain,
    seconds,
    value_text,
)
from analysis.verdicts.settling import BOUNDED_BELOW, LINEAR_ABOVE, NEAR, Settling
from analysis.verdicts.verdict import Check, NamedEstimate, RunJudgement, Verdict

NO_GAP = "none"
LONGEST_LIST = 12
LONGEST_TABLE = 40
STEP_TIME_TERMS = (
    ("b0_s", "s", "per step"),
    ("b1_s_per_token", "s/token", "per scheduled token"),
    ("b2_s_per_kv_token", "s/token", "per resident KV token"),
    ("b3_s_per_request", "s/request", "per running request"),
)
TERM_NAMES = tuple(term[0] for term in TERMS)
STATES = {True: "holds", False: "fails", None: "cannot say"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header. A row of one cell is a heading inside the table."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What the numbers are and how they were got."""


def numbers_table(verdict: Verdict) -> Table:
    """Predicted, measured, ratio and GAP: the numbers of the headline with their methods."""
    rows = [
        _named(f"predicted critical rate ({verdict.claim}, {verdict.grade})", verdict.predicted),
        _named("measured critical rate", verdict.measured),
        _named("measured / predicted", verdict.ratio),
    ]
    if verdict.ratio is not None:
        rows.append(
            _named("the same, as the test of equivalence uses it", verdict.ratio.at_level(0.9))
        )
    distance = NOT_MEASURED if verdict.gap is None else percent(verdict.gap)
    rows.append(("GAP", distance, "no interval", "|predicted - measured| / measured"))
    rows.append(
        ("theta", percent(verdict.theta, None), "chosen", "half width of the band of agreement")
    )
    return Table(
        "The numbers of the verdict", ("quantity", "value", "interval", "how"), tuple(rows)
    )


def others_table(verdict: Verdict) -> Table:
    """Every other predictor and estimator of the same rate."""
    measured = verdict.measured.value if verdict.measured is not None else float("nan")
    rows = [_beside("predicted", other, measured) for other in verdict.predictions]
    rows += [_beside("measured", other, float("nan")) for other in verdict.measurements]
    return Table(
        "Other predictors and estimators",
        ("name", "kind", "critical rate", "interval", "GAP", "how"),
        tuple(rows),
        "None of these decides the verdict. GAP is |predicted - measured| / measured.",
    )


RunRow = tuple[str, Callable[[RunJudgement], str]]
RUN_ROWS: tuple[str | RunRow, ...] = (
    "Offered load",
    ("load: rate over predicted critical rate", lambda r: load_label(r.load)),
    ("arrival rate asked", lambda r: plain(r.arrival_rate, "req/s")),
    ("arrival rate realised", lambda r: plain(r.realised_rate, "req/s")),
    ("load fidelity", lambda r: "holds" if r.fidelity.valid else "fails"),
    (
        "send lag p99 / worst",
        lambda r: f"{_ms(r.fidelity.lag_p99_ms)} / {_ms(r.fidelity.lag_max_ms)}",
    ),
    "Growth",
    ("verdict", lambda r: r.text),
    ("drift of N(t)", lambda r: estimate_text(r.drift)),
    ("drift, error by HAC", lambda r: _checked(r, "HAC")),
    ("drift, error of a diffusion", lambda r: _checked(r, "end point")),
    ("stable needs a drift below", lambda r: plain(r.stable_below, "req/s")),
    ("window of the statistics", lambda r: f"{plain(r.warmup_s)} to {plain(r.end_s)} s"),
    "Requests",
    ("arrived", lambda r: grouped(r.requests)),
    ("completed", lambda r: grouped(r.completed)),
    ("unfinished at the end: the queue", lambda r: grouped(r.unfinished)),
    "Engine, means over the window",
    ("running", lambda r: grouped(r.running, 1)),
    ("waiting", lambda r: grouped(r.waiting, 1)),
    ("time with a waiting queue", lambda r: percent(r.backlogged)),
    ("KV cache in use", lambda r: percent(r.kv_usage)),
    ("preemptions", lambda r: grouped(r.preemptions)),
    ("step time", lambda r: estimate_text(r.step_time_s)),
    ("step time that was set", lambda r: "none" if r.pace is None else r.pace.text()),
    "Client side, from the scheduled arrival",
    ("TTFT, median", lambda r: _ttft(r.ttft_p50_s)),
    ("TTFT, 95th percentile", lambda r: _ttft(r.ttft_p95_s)),
)


def runs_table(runs: Sequence[RunJudgement]) -> Table:
    """One column per run."""
    rows: list[tuple[str, ...]] = []
    for entry in RUN_ROWS:
        if isinstance(entry, str):
            rows.append((entry,))
        else:
            name, cell = entry
            rows.append((name, *(cell(run) for run in runs)))
    methods = "; ".join(dict.fromkeys(run.drift.method for run in runs))
    return Table(
        "Runs",
        ("quantity", *(run.id for run in runs)),
        tuple(rows) if runs else (),
        f"Drift: {methods}. A run is stable when the upper 95 % bound of its drift lies below the "
        "stated limit, over the stated window and for no longer."
        if runs
        else "No run was judged.",
    )


def near_critical_table(runs: Sequence[Settling]) -> Table:
    """One row for each run at nearly the critical rate: how its queue grows, and by what."""
    rows = [
        (
            run.run,
            run.answer,
            run.distance_text,
            estimate_text(run.departure),
            f"{grouped(run.queue.begin)}, {grouped(run.queue.end)}, {grouped(run.queue.highest)}",
            grouped(run.wandering),
            run.text,
        )
        for run in runs
    ]
    return Table(
        "At the critical rate",
        (
            "run",
            "answer",
            "offered",
            "d T / sigma √T",
            "waiting: begin, end, most",
            "sigma √T",
            "what it did",
        ),
        tuple(rows),
        f"Runs within {percent(NEAR, None)} of the measured critical rate. d is the offered rate less "
        "the measured one, T the window after the warm-up, sigma² the critical rate times ca² + cd². "
        f"The interval of d T / sigma √T decides: bounded below {BOUNDED_BELOW:.2f} (five relaxation "
        f"times), as at critical within ±{LINEAR_ABOVE:.0f}, growing like t above; a queue that this "
        "makes in less than 1 of 100 runs is no answer.",
    )


def fidelity_table(runs: Sequence[RunJudgement]) -> Table:
    """Every check of the offered load, run by run."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        rows.append((run.id,))
        rows += [
            (c.name, STATES[c.passed], plain(c.statistic), plain(c.threshold), c.meaning)
            for c in run.fidelity.checks
        ]
    header = ("check", "answer", "statistic", "threshold", "meaning")
    return Table("Did we offer what we claim?", header, tuple(rows))


def assumed_table(verdict: Verdict) -> Table:
    """What the prediction assumed beside what the runs showed."""
    agrees = {True: "agrees", False: "differs", None: "cannot say"}
    rows = tuple((r.quantity, r.assumed, r.observed, agrees[r.agrees]) for r in verdict.table)
    return Table("Assumed and observed", ("quantity", "assumed", "observed", "agreement"), rows)


def checks_table(title: str, checks: Sequence[Check], note: str) -> Table:
    """Premises or audits with the figures that decide them."""
    rows = tuple(
        (c.name, STATES[c.holds], plain(c.observed), plain(c.threshold), c.text) for c in checks
    )
    return Table(
        title, ("name", "answer", "observed", "threshold", "what was compared"), rows, note
    )


def from_paper_table(verdict: Verdict) -> Table:
    """The factors whose product is measured over the paper's rate."""
    rows = tuple(
        (f.name, value_text(f.estimate), interval_text(f.estimate), f.note)
        for f in verdict.from_paper
    )
    note = (
        "The paper's rate times these factors is the measured rate. Each mechanism is what the engine "
        "model predicts for it, in this order; the last row is what they leave."
    )
    return Table("From the paper's rate", ("mechanism", "factor", "interval", "how"), rows, note)


def identity_table(verdict: Verdict) -> Table:
    """The factors whose product is measured over predicted."""
    rows = tuple(
        (f.name, value_text(f.estimate), interval_text(f.estimate), f.note or f.estimate.method)
        for f in verdict.identity
    )
    note = (
        "Measured over M / (b E[g]) = occupancy x predicted over observed step time x work not wasted. "
        "This is bookkeeping, close to an identity: it shows where a difference comes from and "
        "never decides the verdict."
    )
    return Table("Where the ratio comes from", ("factor", "value", "interval", "how"), rows, note)


def _ttft(value_s: float) -> str:
    """A quantile of the time to first token; requests without one count as later than any."""
    return "not within the run" if math.isinf(value_s) else seconds(value_s)


def record_tables(title: str, record: Mapping[str, Any], note: str = "") -> list[Table]:
    """A nested record: one line per leaf, named by its path, and a table per list of records."""
    leaves = _leaves("", record)
    rows = tuple((name, leaf_text(v)) for name, v in leaves if not _is_list_of_records(v))
    tables = [Table(title, ("item", "value"), rows, note)] if rows or not leaves else []
    tables += [_list_table(f"{title}: {name}", v) for name, v in leaves if _is_list_of_records(v)]
    return tables


def step_time_table(calibration: Mapping[str, Any]) -> Table | None:
    """Coefficients of a fitted step-time law with their errors; None if the record has no fit."""
    fit = calibration.get("fit")
    if not isinstance(fit, Mapping) or not {"law", "covariance", "method"} <= set(fit):
        return None
    rows = []
    for i, (name, unit, meaning) in enumerate(STEP_TIME_TERMS):
        error = math.sqrt(max(float(fit["covariance"][i][i]), 0.0))
        value = Estimate.normal(float(fit["law"][name]), error, unit, fit["method"])
        rows.append((f"b{i}, {meaning}", value_text(value), interval_text(value), value.method))
    note = "Seconds per step = b0 + b1 x tokens + b2 x resident KV tokens + b3 x running requests."
    return Table("Step-time law", ("term", "value", "interval", "how"), tuple(rows), note)


def trust_tables(calibration: Mapping[str, Any]) -> list[Table]:
    """The pool, the tests of the law and the engine's own word; none for a record without them."""
    lines = tuple(line for line in calibration_lines(calibration) if line[0] not in TERM_NAMES)
    note = "Before any load; a check is engine over client, with each design of probe kept apart."
    return [Table("How far the calibration holds", ("what", "says"), lines, note)] if lines else []


def leaf_text(value: Any) -> str:
    """One value of a record in words; a long list is cut and says by how much."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Estimate):
        return f"{estimate_text(value)}; {value.method}"
    if isinstance(value, Mapping):
        if _is_estimate(value):
            return leaf_text(Estimate.from_dict(dict(value)))
        return ", ".join(f"{k} {leaf_text(v)}" for k, v in value.items()) or "none"
    if isinstance(value, int | float):
        return plain(float(value))
    if isinstance(value, list | tuple):
        nested = any(isinstance(v, list | tuple) for v in value)
        texts = [f"[{leaf_text(v)}]" if nested else leaf_text(v) for v in value[:LONGEST_LIST]]
        rest = len(value) - LONGEST_LIST
        return ", ".join(texts) + (f", and {rest} more" if rest > 0 else "") or "none"
    return str(value)


def _leaves(prefix: str, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in record.items():
        if isinstance(value, Mapping) and value and not _is_estimate(value):
            leaves.extend(_leaves(f"{prefix}{key}.", value))
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _is_list_of_records(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(v, Mapping) and v and set(v) == set(value[0]) for v in value)
    )


def _checked(run: RunJudgement, name: str) -> str:
    return estimate_text(next((c.estimate for c in run.drift_checks if c.name == name), None))


def _list_table(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    header = tuple(str(key) for key in records[0])
    rows = tuple(tuple(leaf_text(r[key]) for key in records[0]) for r in records[:LONGEST_TABLE])
    rest = len(records) - LONGEST_TABLE
    note = f"The first {LONGEST_TABLE} of {len(records)} rows." if rest > 0 else ""
    return Table(title, header, rows, note)


def _is_estimate(value: Mapping[str, Any]) -> bool:
    return set(value) == {"value", "low", "high", "level", "unit", "method"}


def _named(name: str, estimate: Estimate | None) -> tuple[str, ...]:
    if estimate is None:
        return (name, NOT_MEASURED, "no interval", "see the reasons")
    return (name, value_text(estimate), interval_text(estimate), estimate.method)


def _beside(kind: str, other: NamedEstimate, measured: float) -> tuple[str, ...]:
    estimate = other.estimate
    distance = gap(estimate.value, measured)
    return (
        other.name,
        kind,
        value_text(estimate),
        interval_text(estimate),
        NO_GAP if math.isnan(distance) else percent(distance),
        "; ".join(part for part in (estimate.method, other.note) if part),
    )


def _ms(value_ms: float) -> str:
    return seconds(value_ms / 1e3)
