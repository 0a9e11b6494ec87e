"""A calibration in words, from its record: the same lines for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, grouped, percent, plain, value_text
from analysis.numbers.lack_of_fit import FALSE_ALARM
from analysis.numbers.quantiles import normal_quantile, student_quantile

POOL_TOLERANCE = 0.02
"""Shown and implied pool differ where the implied interval stays this far away from what is shown."""
TERMS = (
    ("b0", "b0_s", "s", "per step"),
    ("b1", "b1_s_per_token", "s", "per scheduled token"),
    ("b2", "b2_s_per_kv_token", "s", "per resident KV token"),
    ("b3", "b3_s_per_request", "s", "per running request"),
)
CONDITIONS = (
    (10.0, "the probes tell the four terms well apart"),
    (100.0, "the terms trade off against each other: single terms are less sure than their sum"),
    (float("inf"), "the probes hardly tell the terms apart: only steps like theirs are known"),
)

FURTHEST = 3
"""So many designs are named where the law is not linear."""

Lines = list[tuple[str, str]]
Floats = NDArray[np.float64]


def calibration_lines(record: Mapping[str, Any]) -> Lines:
    """Name and text of everything that a calibration's record says; empty for one without a fit."""
    fit = record.get("fit")
    if not isinstance(fit, Mapping) or "lack_of_fit" not in fit:
        return []
    lines = [("KV pool", pool_text(record))]
    lines += [(name, text) for name, text in _law(fit)]
    lines += [
        ("condition", _condition(float(fit["condition_number"]))),
        ("scatter", _scatter(record)),
    ]
    lines += [("lack of fit", _lack_of_fit(fit["lack_of_fit"]) + _furthest_off(record))]
    lines += [
        (f"check {number}", f"{c['source']}, {c['quantity']}: {c['text']}")
        for number, c in enumerate(record["checks"], 1)
    ]
    if record.get("saturated"):
        lines += [("saturated", saturated_text(record)), ("reach", _outside(record))]
    return lines


def pool_differs(record: Mapping[str, Any]) -> bool:
    """Does the occupancy during the probes contradict the pool that the server shows?"""
    if record["pool_implied"] is None:
        return False
    implied, shown = Estimate.from_dict(record["pool_implied"]), float(record["pool_shown_tokens"])
    return not implied.low <= shown * (1 + POOL_TOLERANCE) or not (
        implied.high >= shown * (1 - POOL_TOLERANCE)
    )


def pool_text(record: Mapping[str, Any]) -> str:
    """The pool that the server shows beside the one that its occupancy implies."""
    shown = f"{grouped(record['pool_shown_tokens'])} tokens shown"
    if record["pool_implied"] is None:
        return f"{shown}; the probes filled too little of it to imply one"
    implied = estimate_text(Estimate.from_dict(record["pool_implied"]))
    text = f"{shown}, {implied} implied by the occupancy during the probes"
    if pool_differs(record):
        text += ": THEY DISAGREE: the server holds another pool than it says, or its gauge is of another"
    return text


def saturated_text(record: Mapping[str, Any]) -> str:
    """The extrapolated step time with its interval and the step that it is for."""
    point = record["saturated"]
    step = estimate_text(Estimate.from_dict(point["step_time_s"]))
    return (
        f"{step} at {point['tokens']:.0f} tokens, {grouped(point['kv_tokens'])} KV tokens and "
        f"{point['running']:.1f} requests per step (claim {point['claim']})"
    )


def standard_errors(fit: Mapping[str, Any]) -> list[float]:
    """Of b0..b3, in seconds per unit, the widening for few degrees of freedom taken out."""
    dof = fit["interval_dof"]
    wider = student_quantile(0.975, dof) / normal_quantile(0.975) if dof else 1.0
    diagonal = np.diag(np.asarray(fit["covariance"], dtype=float)).clip(min=0.0)
    return [float(e) for e in np.sqrt(diagonal) / wider]


def _law(fit: Mapping[str, Any]) -> Lines:
    lines = []
    for (name, key, unit, meaning), error in zip(TERMS, standard_errors(fit), strict=True):
        value = Estimate.normal(float(fit["law"][key]), error, unit, "")
        spread = value_text(Estimate(error, 0.9 * error, 1.1 * error, 0.95, unit, ""))
        lines.append((name, f"{value_text(value)} {meaning}, standard error {spread}"))
    return lines


