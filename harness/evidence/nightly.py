"""A night: experiments one after another, each into the history, and what they say against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from harness.configs.config import ConfigError
from harness.evidence.history import Entry, History
from harness.evidence.history_entry import entry_of
from harness.evidence.history_series import Judged, change_text, series, usable
from harness.exits import INTERRUPT_EXIT, JUDGED
from harness.records.store import Store
from harness.records.streams import StoreError, as_json, finite

Status = Literal["fine", "regression", "refuted", "not measured"]
Measure = Callable[[Path, Path], int]
"""Carries a config out into a folder and returns the exit status of ``critrate run``."""
FINE_EXIT, REGRESSION_EXIT, NOT_MEASURED_EXIT = 0, 10, 2
"""As of ``critrate run``: 10 is a claim that was refuted, here also that tonight is as before."""
WEBHOOK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What became of one config."""

    config: str
    folder: str
    status: Status
    text: str
    """One sentence: what the history says, or why nothing was measured."""
    night: Judged | None = None
    entry: Entry | None = None


@dataclass(slots=True)
class Night:
    """All configs of one night, in their order; those after an interrupt are not there."""

    name: str
    items: list[Item] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """130 interrupted, 10 a regression or a refuted prediction, 2 something was not measured."""
        states = {item.status for item in self.items}
        if self.interrupted:
            return INTERRUPT_EXIT
        if states & {"regression", "refuted"}:
            return REGRESSION_EXIT
        return NOT_MEASURED_EXIT if "not measured" in states else FINE_EXIT

    @property
    def headline(self) -> str:
        counts = {s: sum(i.status == s for i in self.items) for s in (i.status for i in self.items)}
        said = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing begun"
        return f"interrupted; {said}" if self.interrupted else said


def run_night(
    configs: Sequence[Path],
    history: History,
    folder: Path,
    measure: Measure,
    say: Callable[[str], None],
) -> Night:
    """Carry out every config and judge it. Results go to folders below ``folder``.

    A config that fails does not stop the others. An interrupt ends the night: what was finished by
    then is in the history.
    """
    night = Night(name=folder.name)
    names: set[str] = set()
    for config in configs:
        name = _free(config.stem, names)
        try:
            item = _one(config, folder / name, history, measure)
        except KeyboardInterrupt:
            night.interrupted = True
            say(f"{name}: interrupted")
            break
        night.items.append(item)
        say(f"{name}: {item.status}: {item.text}")
    return night


def _one(config: Path, folder: Path, history: History, measure: Measure) -> Item:
    def missed(why: str, entry: Entry | None = None) -> Item:
        # A prediction that was refuted is so whatever became of the history.
        status: Status = "refuted" if entry and entry.outcome == "refuted" else "not measured"
        return Item(config=str(config), folder=str(folder), status=status, text=why, entry=entry)

    try:
        status = measure(config, folder)
        if status not in JUDGED:
            return missed(f"critrate run ended with status {status}: {_last_line(folder)}")
        entry = entry_of(Store.open(folder))
    except (ConfigError, StoreError, OSError, KeyError, ValueError) as error:
        return missed(f"{type(error).__name__}: {error}")
    try:
        history.append([entry])
        nights = series(history.entries())[entry.name]
    except StoreError as error:
        return missed(f"measured, but not compared: {error}", entry)
    if not usable(entry):
        return missed(f"{entry.outcome}: no critical rate that could be compared", entry)
    judged = next(n for n in nights if n.entry.experiment == entry.experiment)
    return Item(
        config=str(config),
        folder=str(folder),
        status=_status(judged),
        text=_text(judged),
        night=judged,
        entry=entry,
    )


def _last_line(folder: Path) -> str:
    log = folder.with_name(f"{folder.name}.log")
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"{said[-1]} ({log})" if said else f"it said nothing ({log})"


def _status(night: Judged) -> Status:
    if night.answer is not None and night.answer.answer == "regression":
        return "regression"
    return "refuted" if night.entry.outcome == "refuted" else "fine"


def _text(night: Judged) -> str:
    broke = change_text(night.broke)
    if night.answer is None:
        return f"another config than before ({broke})" if broke else "the first night of this name"
    if broke:
        return f"after a break ({broke}), against the nights before it: {night.answer.text}"
    return night.answer.text


def _free(stem: str, names: set[str]) -> str:
    name, number = stem, 2
    while name in names:
        name, number = f"{stem}-{number}", number + 1
    names.add(name)
    return name


# -- webhook -------------------------------------------------------------------------------------


def webhook_body(night: Night) -> dict[str, Any]:
    """What a webhook is sent: plain data; ``text`` is what chat services show."""
    return {
        "schema": 1,
        "text": f"critrate {night.name}: {night.headline}",
        "exit_code": night.exit_code,
        "experiments": [
            {
                "config": item.config,
                "folder": item.folder,
                "status": item.status,
                "text": item.text,
                "outcome": item.entry and item.entry.outcome,
                "measured": item.entry and item.entry.rate and item.entry.rate.to_dict(),
                "change": item.night
                and item.night.answer
                and item.night.answer.change
                and item.night.answer.change.to_dict(),
            }
            for item in night.items
        ],
    }


async def post(url: str, body: dict[str, Any], timeout_s: float = WEBHOOK_S) -> str | None:
    """One POST of JSON, no redirect followed, no second attempt. Returns why it failed, or None.

    The reason does not show the URL: such URLs are often secrets.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    data = json.dumps(finite(json.loads(as_json(body)))).encode()
    headers = {"Content-Type": "application/json"}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=data, headers=headers, allow_redirects=False) as answer,
        ):
            return None if answer.status < 300 else f"it answered {answer.status}"
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except aiohttp.InvalidURL:
        return "its URL is none: give http://... or https://..."
    except (aiohttp.ClientError, OSError) as error:
        return f"{type(error).__name__}"
