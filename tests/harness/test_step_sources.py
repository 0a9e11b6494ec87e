"""What is read of an engine's own books, from lines and pages as the engines write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.calibration.probe_readings import Iteration
from harness.servers.engines import SGLANG, VLLM
from harness.servers.step_sources import iterations_of, read_sources, told_between
from tests.harness.served import with_pages

LINE = (
    "(APIServer pid=1) INFO 11-22 05:00:00 [loggers.py:205] Engine 000: Iteration(17): 2 context "
    "requests, 96 context tokens, 5 generation requests, 5 generation tokens, iteration elapsed time: "
    "6.25 ms, GPU KV cache usage: 3.1%\n"
)
DUMMY = LINE.replace("6.25 ms", "6.25 ms (dummy)")


@pytest.mark.parametrize(
    ("text", "count"), [(LINE, 1), (LINE + "INFO other\n" + LINE, 2), (DUMMY, None), ("", None)]
)
def test_iterations_are_read_from_the_log(text: str, count: int | None) -> None:
    found = iterations_of(text)
    assert (None if found is None else len(found)) == count
    if found is not None:
        assert found[0] == Iteration(
            context_requests=2,
            context_tokens=96,
            generation_requests=5,
            generation_tokens=5,
            elapsed_s=0.00625,
        )


def test_a_probe_is_told_what_was_logged_during_it_alone(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"

    async def two_readings(session, url):
        log.write_text(LINE)
        before = await read_sources(session, url, VLLM, log)
        with log.open("a") as file:
            file.write(LINE + LINE)
        return before, await read_sources(session, url, VLLM, log)

    before, after = with_pages({}, two_readings)
    told = told_between(before, after, log)
    assert told.iterations is not None and len(told.iterations) == 2
    assert told.decode_moments is None and told.prefill_busy_s is None


@pytest.mark.parametrize(
    ("rank", "moments", "busy_us"),
    [
        ({"decode_moments": [3, 4, 5.0, 6, 7, 8], "total_prefill_busy_us": 9}, (3, 4, 5, 6, 7), 9),
        # Before the first decode step the list is null.
        ({"decode_moments": None, "total_prefill_busy_us": 0}, (0, 0, 0, 0, 0), 0),
        # An older server does not know it.
        ({"num_running_reqs": 0}, None, None),
    ],
)
def test_the_sums_of_sglang(rank, moments, busy_us) -> None:
    async def read(session, url):
        return await read_sources(session, url, SGLANG, None)

    reading = with_pages({"/v1/loads": {"loads": [rank]}}, read)
    assert reading.decode_moments == moments and reading.prefill_busy_us == busy_us
    assert reading.log_bytes is None


def test_a_server_without_the_page_shows_nothing() -> None:
    async def read(session, url):
        return await read_sources(session, url, SGLANG, None)

    reading = with_pages({}, read)
    told = told_between(reading, reading, None)
    assert told.decode_moments is None and told.iterations is None and told.prefill_tokens is None
