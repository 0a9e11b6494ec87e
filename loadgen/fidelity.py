"""Did we offer what we claim? Checks of one run's records, before anything is concluded from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import SECOND_NS, run_arrivals, schedule_ns
from loadgen.law_checks import OfSends, law_checks, on_clock
from loadgen.records import FidelityCheck, LoadFidelity, RequestRecord, Run
from loadgen.stretches import Stretch, operational, stretch_arrivals

MAX_LAG_MS = 10.0
"""99th percentile of the send lag. An engine admits at step boundaries, 10 ms or more apart, so
that a smaller lag seldom changes the step that a request joins; it is also small beside a residence
time."""
MAX_FAILED_SHARE = 1e-3
"""Failed and timed-out requests leave the system without the work they stand for: 0.1 % of
the work is far below what a verdict resolves, more is a fault to be found first."""


def fidelity(
    run: Run,
    records: Sequence[RequestRecord],
    end_s: float,
    start_ns: int,
    max_lag_ms: float = MAX_LAG_MS,
) -> LoadFidelity:
    """Judge one run from ``start_ns`` over the first ``end_s`` seconds, when the load ended.

    The schedule is drawn again from ``run`` (the arrivals of its law, rate, horizon and seed, behind
    the burst of a run that starts full) and compared instant by instant; then the sends are compared
    with their schedule and the law is tested on its own. Of sends those due after the last of the burst
    was sent count, since a burst is on its way for a while and what is left of a Poisson process is one.
    ``valid`` is False when any check failed; those with too few requests to be made do not count. Lag
    quantiles are NaN when nothing was sent. Raises ValueError for a non-positive ``end_s``, and as
    `loadgen.replay.replayed`.
    """
    due_s = run_arrivals(run)
    gone_s = -math.inf
    more: tuple[FidelityCheck, ...] = ()
    if run.preload:
        sent_ns = (r.sent_ns for r in records if r.scheduled_ns == start_ns)
        last_ns = max((ns for ns in sent_ns if ns is not None), default=start_ns)
        gone_s = (last_ns - start_ns) / SECOND_NS
        more = (_burst_check(gone_s, run.warmup_s),)
    of_law = law_checks(run.arrivals, run.arrival_rate, due_s[run.preload :], end_s, gone_s)
    return _judged(due_s, of_law, records, end_s, start_ns, max_lag_ms, gone_s, more)


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

    return _judged(due_s, on_clock(clock, 1.0, end_s), records, end_s, start_ns, max_lag_ms)


def _judged(
    due_s: NDArray[np.float64],
    of_law: OfSends,
    records: Sequence[RequestRecord],
    end_s: float,
    start_ns: int,
    max_lag_ms: float,
    burst_gone_s: float = -math.inf,
    more: tuple[FidelityCheck, ...] = (),
) -> LoadFidelity:
    """``due_s``: the whole schedule. Lag and sends are those of what is due after ``burst_gone_s``."""
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
        *of_law(sent_s, lag_ms / 1e3),
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


def _schedule_check(
    due_s: NDArray[np.float64], records: Sequence[RequestRecord], start_ns: int, end_s: float
) -> FidelityCheck:
    due_ns = schedule_ns(due_s[due_s < end_s], start_ns)
    recorded_ns = np.array([r.scheduled_ns for r in records], dtype=np.int64)
    # Paired by rank to 2 us: evidence keeps instants to 1 us, and another numpy may round the sums
    # differently.
    wrong = abs(len(due_ns) - len(recorded_ns))
    if not wrong:
        wrong = int((np.abs(np.sort(recorded_ns) - due_ns) > 2000).sum())
    return FidelityCheck(
        name="schedule",
        passed=wrong == 0,
        statistic=float(wrong),
        threshold=0.0,
        meaning="arrivals that differ from the schedule of the run's law, rate and seed; if any "
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
