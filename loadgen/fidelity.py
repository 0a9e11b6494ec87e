"""Did we offer what we claim? Checks of one run's records, before anything is concluded from them.

Every statistical check rejects an honest Poisson load with probability `LEVEL`, so that six of them
throw away fewer than one honest run in a thousand. Tests by counts, order and extremes stand beside
the gap histogram because repeated gaps, missing variance and clipped gaps do not show in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import SECOND_NS, run_arrivals, schedule_ns
from loadgen.records import FidelityCheck, LoadFidelity, RequestRecord, Run
from loadgen.stretches import Stretch, operational, stretch_arrivals

LEVEL = 1e-4
"""Honest runs that one check rejects. Real defects are many standard errors away at n = 1000."""
TWO_SIDED_Z = NormalDist().inv_cdf(1.0 - LEVEL / 2.0)
ONE_SIDED_Z = NormalDist().inv_cdf(1.0 - LEVEL)
MAX_LAG_MS = 10.0
"""99th percentile of the send lag. An engine admits at step boundaries, 10 ms or more apart, so
that a smaller lag seldom changes the step that a request joins; it is also small beside a residence
time."""
MAX_FAILED_SHARE = 1e-3
"""Failed and timed-out requests leave the system without the work they stand for: 0.1 % of
the work is far below what a verdict resolves, more is a fault to be found first."""
MIN_REQUESTS = 100
"""Below, the large-sample critical values do not hold and no defect would be found."""
WINDOW_ARRIVALS = 20.0
"""Expected arrivals per counting window: enough for the chi-square law of the dispersion."""
PHASE_BEFORE_S = 0.001
PHASE_WIDTH_S = 0.005
"""Slice of each second, from 1 ms before its start, in which arrivals pinned to seconds show."""


def fidelity(
    run: Run,
    records: Sequence[RequestRecord],
    end_s: float,
    start_ns: int,
    max_lag_ms: float = MAX_LAG_MS,
) -> LoadFidelity:
    """Judge one run from ``start_ns`` over the first ``end_s`` seconds, when the load ended.

    The schedule is drawn again from ``run`` (a Poisson process of its rate, horizon and seed, behind
    the burst of a run that starts full) and compared instant by instant; then the sends are compared
    with their schedule and tested on their own: those due after the last of the burst was sent, since
    a burst is on its way for a while and what is left of a Poisson process is one. ``valid`` is False
    when any check failed; those with too few requests to be made do not count. Lag quantiles are NaN
    when nothing was sent. Raises ValueError for a non-positive ``end_s``.
    """
    due_s = run_arrivals(run)
    if not run.preload:
        return _judged(due_s, np.asarray, run.arrival_rate, records, end_s, start_ns, max_lag_ms)
    sent_ns = [r.sent_ns for r in records if r.scheduled_ns == start_ns and r.sent_ns is not None]
    gone_s = (max(sent_ns, default=start_ns) - start_ns) / SECOND_NS

    def since(at_s: NDArray[np.float64]) -> NDArray[np.float64]:
        return at_s - gone_s

    check = _burst_check(gone_s, run.warmup_s)
    return _judged(
        due_s, since, run.arrival_rate, records, end_s, start_ns, max_lag_ms, gone_s, (check,)
    )


def fidelity_of_stretches(
    stretches: Sequence[Stretch],
    records: Sequence[RequestRecord],
    end_s: float,
    start_ns: int,
    max_lag_ms: float = MAX_LAG_MS,
) -> LoadFidelity:
    """The same for a load of stretches, tested as one on the clock on which it has the rate 1."""
    due_s = np.concatenate([stretch_arrivals(stretch) for stretch in stretches])

    def clock(at_s: NDArray[np.float64]) -> NDArray[np.float64]:
        return operational(stretches, at_s)

    return _judged(due_s, clock, 1.0, records, end_s, start_ns, max_lag_ms)


def _judged(
    due_s: NDArray[np.float64],
    clock: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    rate: float,
    records: Sequence[RequestRecord],
    end_s: float,
    start_ns: int,
    max_lag_ms: float,
    burst_gone_s: float = -math.inf,
    more: tuple[FidelityCheck, ...] = (),
) -> LoadFidelity:
    """``due_s``: the whole schedule; ``clock`` makes it a Poisson process of this constant rate.

    Lag and law are those of the arrivals due after ``burst_gone_s``, from where ``clock`` then counts.
    """
    if not end_s > max(burst_gone_s, 0.0):
        raise ValueError(
            f"a run that ended after {end_s} s offered nothing: there is no load to judge"
        )
    records = [r for r in records if r.scheduled_ns < start_ns + end_s * SECOND_NS]
    judged = [r for r in records if r.scheduled_ns > start_ns + burst_gone_s * SECOND_NS]
    sent = sorted((r.sent_ns, r.scheduled_ns) for r in judged if r.sent_ns is not None)
    instants_ns = np.array(sent, dtype=np.int64).reshape(-1, 2)
    sent_s = (instants_ns[:, 0] - start_ns) / SECOND_NS
    lag_ms = (instants_ns[:, 0] - instants_ns[:, 1]) / 1e6
    p50, p99, longest = np.quantile(lag_ms, [0.5, 0.99, 1.0]) if len(sent) else (math.nan,) * 3
    lag = clock(sent_s) - clock(sent_s - lag_ms / 1e3)
    checks = (
        _schedule_check(due_s, records, start_ns, end_s),
        _sent_check(records, start_ns, end_s, max_lag_ms),
        FidelityCheck(
            name="send lag",
            passed=bool(p99 <= max_lag_ms) if len(sent) else None,
            statistic=float(p99),
            threshold=max_lag_ms,
            meaning="99th percentile of sent minus scheduled, ms; if it is larger, give the client "
            "cores of its own or lower the rate",
        ),
        # Whole seconds are those of the wall, not of the clock of the load.
        *poisson_checks(clock(sent_s), lag, rate, float(clock(np.array([end_s]))[0]))[:-1],
        _phase_check(np.sort(sent_s)),
        *_outcome_checks(records),
        *more,
    )
    return LoadFidelity(
        valid=all(check.passed is not False for check in checks),
        checks=checks,
        achieved_rate=len(sent) / (end_s - max(burst_gone_s, 0.0)),
        lag_p50_ms=float(p50),
        lag_p99_ms=float(p99),
        lag_max_ms=float(longest),
    )


def poisson_checks(
    instants_s: NDArray[np.float64],
    lag_s: NDArray[np.float64],
    arrival_rate: float,
    end_s: float,
) -> tuple[FidelityCheck, ...]:
    """Are these instants, shape (n,), a Poisson process of this rate on [0, end_s)?

    ``lag_s``, shape (n,), is by how much each one may be late: shifts of that size are allowed for,
    so that a timer's grid does not reject an honest load at a high rate.
    """
    instants = np.sort(instants_s)
    gaps = np.diff(instants, prepend=0.0) * arrival_rate
    usual_lag, longest_lag = (_quantile(lag_s, q) * arrival_rate for q in (0.99, 1.0))
    return (
        _rate_check(len(instants), arrival_rate * end_s),
        _gap_check(gaps, usual_lag),
        _longest_gap_check(gaps, longest_lag),
        _dispersion_check(instants, arrival_rate, end_s),
        _correlation_check(gaps, usual_lag),
        _phase_check(instants),
    )


def _schedule_check(
    due_s: NDArray[np.float64], records: Sequence[RequestRecord], start_ns: int, end_s: float
) -> FidelityCheck:
    due_ns = schedule_ns(due_s[due_s < end_s], start_ns)
    recorded_ns = np.array([r.scheduled_ns for r in records], dtype=np.int64)
    # Paired by rank to 1 us: another version of numpy may round the sums differently.
    wrong = abs(len(due_ns) - len(recorded_ns))
    if not wrong:
        wrong = int((np.abs(np.sort(recorded_ns) - due_ns) > 1000).sum())
    return FidelityCheck(
        name="schedule",
        passed=wrong == 0,
        statistic=float(wrong),
        threshold=0.0,
        meaning="arrivals that differ from the Poisson schedule of the run's rate and seed; if any "
        "do, records are missing or damaged or another schedule was driven: repeat the run",
    )


def _burst_check(gone_s: float, warmup_s: float) -> FidelityCheck:
    """Three of the longest residences are left for the wave of the burst to fade: it may take one."""
    return FidelityCheck(
        name="burst",
        passed=gone_s <= warmup_s / 3,
        statistic=gone_s,
        threshold=warmup_s / 3,
        meaning="seconds until the last request of the burst was sent; if it is longer, the run was "
        "not full from its start: give the client cores of its own",
    )


def _sent_check(
    records: Sequence[RequestRecord], start_ns: int, end_s: float, max_lag_ms: float
) -> FidelityCheck:
    """Arrivals so close to the end that an allowed lag puts them behind it are not missed."""
    judged_ns = start_ns + round(end_s * SECOND_NS - max_lag_ms * 1e6)
    unsent = sum(r.sent_ns is None and r.scheduled_ns < judged_ns for r in records)
    return FidelityCheck(
        name="all sent",
        passed=unsent == 0,
        statistic=float(unsent),
        threshold=0.0,
        meaning="arrivals that were due and never sent; if any, the client could not keep up or "
        "could not connect: see the errors of the records",
    )


def _rate_check(count: int, expected: float) -> FidelityCheck:
    z = _poisson_z(count, expected)
    return FidelityCheck(
        name="rate",
        passed=abs(z) <= TWO_SIDED_Z if expected >= MIN_REQUESTS else None,
        statistic=z,
        threshold=TWO_SIDED_Z,
        meaning=f"{count} requests sent where {expected:.1f} were expected, in standard deviations "
        "of a Poisson count; if outside, the client lost or added load",
    )


def _gap_check(gaps: NDArray[np.float64], allowed_shift: float) -> FidelityCheck:
    """Kolmogorov-Smirnov distance of gaps (in mean gaps) from the exponential law, less lag.

    Lags in [0, d] move each ordered instant, so each gap, by at most d: the empirical law at x lies
    between those of the schedule at x - d and x + d. With d their 99th percentile, at most 2 % of
    the gaps move further. Critical value: Kolmogorov's tail 2 exp(-2 c^2) with Stephens' correction
    for n.
    """
    n = len(gaps)
    ordered = np.sort(gaps)
    rank = np.arange(n + 1) / n if n else np.zeros(1)
    above = rank[1:] + np.expm1(-(ordered + allowed_shift))
    below = -np.expm1(-np.maximum(ordered - allowed_shift, 0.0)) - rank[:-1]
    distance = float(max(above.max(initial=0.0), below.max(initial=0.0)))
    root = math.sqrt(max(n, 1))
    critical = math.sqrt(math.log(2.0 / LEVEL) / 2.0) / (root + 0.12 + 0.11 / root)
    threshold = critical + (0.02 if allowed_shift > 0 else 0.0)
    return FidelityCheck(
        name="gaps",
        passed=distance <= threshold if n >= MIN_REQUESTS else None,
        statistic=distance,
        threshold=threshold,
        meaning="largest distance between the law of the gaps and the exponential one beyond what "
        "the send lag explains; if larger, the sends are not Poisson at this rate",
    )


def _longest_gap_check(gaps: NDArray[np.float64], allowed_shift: float) -> FidelityCheck:
    """P(longest of n exponential gaps <= x) = (1 - exp(-x))^n, cut at LEVEL/2 on both sides."""
    n = len(gaps)
    longest = float(gaps.max(initial=0.0))
    lower, upper = (
        -math.log(-math.expm1(math.log(p) / max(n, 1))) for p in (LEVEL / 2, 1 - LEVEL / 2)
    )
    lower, upper = max(lower - allowed_shift, 0.0), upper + allowed_shift
    return FidelityCheck(
        name="longest gap",
        passed=lower <= longest <= upper if n >= MIN_REQUESTS else None,
        statistic=longest,
        threshold=upper if longest > math.log(max(n, 1)) else lower,
        meaning=f"longest gap in mean gaps, which should lie in [{lower:.1f}, {upper:.1f}]; below, "
        "gaps were clipped; above, the generator stood still",
    )


def _dispersion_check(
    instants: NDArray[np.float64], arrival_rate: float, end_s: float
) -> FidelityCheck:
    """Variance over mean of counts in k windows; times k - 1 nearly chi-square (Fisher 1950)."""
    windows = int(arrival_rate * end_s / WINDOW_ARRIVALS)
    enough = windows * WINDOW_ARRIVALS >= MIN_REQUESTS and len(instants) >= MIN_REQUESTS
    index, lower, upper = math.nan, math.nan, math.nan
    if enough:
        counts = np.histogram(instants, bins=windows, range=(0.0, end_s))[0]
        index = float(counts.var(ddof=1) / counts.mean())
        lower, upper = (
            _chi_square(z, windows - 1) / (windows - 1) for z in (-TWO_SIDED_Z, TWO_SIDED_Z)
        )
    return FidelityCheck(
        name="dispersion",
        passed=lower <= index <= upper if enough else None,
        statistic=index,
        threshold=upper if index > 1.0 else lower,
        meaning=f"variance over mean of counts in {windows} windows, which should lie in "
        f"[{lower:.2f}, {upper:.2f}]; below, the load is too regular; above, it comes in bursts",
    )


def _correlation_check(gaps: NDArray[np.float64], allowed_shift: float) -> FidelityCheck:
    """Lag-1 autocorrelation of exp(-gap), which is uniform: its error is normal from n = 100 on.

    Independent lags, uniform over the allowed shift, take their variance from one gap and give it
    to the next: the correlation that this brings is allowed for.
    """
    n = len(gaps)
    enough = n >= MIN_REQUESTS
    correlation, threshold = math.nan, math.nan
    if enough:
        score = np.exp(-gaps)
        score -= score.mean()
        correlation = float((score[1:] @ score[:-1]) / max(score @ score, 1e-300))
        threshold = TWO_SIDED_Z / math.sqrt(n) + allowed_shift**2 / 12.0
    return FidelityCheck(
        name="gap correlation",
        passed=abs(correlation) <= threshold if enough else None,
        statistic=correlation,
        threshold=threshold,
        meaning="correlation between successive gaps; if larger in size, gaps are repeated or made "
        "up for",
    )


def _phase_check(instants: NDArray[np.float64]) -> FidelityCheck:
    near = int(((instants + PHASE_BEFORE_S) % 1.0 < PHASE_WIDTH_S).sum())
    expected = len(instants) * PHASE_WIDTH_S
    z = _poisson_z(near, expected) if expected >= 1.0 else math.nan
    return FidelityCheck(
        name="whole seconds",
        passed=z <= ONE_SIDED_Z if expected >= 1.0 else None,
        statistic=z,
        threshold=ONE_SIDED_Z,
        meaning=f"{near} requests within 5 ms of a whole second where {expected:.1f} belong there, "
        "in standard deviations; if larger, arrivals are pinned to seconds",
    )


def _outcome_checks(records: Sequence[RequestRecord]) -> tuple[FidelityCheck, ...]:
    rejected = sum(r.outcome == "rejected" for r in records)
    lost = sum(r.outcome in ("failed", "timed_out") for r in records)
    share = lost / max(len(records), 1)
    wrong = sum(
        r.outcome == "completed"
        and (r.output_tokens, r.prompt_tokens_reported)
        != (r.output_tokens_designed, r.prompt_tokens)
        for r in records
    )
    return (
        FidelityCheck(
            name="rejected",
            passed=rejected == 0,
            statistic=float(rejected),
            threshold=0.0,
            meaning="requests that the server refused (429, 503): any refusal caps the queue that "
            "we want to see grow; lift the server's limit of queued requests",
        ),
        FidelityCheck(
            name="failed",
            passed=share <= MAX_FAILED_SHARE,
            statistic=share,
            threshold=MAX_FAILED_SHARE,
            meaning="share of requests that failed or timed out; if larger, see their errors",
        ),
        FidelityCheck(
            name="lengths",
            passed=wrong == 0,
            statistic=float(wrong),
            threshold=0.0,
            meaning="completed requests whose prompt or output length by the server's own count is "
            "not the designed one; if any, the offered work is not the workload's: check "
            "ignore_eos, max_model_len, and that the server reports usage",
        ),
    )


def _poisson_z(count: int, expected: float) -> float:
    """Standard normal score of a Poisson count by the power 2/3, which removes the skewness."""
    spread = (math.pow(count, 2 / 3) - math.pow(expected, 2 / 3)) / math.pow(expected, 1 / 6)
    return 1.5 * spread + 1.0 / (6.0 * math.sqrt(expected))


def _chi_square(z: float, freedom: int) -> float:
    """Quantile of chi-square at the normal score ``z`` (Wilson and Hilferty 1931)."""
    part = 2.0 / (9.0 * freedom)
    return freedom * max(1.0 - part + z * math.sqrt(part), 0.0) ** 3


def _quantile(values: NDArray[np.float64], q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else 0.0
