"""Headroom in words: the lines of the terminal, each a name and a text."""

from __future__ import annotations

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, grouped, words
from analysis.operation.headroom import CeilingUse, Headroom

Lines = list[tuple[str, str]]


def headroom_lines(found: Headroom) -> Lines:
    """What a person reads, the answer first."""
    window = f"{found.rate:.3g} req/s over {found.seconds / 60:.3g} minutes"
    binding = f"bound by {words(found.binding)}" if found.binding else _undecided(found)
    lines = []
    if found.load is None or found.fits is None:
        lines.append(("cannot say", found.reason))
        lines.append(("binding", f"{binding}   {window}"))
    else:
        lines.append(("headroom", f"{_percent(found.load)} of critical   {binding}   {window}"))
        low, high = f"{found.fits.low:.2f}", f"{found.fits.high:.2f}"
        lines.append(("room", f"{found.fits.value:.2f} times today's demand fits [{low}, {high}]"))
    if found.queueing_from is not None:
        text = (
            f"starts at about {100 * found.queueing_from:.0f} % of critical: from there the ceiling"
        )
        lines.append(("queueing", f"{text} is met 5 % of the time (normal law of the occupancy)"))
    lines += [("ceiling", _ceiling(use)) for use in found.ceilings]
    fixed = f"{estimate_text(found.fixed_s)} of a step is fixed ({_percent(found.fixed_share)})"
    lines.append(("step time", f"{fixed}; {found.line}"))
    lines.append(("at least", f"{_percent(found.at_least)} of critical, whatever the step time"))
    lines.append(("to raise it", found.change.text))
    lines.append(("lengths", f"{found.law}; only their moments are known"))
    lines += [("note", note) for note in found.notes]
    return lines


def _undecided(found: Headroom) -> str:
    return f"cannot say which binds first: {' or '.join(words(name) for name in found.rivals)}"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _ceiling(use: CeilingUse) -> str:
    if use.fill is None or use.load is None or use.limit is None:
        return f"{words(use.name)}: its size is not known"
    size = f"{grouped(use.limit)}{' tokens' if use.name != 'max_num_seqs' else ''}"
    return (
        f"{words(use.name)}: alone {_percent(use.load)} of critical; a step takes "
        f"{100 * use.fill:.0f} % of {size}"
    )
