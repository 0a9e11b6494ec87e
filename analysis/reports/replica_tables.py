"""Several servers behind one list of URLs, for a reader: lines of the terminal and a report's tables."""

from __future__ import annotations

from analysis.inference.imbalance import Imbalance
from analysis.numbers.formatting import (
    estimate_text,
    grouped,
    load_label,
    percent,
    plain,
    plus_minus,
    seconds,
)
from analysis.reports.report_tables import Table
from analysis.verdicts.verdict import ReplicaRate, Verdict

NO_QUEUE = "its queue did not last"


def replica_lines(verdict: Verdict) -> list[tuple[str, list[str]]]:
    """Label and parts of each line: what each replica serves, and run by run how they differ."""
    if not verdict.replicas:
        return []
    lines = [("replicas", [_rate(rate) for rate in verdict.replicas])]
    for seen in verdict.imbalance:
        parts = [
            f"{i}: {grouped(own.offered, 2)} req/s, {grouped(own.waiting, 1)} waiting, "
            f"drift {plus_minus(own.drift)}"
            for i, own in enumerate(seen.replicas)
        ]
        lines.append((f"  {load_label(seen.load)}", [*parts, _uneven(seen)]))
    return lines


def rates_table(verdict: Verdict) -> Table:
    """Predicted and measured rate of each replica."""
    rows = tuple(
        (
            f"replica {rate.replica}",
            estimate_text(rate.predicted),
            NO_QUEUE if rate.measured is None else estimate_text(rate.measured),
            "yes" if rate.bounds else "no",
        )
        for rate in verdict.replicas
    )
    return Table(
        "Replicas",
        ("server", "predicted", "measured", "bounds the whole"),
        rows,
        "Request number i went to replica i mod N, whatever its queue, so that the slowest bounds "
        "all; measured: work served while its own queue was never empty.",
    )


def imbalance_table(verdict: Verdict) -> Table:
    """A row for each replica of each run under a heading of what round-robin made of the run."""
    rows: list[tuple[str, ...]] = []
    for seen in verdict.imbalance:
        rows.append((f"{load_label(seen.load)} of critical, {seen.run}: {_uneven(seen)}",))
        rows += [
            (
                f"replica {i}",
                plain(own.offered, "req/s"),
                grouped(own.in_system, 1),
                grouped(own.waiting, 1),
                estimate_text(own.drift),
                NO_QUEUE if own.served is None else estimate_text(own.served),
            )
            for i, own in enumerate(seen.replicas)
        ]
    return Table(
        "Imbalance of round-robin",
        ("server", "offered", "N, mean", "waiting, mean", "drift of N(t)", "served under backlog"),
        tuple(rows),
        "After the warm-up. The share of time in which one replica has a queue while another has none, "
        "and by Little's law what of a request's wait falls into it: what a balancer that looks at the "
        "queues could spare at most.",
    )


def _rate(rate: ReplicaRate) -> str:
    predicted = f"{plain(rate.predicted.value)} predicted"
    if rate.measured is None:
        return f"{rate.replica}: {NO_QUEUE}, {predicted}"
    return f"{rate.replica}: {estimate_text(rate.measured)}, {predicted}"


def _uneven(seen: Imbalance) -> str:
    return (
        f"{grouped(seen.apart, 1)} requests apart; one waits beside an empty queue "
        f"{percent(seen.one_waits)} of the time, {seconds(seen.wait_s)} of a request's wait"
    )
