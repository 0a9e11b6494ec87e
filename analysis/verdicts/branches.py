"""Started empty or started full: does the server end up the same?

A server whose capacity falls when its queue is long has two lasting states over a band of rates: from
empty its queue stays bounded, from full it grows (theory.md 7.4). A test that starts empty sees one of
them. So the same rate is run from both starts and what lasts is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from analysis.inference.growth import DRIFT_BATCHES, why_no_slope
from analysis.inference.long_run import Stretch, long_run_mean
from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.quantiles import student_quantile
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.verdict import Check, RunJudgement, RunVerdict

LEVEL = 0.99
"""Of the comparison: near the critical rate the interval of a drift covers less than it says, and
several rates are compared. At this level one branch is taken for two in less than 5 %."""
Judged = tuple[Estimate, RunVerdict, str]
"""Drift, verdict and its clause."""


def judge_from_full(
    frames: RunFrames, start_s: float, end_s: float, judge: Callable[[float, float], Judged]
) -> tuple[float, float, Judged]:
    """Verdict on a run that started full, and the window [start, end) that its drift is over.

    While the backlog lasts nothing reflects N: it drains below the critical rate and grows above, so
    that the sign of the drift decides, by one-sided 95 % bounds. A queue that was emptied has drained,
    unless it then grows. Where it was emptied before a slope could be taken, what follows is judged
    like a run from empty, by ``judge`` of a window; that is also what is asked about the rest of a run
    that drained. ``start_s``: when the wave of the burst has faded.
    """
    drained_s = _emptied_s(frames, start_s, end_s)
    until_s = end_s if drained_s is None else drained_s
    lasted = why_no_slope(frames, start_s, until_s) is None
    if drained_s is not None and why_no_slope(frames, drained_s, end_s) is None:
        growth, verdict, text = judge(drained_s, end_s)
        if not lasted or verdict == "unstable":
            return drained_s, end_s, (growth, verdict, f"drained by {drained_s:.0f} s, then {text}")
    if not lasted:
        growth, _, text = judge(start_s, until_s)
        return start_s, end_s, (growth, "inconclusive", text)
    growth, _, _ = judge(start_s, until_s)
    if drained_s is not None:
        return start_s, until_s, (growth, "stable", f"started full, drained by {drained_s:.0f} s")
    if growth.high < 0:
        return start_s, until_s, (growth, "stable", "started full, drains")
    if growth.low > 0:
        return start_s, until_s, (growth, "unstable", "started full, grows")
    unclear = "cannot say: started full, neither draining nor growth is certain"
    return start_s, until_s, (growth, "inconclusive", unclear)


def _emptied_s(frames: RunFrames, start_s: float, end_s: float) -> float | None:
    """The first instant of the window at which nothing was seen to wait."""
    engine = frames.engine
    empty = engine["t_s"].between(start_s, end_s) & (engine["waiting"] == 0)
    return float(engine.loc[empty, "t_s"].iloc[0]) if empty.any() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """Two runs at one rate, started empty and started full."""

    empty: RunJudgement
    full: RunJudgement
    same: bool | None
    """Both stay bounded or both grow; False: one grows by more than the other, and than the errors
    explain; None: the runs cannot say."""
    full_growth: Estimate
    """Of N while the queue of the full start lasted, req/s; negative where it drained."""
    difference: Estimate
    """Lasting growth from full less that from empty, req/s: a queue that drains has none."""
    full_capacity: Estimate | None
    """Service rate while the queue of the full start lasted."""

    @property
    def load(self) -> float:
        return self.empty.load

    @property
    def text(self) -> str:
        where = f"at {self.load:.2f} of the predicted rate"
        by = (
            f"lasting growth from full less from empty {self.difference.value:+.2g} req/s "
            f"[{self.difference.low:+.2g}, {self.difference.high:+.2g}], {100 * LEVEL:.0f} %"
        )
        if self.same:
            return f"no second branch seen {where} ({by})"
        both = f"{self.empty.text} from empty, {self.full_growth.value:+.2g} req/s from full"
        if self.same is None:
            return f"cannot say whether there is a second branch {where}: {both}"
        return f"two branches {where}: {both} ({by})"


def two_branches(
    judgements: Sequence[RunJudgement], capacities: Mapping[str, Estimate]
) -> tuple[Branches, ...]:
    """Every rate that was run from both starts, in increasing order.

    ``capacities``: the service rate under backlog, by work, of the runs that gave one, by their id. What
    a full server serves is known several times better than how its N moves: where it is known, the
    growth from full is the offered rate less that.
    """
    empty = {j.arrival_rate: j for j in judgements if j.start == "empty"}
    full = {j.arrival_rate: j for j in judgements if j.start == "full"}
    rates = sorted(empty.keys() & full.keys())
    return tuple(_compared(empty[r], full[r], capacities.get(full[r].id)) for r in rates)


def _compared(empty: RunJudgement, full: RunJudgement, served: Estimate | None) -> Branches:
    growth = _wider(full.drift)
    if served is not None:
        served = served.at_level(LEVEL)
        rate, method = full.arrival_rate, f"offered rate less {served.method}"
        low, high = rate - served.high, rate - served.low
        growth = Estimate(rate - served.value, low, high, LEVEL, "req/s", method)
    difference = _difference(_wider(empty.drift), growth)
    return Branches(
        empty=empty,
        full=full,
        same=_same(empty.verdict, _full_verdict(full, growth), difference),
        full_growth=growth,
        difference=difference,
        full_capacity=served,
    )


def _wider(drift: Estimate) -> Estimate:
    """A drift with the interval of `LEVEL`: Student's, of as few batches as it was taken from."""
    now, then = (
        student_quantile(0.5 + level / 2, DRIFT_BATCHES - 1) for level in (LEVEL, drift.level)
    )
    half = drift.half_width * now / then
    method = f"{drift.method}, widened to {100 * LEVEL:.0f} %"
    return Estimate(drift.value, drift.value - half, drift.value + half, LEVEL, "req/s", method)