def _condition(number: float) -> str:
    said = next(text for limit, text in CONDITIONS if number < limit)
    return f"condition number {plain(round(number, 1))}: {said}"


def undisturbed(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The observations that the law is of; older records mark none."""
    return [o for o in record["observations"] if not o.get("disturbed", False)]


def _scatter(record: Mapping[str, Any]) -> str:
    seen = record["observations"]
    designs = len({o["probe"] for o in seen})
    held = len(seen) - len(undisturbed(record))
    text = (
        f"one probe lies {percent(record['fit']['residual_relative'], 2)} about the law; {len(seen)} "
        f"probes of {designs} designs in {record['duration_s']:.0f} s"
    )
    if held:
        share = record["fit"]["disturbed_share"]
        text += (
            f"; {held} of them, far off {'its' if held == 1 else 'their'} repeats, left out of the law: "
            f"{percent(share)} of the probes' time was lost or hidden there, which every interval holds"
        )
    return text


def _lack_of_fit(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "not tested: too few designs, or none repeated"
    p = float(test["p_value"])
    quotient = "without bound" if test["statistic"] is None else f"{test['statistic']:.2f}"
    said = f"p = {p:.2g}, F({test['designs_dof']}, {test['repeats_dof']}) = {quotient}: "
    if p >= FALSE_ALARM:
        return said + "the designs are no further off a linear law than repeating them explains"
    return said + (
        "THE STEP TIME IS NOT LINEAR in tokens, KV and requests; the interval of the saturated step "
        "holds that, and more probes would not make it smaller"
    )


def _furthest_off(record: Mapping[str, Any]) -> str:
    """The designs that the law misses most, where it is not linear; else nothing."""
    test = record["fit"]["lack_of_fit"]
    if test is None or test["p_value"] >= FALSE_ALARM:
        return ""
    seen = undisturbed(record)
    names = sorted({str(o["probe"]) for o in seen})
    _, off, _ = off_by_design(seen, names, record["fit"]["law"])
    furthest = sorted(zip(names, off, strict=True), key=lambda design: -abs(design[1]))[:FURTHEST]
    return "; furthest off the law: " + ", ".join(
        f"{name!r} {100 * share:+.1f} %" for name, share in furthest
    )


def off_by_design(
    seen: Sequence[Mapping[str, Any]], names: list[str], law: Mapping[str, Any]
) -> tuple[Floats, Floats, Floats]:
    """Fitted ms per step, mean relative residual and half its 95 % interval; shape (designs,) each."""
    sums = np.array([[o["steps"], o["tokens"], o["kv_tokens"], o["running"]] for o in seen])
    keys = ("b0_s", "b1_s_per_token", "b2_s_per_kv_token", "b3_s_per_request")
    fitted_s = sums @ np.array([float(law[key]) for key in keys])
    residual = np.array([o["duration_s"] for o in seen]) / fitted_s - 1.0
    owner = np.array([names.index(str(o["probe"])) for o in seen])
    counts = np.bincount(owner)
    off = np.bincount(owner, residual) / counts
    fitted = 1e3 * np.bincount(owner, fitted_s / sums[:, 0]) / counts
    dof = len(seen) - len(names)
    if dof < 1:
        return fitted, off, np.zeros(len(names))
    scatter = np.sqrt(np.sum((residual - off[owner]) ** 2) / dof)
    return fitted, off, student_quantile(0.975, dof) * scatter / np.sqrt(counts)


def _outside(record: Mapping[str, Any]) -> str:
    parts = []
    for key, name in (("tokens", "tokens"), ("kv_tokens", "KV"), ("running", "requests")):
        most = max(o[key] / o["steps"] for o in undisturbed(record))
        parts.append(f"{name} {record['saturated'][key] / most:.2f}")
    slowest = max(o["duration_s"] / o["steps"] for o in undisturbed(record))
    step = float(record["saturated"]["step_time_s"]["value"])
    return (
        f"over the most that a probe held per step: {', '.join(parts)}; over the slowest probe's step "
        f"time: {step / slowest:.2f}"
    )
