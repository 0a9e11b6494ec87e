"""A night's body with a stand-in for the experiment: history, exit status, page and webhook."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from harness.evidence.history import History
from harness.evidence.nightly import post, run_night
from harness.experiments import one_run
from tests.harness.past_nights import finished, kept_entry, past
from tests.scripts.program import script

STEADY = [1.0, 1.002, 0.998, 1.004, 0.997, 1.001, 0.999, 1.003]
KEPT = kept_entry()
HALF = 28.0 / json.loads((Path(KEPT.folder) / "verdict.json").read_text())["measured"]["value"]
"""The past nights' rate over that of the kept experiment."""


def gives(status: int = 0, factor: float = HALF, **changes: Any) -> Callable[[Path, Path], int]:
    """An experiment of tonight that ends so."""

    def measure(config: Path, folder: Path) -> int:
        if status in (0, 10, 11, 12, 13):
            finished(folder, "2026-11-30T02:00:00+00:00", factor, **changes)
        return status

    return measure


def night(tmp_path: Path, measure: Callable[[Path, Path], int], *arguments: str) -> tuple[int, str]:
    """Exit status and page of a night after eight steady ones."""
    path = tmp_path / "h.sqlite"
    if not path.exists():
        History(path).append(past(STEADY))
    words = ["--history", str(path), "--out", str(tmp_path / "nightly"), *arguments]
    status = script("nightly").main(words, measure)
    (page,) = (tmp_path / "nightly").glob("*/nightly.md")
    return status, page.read_text()


@pytest.mark.parametrize(
    "measure, status, headline",
    [
        (gives(), 0, "1 fine"),
        (gives(11, outcome="inconclusive"), 0, "1 fine"),
        (gives(10, outcome="refuted"), 10, "1 refuted"),
        (gives(0, 0.92 * HALF), 10, "1 regression"),
        (gives(0, 1.08 * HALF), 0, "1 fine"),
        (gives(13, outcome="invalid"), 2, "1 not measured"),
        (gives(11, measured=None, outcome="inconclusive"), 2, "1 not measured"),
        (gives(2), 2, "1 not measured"),
        (gives(1), 2, "1 not measured"),
    ],
)
def test_exit_status_and_headline(
    tmp_path: Path, measure: Callable[[Path, Path], int], status: int, headline: str
) -> None:
    history = History(tmp_path / "h.sqlite")
    history.append(past(STEADY))
    said: list[str] = []
    found = run_night([Path("a.yaml")], history, tmp_path / "night", measure, said.append)
    assert (found.exit_code, found.headline) == (status, headline)
    assert said[0].startswith(f"a: {headline[2:]}: ")


def test_the_page_says_what_moved_and_how_much_of_it_the_step_time_makes(tmp_path: Path) -> None:
    verdict = json.loads((Path(KEPT.folder) / "verdict.json").read_text())
    for run in verdict["runs"]:
        for key in ("value", "low", "high"):
            run["step_time_s"][key] *= 1.087
    slower = gives(0, 0.92 * HALF, runs=verdict["runs"])
    _, page = night(tmp_path, slower, "a.yaml")
    assert "lower than by chance: -8.0" in page
    assert "the step time alone would make -8.0 %, the pool +0.0 %; -0.0 % is neither" in page
    moved = [line for line in page.splitlines() if line.endswith("outside the range |")]
    assert [line.split("|")[1].strip() for line in moved] == ["step time, most loaded run"]
    (drawing,) = (tmp_path / "nightly").glob("*/a.svg")
    assert f"]({drawing.name})" in page


def test_a_changed_engine_is_a_break_on_the_page(tmp_path: Path) -> None:
    History(tmp_path / "h.sqlite").append(
        [replace(n, engine_version="0.31.9") for n in past(STEADY)]
    )
    status, page = night(tmp_path, gives(0, 0.92 * HALF), "a.yaml")
    assert status == 10
    assert "after a break (engine_version 0.31.9 to 0.32.0)" in page
    assert "Changed since 2026-11-08: engine_version 0.31.9 to 0.32.0" in page


def test_one_config_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    def measure(config: Path, folder: Path) -> int:
        if config.name == "b.yaml":
            raise OSError("no such interpreter")
        return gives()(config, folder)

    status, page = night(tmp_path, measure, "a.yaml", "b.yaml", "other/a.yaml")
    assert status == 2
    assert page.splitlines()[0].endswith("2 fine, 1 not measured")
    assert "no such interpreter" in page
    # Both experiments began in the same environment at the same second: one row.
    assert len(History(tmp_path / "h.sqlite").entries()) == 9


def test_an_interrupt_keeps_what_was_finished(tmp_path: Path) -> None:
    def measure(config: Path, folder: Path) -> int:
        if config.name == "b.yaml":
            raise KeyboardInterrupt
        return gives()(config, folder)

    status, page = night(tmp_path, measure, "a.yaml", "b.yaml", "c.yaml")
    assert status == 130
    assert page.splitlines()[0].endswith(": interrupted; 1 fine")
    assert len(History(tmp_path / "h.sqlite").entries()) == 9


def test_a_history_that_cannot_be_written_hides_no_refutation(tmp_path: Path) -> None:
    (tmp_path / "h.sqlite").write_text("no database" * 99)
    words = ["a.yaml", "--history", str(tmp_path / "h.sqlite"), "--out", str(tmp_path / "n")]
    assert script("nightly").main(words, gives()) == 2
    again = [*words[:-1], str(tmp_path / "m")]
    assert script("nightly").main(again, gives(10, outcome="refuted")) == 10


def test_why_nothing_was_measured_is_what_the_program_said_last(tmp_path: Path) -> None:
    def measure(config: Path, folder: Path) -> int:
        folder.with_name(f"{folder.name}.log").write_text("starting\nerror  no such file\n\n")
        return 2

    status, page = night(tmp_path, measure, "a.yaml")
    assert status == 2
    assert "critrate run ended with status 2: error  no such file (" in page


def test_an_experiment_that_hangs_is_told_to_end_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\ntrap 'exit 11' TERM\nwhile :; do sleep 0.05; done\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(one_run.sys, "executable", str(hangs))
    assert one_run.run_config(Path("a.yaml"), tmp_path / "a", limit_s=1.0) == 11


def served(status: int, wait_s: float, body: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """What `post` says of a server that answers so, and what that got."""

    async def run() -> tuple[str | None, list[Any]]:
        got: list[Any] = []

        async def answer(request: web.Request) -> web.Response:
            got.append(await request.json())
            await asyncio.sleep(wait_s)
            return web.Response(status=status, headers={"Location": "/again"})

        app = web.Application()
        app.router.add_post("/hook", answer)
        app.router.add_route("*", "/again", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        said = await post(f"http://{host}:{port}/hook", body, timeout_s=0.3)
        await runner.cleanup()
        return said, got

    return asyncio.run(run())


@pytest.mark.parametrize(
    "status, wait_s, says",
    [
        (204, 0.0, None),
        (500, 0.0, "it answered 500"),
        (302, 0.0, "it answered 302"),
        (200, 5.0, "no answer within 0.3 s"),
    ],
)
def test_a_webhook_gets_one_post(status: int, wait_s: float, says: str | None) -> None:
    said, got = served(status, wait_s, {"rate": float("nan")})
    assert said == says
    assert got == [{"rate": None}]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/secret", "no url"])
def test_a_webhook_that_fails_is_a_warning_without_its_url(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    status, _ = night(tmp_path, gives(), "a.yaml", "--webhook", url)
    said = capsys.readouterr().err
    assert status == 0
    assert said.startswith("warning: the webhook was not told") and "secret" not in said
