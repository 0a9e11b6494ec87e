"""N servers behind one list of URLs, request i at number i mod N: taken apart, and put together again.

What is of one engine is asked of each by itself, with its own requests and samples. Under stateless
round-robin each gets the N-th part of the rate, whatever its queue: the whole is stable while the
slowest is, and its critical rate is N times the slowest's. The rates add up only behind a balancer that
looks at the queues. Where the replicas are alike both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.inference.imbalance import last_seen
from analysis.inference.long_run import DIFFERENT, Stretch
from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.quantiles import f_quantile, normal_quantile, student_quantile
from analysis.schedulers.frames import RunFrames
from analysis.theory.prediction import Prediction
from analysis.verdicts.evidence import Evidence, MeasuredRun, Replicas
from analysis.verdicts.run_verdict import Capacity, capacity
from loadgen.records import RequestRecord, Run

APART = 0.25
"""Share of theta by which a replica must be faster than the slowest not to count as alike."""
LEVEL = 0.99
"""How sure that must be, over all pairs."""
MEANS = ("kv_usage", "steps", "new_token_ratio")
"""Columns of engine samples that are of one engine; the others add up."""


# -- apart ---------------------------------------------------------------------------------------


def thinned(run: Run, index: int, count: int) -> Run:
    """What replica ``index`` of ``count`` is offered of a run: every count-th request."""
    burst = len(range(index, run.preload, count))
    return replace(run, arrival_rate=run.arrival_rate / count, preload=burst)


def records_of(records: Sequence[RequestRecord], index: int, count: int) -> list[RequestRecord]:
    """The requests that went to replica ``index`` of ``count``."""
    return [record for record in records if record.id % count == index]


def of_one(prediction: Prediction) -> Prediction:
    """What a prediction for N alike replicas says of one of them."""
    share, onset = 1.0 / prediction.replicas, prediction.onset_rate
    return replace(
        prediction,
        critical_rate=prediction.critical_rate.scaled(share),
        lower=prediction.lower * share,
        onset_rate=None if onset is None else onset.scaled(share),
        replicas=1,
    )


# -- together ------------------------------------------------------------------------------------


def together(run: Run, parts: Sequence[RunFrames]) -> RunFrames:
    """The frames of a run over all replicas, at the instants of the first one's samples.

    Gauges and counters are the sums of those last seen; KV usage and steps are the replicas' means.
    """
    requests = pd.concat([part.requests for part in parts])
    requests = requests.sort_values("scheduled_s", kind="stable", ignore_index=True)
    at_s = parts[0].per_sample("t_s")
    columns: dict[str, NDArray[np.float64]] = {"t_s": at_s, "read_s": parts[0].per_sample("read_s")}
    for name in parts[0].engine.columns:
        if name not in columns:
            seen = np.array([last_seen(part, name, at_s) for part in parts])
            columns[name] = seen.mean(axis=0) if name in MEANS else seen.sum(axis=0)
    end_s = min(part.end_s for part in parts)
    return RunFrames(run, end_s, requests, pd.DataFrame(columns), parts[0].gpu)


def whole_run(parts: Sequence[MeasuredRun], run: Run) -> MeasuredRun:
    """One run over all replicas: valid when each of them was."""
    first = parts[0]
    late = [part.overrun for part in parts if part.overrun is not None]
    paces = [part.pace for part in parts if part.pace is not None]
    return MeasuredRun(
        frames=together(run, [part.frames for part in parts]),
        fidelity=first.fidelity,
        overrun=max(late, default=None),
        warnings=tuple(dict.fromkeys(text for part in parts for text in part.warnings)),
        pace=max(paces, key=lambda pace: abs(pace.off), default=None),
    )


def replicated(
    whole: Evidence,
    predictions: Sequence[tuple[Prediction, Prediction, Prediction]],
    runs: Sequence[Sequence[MeasuredRun]],
    balanced: Estimate,
) -> Evidence:
    """``whole`` with the evidence of each replica: its claim, the paper's and the engine's prediction,
    and its runs. Every N-th of Poisson arrivals has gaps of variance 1/N (Erlang's law)."""
    each = tuple(
        replace(
            whole,
            prediction=claim,
            paper=paper,
            engine=engine,
            simulated=None,
            runs=tuple(own),
            arrival_variance=1.0 / len(predictions),
        )
        for (claim, paper, engine), own in zip(predictions, runs, strict=True)
    )
    return replace(whole, replicas=Replicas(each, balanced))


# -- rates ---------------------------------------------------------------------------------------


def backlogs(evidence: Evidence) -> tuple[tuple[Capacity, ...], ...]:
    """The service rates under backlog of every server, in order: of the one, or of each replica."""
    servers = (evidence,) if evidence.replicas is None else evidence.replicas.each
    return tuple(
        tuple(c for run in one.runs if (c := capacity(run, one)) is not None) for one in servers
    )


def slowest(rates: Sequence[Estimate], theta: float) -> tuple[int, ...]:
    """Which replicas bound the whole: the slowest one and all that cannot be told from it, in order.

    Another is told apart where it is faster by more than theta/4 and that it is faster is certain at
    99 %, Bonferroni over all pairs, since the slowest is chosen among them.
    """
    least = min(range(len(rates)), key=lambda i: rates[i].value)
    pairs = max(math.comb(len(rates), 2), 1)
    sure = normal_quantile(1 - (1 - LEVEL) / 2 / pairs)

    def apart(rate: Estimate) -> bool:
        share = ratio(rate, rates[least], "")
        error = math.log(share.high / share.low) / 2 / normal_quantile(0.975)
        return share.value > 1 + APART * theta and math.log(share.value) > sure * error

    return tuple(i for i, rate in enumerate(rates) if i == least or not apart(rate))


def added_up(replicas: Sequence[Sequence[Stretch]]) -> Estimate:
    """The sum of several servers' rates, with a 95 % interval: shape (servers, stretches of each).

    Each one's rate is the mean of its stretches by their duration. All are taken to scatter alike, so
    that their cosines give one variance, and so do the means of runs about their own server's, as in
    `analysis.inference.long_run.long_run_mean`. Raises ValueError where a server has no stretch.
    """
    if not replicas or not all(replicas):
        raise ValueError("a sum of rates needs a stretch of every server")
    lengths = [np.array([s.duration_s for s in own]) for own in replicas]
    means = [np.array([s.mean for s in own]) for own in replicas]
    rates = [float(t @ m / t.sum()) for t, m in zip(lengths, means, strict=True)]
    within = np.concatenate([s.scatters() for own in replicas for s in own])
    between = sum(
        float(t @ (m - rate) ** 2) for t, m, rate in zip(lengths, means, rates, strict=True)
    )
    others = sum(len(own) - 1 for own in replicas)
    freedom = len(within) + others
    variance = (float(within.sum()) + between) / freedom
    if others and between / others > f_quantile(DIFFERENT, others, len(within)) * within.mean():
        variance, freedom = between / others, others
    half = student_quantile(0.975, freedom) * math.sqrt(
        variance * sum(1 / t.sum() for t in lengths)
    )
    value, first = sum(rates), replicas[0][0]
    method = f"{first.method}; {len(replicas)} replicas added up"
    return Estimate(value, value - half, value + half, 0.95, first.unit, method)


def whole_rate(
    replicas: Sequence[Sequence[Stretch]], theta: float
) -> tuple[Estimate | None, tuple[int, ...]]:
    """The critical rate of all under round-robin, and whose it is; None where no queue lasted.

    N times the mean rate of `slowest`. One that never had a lasting queue where another had at the same
    rate is no slower, and is left out.
    """
    rates = {i: added_up([own]) for i, own in enumerate(replicas) if own}
    if not rates:
        return None, ()
    found = tuple(list(rates)[i] for i in slowest(list(rates.values()), theta))
    total = added_up([replicas[i] for i in found])
    if len(found) == len(replicas):
        return total, found
    names = " and ".join(map(str, found))
    method = f"{len(replicas)} times the rate of replica {names}, the slowest: {total.method}"
    scaled = total.scaled(len(replicas) / len(found))
    return replace(scaled, method=method), found


def sum_of(rates: Sequence[Estimate], method: str) -> Estimate:
    """The sum of independent estimates, errors in quadrature; 95 %, or exact where all are."""
    value = sum(rate.value for rate in rates)
    error = math.hypot(*(rate.standard_error for rate in rates))
    if error == 0.0:
        return Estimate.exact(value, rates[0].unit, method)
    return Estimate.normal(value, error, rates[0].unit, method)
