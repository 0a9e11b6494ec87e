"""The part of the page of experiments that is about several servers behind one list of URLs."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.formatting import estimate_text, grouped, load_label, percent, seconds
from harness.evidence.evidence_rows import Row

NOTHING = "-"
HEAD = """
## Several replicas behind one list of URLs

Request number i goes to server i mod N, whatever its queue, as in the experiment of Nie, Si and Zhou on
eight GPUs. Each has an engine and a pool of its own; both columns of rates are measured, and one server
is that of the row with the same launch and lengths."""
UNEVEN = """
Round-robin evens out how many requests each gets, not how much work. After the warm-up: requests in the
system apart, most less fewest, mean; the share of the time in which one has a queue while another has
none; and by Little's law what of a request's wait falls into it, which a balancer that looks at the
queues could spare at most. Drift with its 90 % interval."""


def replica_sections(rows: Sequence[Row]) -> list[str]:
    """The section on rows with several servers; none without such rows."""
    some = [row for row in rows if row.servers > 1]
    if not some:
        return []
    return [HEAD, "\n".join(_together(some, rows)), UNEVEN, "\n".join(_uneven(some))]


def _together(some: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """What all serve beside N times what one does."""
    most = max(row.servers for row in some)
    head = ["row", "one server", "all", "all / (N x one)", *(f"replica {i}" for i in range(most))]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in some:
        one, whole = _alone(row, rows), row.verdict.measured
        share = None
        if one is not None and whole is not None:
            share = ratio(whole, one.scaled(row.servers), "all over N times one")
        cells = [f"`{row.name}`", _text(one), _text(whole), _share(share)]
        cells += [_text(rate.measured) for rate in row.verdict.replicas]
        cells += [NOTHING] * (len(head) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _alone(row: Row, rows: Sequence[Row]) -> Estimate | None:
    """The rate of one such server, measured by itself."""
    for other in rows:
        if other.servers > 1 or other.config.server is None or row.config.server is None:
            continue
        same_server = other.config.server.launch == row.config.server.launch
        if same_server and other.config.workload == row.config.workload and other.valid:
            return other.verdict.measured
    return None


def _uneven(some: Sequence[Row]) -> list[str]:
    head = ["row", "load", "offered", "drift", "waiting", "apart", "one waits", "of a wait"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in some:
        for seen in row.verdict.imbalance:
            own = seen.replicas
            cells = [
                f"`{row.name}`",
                load_label(seen.load),
                " / ".join(grouped(one.offered, 2) for one in own),
                " / ".join(_text(one.drift) for one in own),
                " / ".join(grouped(one.waiting, 1) for one in own),
                grouped(seen.apart, 1),
                percent(seen.one_waits),
                seconds(seen.wait_s),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _text(estimate: Estimate | None) -> str:
    return NOTHING if estimate is None else estimate_text(estimate).replace(" req/s", "")


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
