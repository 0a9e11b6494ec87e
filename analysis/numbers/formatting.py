"""Numbers as a reader sees them: digits follow the interval, a missing number is said in words."""

from __future__ import annotations

import math
import re

from analysis.numbers.estimate import Estimate

NOT_MEASURED = "not measured"
NO_BREAK = "\N{NO-BREAK SPACE}"
USUAL_LEVEL = 0.95
_SI_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def grouped(value: float, decimals: int = 0) -> str:
    """Fixed-point with thousands set apart by a space, such as "41 408" or "0.30"."""
    if math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if abs(value) < 0.5 * 10.0**-decimals:
        value = 0.0
    return f"{value:,.{decimals}f}".replace(",", " ")


def decimals_for(half_width: float) -> int:
    """Decimals at which rounding moves an end by at most a tenth of the half width."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 3
    exponent = math.floor(math.log10(half_width))
    leading = half_width / 10.0**exponent
    return min(max(-exponent + (round(leading, 6) < 5.0), 0), 9)


def plain(value: float, unit: str = "") -> str:
    """A number that has no interval: integers in full, others to four significant digits."""
    if not math.isfinite(value):
        return grouped(value)
    if value == round(value):
        text = grouped(value)
    elif abs(value) < 1e-4:
        text = f"{value:.3g}"
    else:
        decimals = max(3 - math.floor(math.log10(abs(value))), 0)
        text = grouped(value, decimals)
        text = text.rstrip("0").rstrip(".") if decimals else text
    return f"{text} {unit}".rstrip()


def percent(share: float, decimals: int | None = 1) -> str:
    """A share of 1 as per cent; ``decimals=None`` shows no more digits than a chosen number has."""
    if math.isnan(share):
        return NOT_MEASURED
    text = plain(100 * share) if decimals is None else grouped(100 * share, decimals)
    return f"{text} %"


def seconds(value_s: float) -> str:
    """A duration to three significant digits, in the unit that suits it."""
    if not math.isfinite(value_s) or value_s == 0:
        return f"{grouped(value_s)} s" if value_s == 0 else grouped(value_s)
    factor, unit = _si(value_s)
    scaled = value_s / factor
    digits = max(2 - math.floor(math.log10(abs(scaled))), 0)
    return f"{grouped(scaled, digits)} {unit}"


def readable(estimate: Estimate) -> Estimate:
    """The estimate in ms, µs or ns where its unit is seconds (per something) and it is small."""
    if estimate.unit == "s" or estimate.unit.startswith("s/"):
        size = max(abs(estimate.value), estimate.half_width)
        factor, unit = _si(size)
        if factor != 1.0:
            return estimate.scaled(1 / factor, unit + estimate.unit[1:])
    return estimate


def value_text(estimate: Estimate) -> str:
    """Value and unit without the interval, to the digits that the interval allows."""
    if math.isnan(estimate.value):
        return NOT_MEASURED
    estimate = readable(estimate)
    if estimate.level == 1.0 or not math.isfinite(estimate.half_width) or not estimate.half_width:
        return plain(estimate.value, estimate.unit)
    text = grouped(estimate.value, decimals_for(estimate.half_width))
    return f"{text} {estimate.unit}".rstrip()


def interval_text(estimate: Estimate) -> str:
    """The interval alone: "[1.57, 1.67]", with its level where that is not 95 %."""
    if math.isnan(estimate.value) or math.isnan(estimate.low) or math.isnan(estimate.high):
        return "no interval"
    if estimate.level == 1.0:
        return "exact"
    estimate = readable(estimate)
    decimals = decimals_for(estimate.half_width)
    level = "" if estimate.level == USUAL_LEVEL else f" at {percent(estimate.level, None)}"
    return f"[{grouped(estimate.low, decimals)}, {grouped(estimate.high, decimals)}]{level}"


def estimate_text(estimate: Estimate | None) -> str:
    """Value, unit and interval, such as "1.62 req/s [1.57, 1.67]"; exact numbers say so."""
    if estimate is None or math.isnan(estimate.value):
        return NOT_MEASURED
    if estimate.level == 1.0:
        return f"{value_text(estimate)} (exact)"
    return f"{value_text(estimate)} {interval_text(estimate)}"


def plus_minus(estimate: Estimate) -> str:
    """Value +- half width where the interval is symmetric, else as `estimate_text`.

    A level other than the usual one is named.
    """
    above, below = estimate.high - estimate.value, estimate.value - estimate.low
    symmetric = math.isfinite(above) and math.isclose(above, below, rel_tol=0.05, abs_tol=1e-12)
    if not symmetric:
        return estimate_text(estimate)
    level = "" if estimate.level == USUAL_LEVEL else f" ({percent(estimate.level, 0)})"
    estimate = readable(estimate)
    decimals = decimals_for(estimate.half_width)
    spread = grouped(estimate.half_width, decimals)
    return f"{grouped(estimate.value, decimals)} +- {spread} {estimate.unit}".rstrip() + level


def glued(text: str) -> str:
    """The text with no-break spaces inside numbers and intervals, for a page that wraps lines."""
    inside = re.sub(r"\[[^\]]{0,40}\]", lambda found: found[0].replace(" ", NO_BREAK), text)
    return re.sub(r"(?<=\d) (?=\d{3}(?!\d)|%)", NO_BREAK, inside)


def gap(predicted: float, measured: float) -> float:
    """The paper's GAP, |predicted - measured| / measured; NaN without a positive measurement."""
    return abs(predicted - measured) / measured if measured > 0 else math.nan


def load_label(load: float) -> str:
    """Offered rate over predicted critical rate, two decimals."""
    return grouped(load, 2)


def words(identifier: str) -> str:
    """An identifier of the project in words."""
    return {
        "kv_cache": "the KV cache",
        "output_reservation": "room set aside for outputs (output reservation)",
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "the token budget (max_num_batched_tokens)",
        "premise_violated": "premise violated",
    }.get(identifier, identifier)


def _si(size_s: float) -> tuple[float, str]:
    """Largest unit of time in which ``size_s`` is at least 1 (the smallest unit if none)."""
    for factor, unit in _SI_SECONDS:
        if abs(size_s) >= factor or factor == _SI_SECONDS[-1][0]:
            return factor, unit
    raise AssertionError("unreachable")
