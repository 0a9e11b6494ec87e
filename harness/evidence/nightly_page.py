"""One page about a night, in Markdown: what moved, and what moved with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from analysis.numbers.formatting import estimate_text, grouped, percent, words
from analysis.operation.regression import LEAST_NIGHTS
from harness.evidence.history import Entry, limits_change
from harness.evidence.history_figure import figure
from harness.evidence.history_series import Judged, change_text
from harness.evidence.nightly import Item, Night
from harness.records.store import Store

PAGE = "nightly.md"
SAID = ("engine", "engine_version", "driver", "device", "host", "critrate")
"""Of the environment; what differs from the night before is shown."""
QUANTITIES: dict[str, tuple[str, Callable[[Entry], float | None], float, int]] = {
    "predicted critical rate": ("req/s", lambda e: e.predicted, 1.0, 2),
    "step time, most loaded run": ("ms", lambda e: e.step_s, 1e3, 3),
    "step time b0": ("ms", lambda e: e.b0_s, 1e3, 3),
    "b1 per token": ("µs", lambda e: e.b1_s_per_token, 1e6, 3),
    "b2 per KV token": ("ns", lambda e: e.b2_s_per_kv_token, 1e9, 2),
    "b3 per request": ("µs", lambda e: e.b3_s_per_request, 1e6, 2),
    "SM clock": ("MHz", lambda e: e.sm_clock_mhz, 1.0, 0),
    "KV pool": ("tokens", lambda e: float(e.pool_tokens), 1.0, 0),
}


def write_page(night: Night, folder: Path, nights: dict[str, list[Judged]]) -> Path:
    """The page and its figures into ``folder``; returns the page. Raises StoreError.

    ``nights``: the series of the history, by name.
    """
    store = Store(folder)
    for item in night.items:
        if item.entry is not None and nights.get(item.entry.name):
            name = item.entry.name
            store.write_text(_figure(item), figure({name: nights[name]}))
    store.write_text(PAGE, page(night, {n for n, found in nights.items() if found}))
    return folder / PAGE


def page(night: Night, drawn: set[str]) -> str:
    """The text of the page; ``drawn`` names the series that have a figure."""
    lines = [f"# {night.name}: {night.headline}", ""]
    lines += ["| config | status | measured [95 %] | verdict | |", "|---|---|---|---|---|"]
    for item in night.items:
        entry = item.entry
        rate = estimate_text(entry.rate) if entry else "not measured"
        outcome = words(entry.outcome) if entry else ""
        cells = (Path(item.config).name, item.status, rate, outcome, item.text)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    for item in night.items:
        if item.entry is None:
            continue
        lines += ["", f"## {item.entry.name}", "", f"{item.text}. Folder: `{item.folder}`", ""]
        if item.entry.name in drawn:
            lines += [f"![Measured critical rate by night]({_figure(item)})", ""]
        if item.night is not None and item.night.before:
            lines += moved(item.night)
    return "\n".join(lines) + "\n"


def moved(night: Judged) -> list[str]:
    """What is known of tonight beside the nights that it was compared with.

    A number has moved when it lies outside the range of those nights, where they are enough for one.
    """
    last, tonight = night.before[-1], night.entry
    changed = {n: (getattr(last, n), getattr(tonight, n)) for n in SAID}
    changed = {n: pair for n, pair in changed.items() if pair[0] != pair[1]}
    changed |= limits_change(last, tonight)
    if last.binding_observed != tonight.binding_observed:
        changed["bound by"] = (last.binding_observed, tonight.binding_observed)
    lines = [f"Changed since {last.began[:10]}: {change_text(changed) or 'nothing that is known'}."]
    why = explained(night)
    lines += ["", *([why, ""] if why else [])]
    few = len(night.before) < LEAST_NIGHTS
    lines.append(f"| | before (nights: {len(night.before)}): median [range] | tonight | | |")
    lines.append("|---|---|---|---|---|")
    for name, (unit, of, factor, decimals) in QUANTITIES.items():
        before = [x for x in map(of, night.before) if x is not None]
        now = of(tonight)
        if not before or now is None or not any((*before, now)):
            continue
        low, middle, high = min(before), statistics.median(before), max(before)
        shown = [grouped(x * factor, decimals) for x in (middle, low, high, now)]
        change = f"{_sign(now / middle - 1)}" if middle else ""
        outside = "outside the range" if not few and not low <= now <= high else ""
        lines.append(
            f"| {name} | {shown[0]} [{shown[1]}, {shown[2]}] {unit} | {shown[3]} | {change} "
            f"| {outside} |"
        )
    return lines


def explained(night: Judged) -> str:
    """How much of the change a pool and a step time that moved would make alone; empty without steps.

    Where the KV cache binds, the rate is the pool over the step time, times what requests cost.
    """
    rates = [e.rate.value for e in night.before if e.rate is not None]
    steps = [e.step_s for e in night.before if e.step_s is not None]
    tonight = night.entry
    if not steps or not rates or tonight.step_s is None or tonight.rate is None:
        return ""
    rate = tonight.rate.value / statistics.median(rates)
    step = statistics.median(steps) / tonight.step_s
    pool = tonight.pool_tokens / statistics.median(e.pool_tokens for e in night.before)
    if tonight.binding != "kv_cache":
        pool = 1.0
    return (
        f"The rate moved by {_sign(rate - 1)}: the step time alone would make {_sign(step - 1)}, "
        f"the pool {_sign(pool - 1)}; {_sign(rate / (step * pool) - 1)} is neither (medians; what "
        "scatters by chance is in it)."
    )


def _sign(share: float) -> str:
    return ("+" if share >= 0 else "-") + percent(abs(share))


def _figure(item: Item) -> str:
    return f"{Path(item.folder).name}.svg"