def _full_verdict(full: RunJudgement, growth: Estimate) -> RunVerdict:
    if full.verdict == "invalid":
        return "invalid"
    if growth.low > 0:
        return "unstable"
    return "stable" if growth.high < 0 else full.verdict


def _same(empty: RunVerdict, full: RunVerdict, difference: Estimate) -> bool | None:
    """Apart takes a difference beyond its error, and that the one with more growth surely grows."""
    if "invalid" in (empty, full):
        return None
    if empty == full != "inconclusive":
        return True
    more_from_full = full == "unstable" and difference.low > 0.0
    more_from_empty = empty == "unstable" and difference.high < 0.0
    return False if more_from_full or more_from_empty else None


def _difference(empty: Estimate, full: Estimate) -> Estimate:
    """Errors in quadrature; growth below nothing counts as none."""
    method = "growth that lasts, from full less from empty, errors in quadrature"
    if math.isnan(empty.value) or math.isnan(full.value):
        return Estimate(math.nan, math.nan, math.nan, LEVEL, "req/s", method)
    one, other = _lasting(empty), _lasting(full)
    value = other.value - one.value
    low = value - math.hypot(other.value - other.low, one.high - one.value)
    high = value + math.hypot(other.high - other.value, one.value - one.low)
    return Estimate(value, low, high, LEVEL, "req/s", method)


def _lasting(growth: Estimate) -> Estimate:
    value, low, high = (max(x, 0.0) for x in (growth.value, growth.low, growth.high))
    return Estimate(value, low, high, growth.level, growth.unit, growth.method)


def bistable_band(pairs: Sequence[Branches]) -> tuple[float, float] | None:
    """Arrival rates [from, to] in req/s over which the start decides, as far as seen; None if none.

    They reach over every rate at which the starts differ, and to the service rate of the full server
    there: it is the edge of the band, where its queue would neither drain nor grow.
    """
    apart = [pair for pair in pairs if pair.same is False]
    rates = [pair.empty.arrival_rate for pair in apart]
    rates += [pair.full_capacity.value for pair in apart if pair.full_capacity is not None]
    return (min(rates), max(rates)) if rates else None


def branch_checks(pairs: Sequence[Branches]) -> tuple[Check, ...]:
    """One premise for each pair: the start does not decide what lasts."""
    return tuple(
        Check(
            name=f"one branch at {pair.load:.2f}",
            holds=pair.same,
            observed=pair.difference.value,
            threshold=pair.empty.stable_below,
            text=pair.text,
        )
        for pair in pairs
    )


def branch_warnings(
    pairs: Sequence[Branches],
    predicted_rate: float,
    poisson: Sequence[Stretch],
    from_full: Sequence[Stretch],
) -> tuple[str, ...]:
    """What a reader must know of runs that started full.

    ``poisson`` and ``from_full`` are service rates under backlog from either start.
    """
    warnings = []
    band = bistable_band(pairs)
    if band is not None:
        low, high = (rate / predicted_rate for rate in band)
        warnings.append(
            f"bistable band [{band[0]:.3g}, {band[1]:.3g}] req/s, {low:.2f} to {high:.2f} of the "
            "predicted rate, as far as seen: there the start decides whether the queue grows, so that "
            "a burst or a stall can turn one branch into the other; operate below it"
        )
    if not from_full:
        return tuple(warnings)
    if not poisson:
        warnings.append(
            "the critical rate was measured from a full start alone: where a burst starts waves it is "
            "not that of sustained arrivals; add runs above the predicted rate with load.start: empty"
        )
        return tuple(warnings)
    served, other = long_run_mean(poisson), long_run_mean(from_full)
    share = ratio(other, served, "from full over sustained Poisson")
    if not share.low <= 1.0 <= share.high:
        warnings.append(
            f"started full the server served {share.value:.3f} [{share.low:.3f}, {share.high:.3f}] of "
            "its rate under sustained Poisson overload, which alone counts as measured"
        )
    return tuple(warnings)
