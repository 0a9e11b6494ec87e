"""An open loop against a small streaming server in the same process."""

import asyncio
import gc
import os
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from loadgen import open_files as module
from loadgen.arrivals import poisson, run_arrivals
from loadgen.client import open_session
from loadgen.drive import TooFewFileDescriptors, drive, require_file_descriptors
from loadgen.fidelity import fidelity
from loadgen.open_files import SPARE_FILE_DESCRIPTORS
from loadgen.prompts import completion_body, make_prompts
from loadgen.records import Run

pytestmark = pytest.mark.live


def server(step_s, open_now):
    """Streams one token per ``step_s`` to everybody; ``open_now`` holds how many it serves."""

    async def answer(request):
        body = await request.json()
        prompt_tokens, tokens = len(body["prompt"]), body["max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        open_now.append(1)
        try:
            for k in range(1, tokens + 1):
                await asyncio.sleep(step_s)
                finish = '"length"' if k == tokens else "null"
                usage = f'{{"prompt_tokens":{prompt_tokens},"completion_tokens":{k}}}'
                choice = f'{{"index":0,"text":" a","finish_reason":{finish}}}'
                await response.write(f'data: {{"choices":[{choice}],"usage":{usage}}}\n\n'.encode())
            await response.write(f'data: {{"choices":[],"usage":{usage}}}\n\n'.encode())
            await response.write(b"data: [DONE]\n\n")
        finally:
            open_now.pop()
        return response

    return answer


def offer(
    arrival_s,
    *,
    tokens=5,
    step_s=0.002,
    horizon_s=1.0,
    cancel_after_s=None,
    on_record=None,
    **options,
):
    """Records of driving ``arrival_s``, with the start of the run and what the server still had."""
    count = len(arrival_s)
    lengths = np.tile(np.array([20, tokens, tokens]), (count, 1))
    prompts = make_prompts(lengths[:, 0], 1, range(3, 30_000))
    bodies = [completion_body("m", prompt, tokens, tokens) for prompt in prompts]
    records, open_now = [], []
    on_record = on_record or records.append

    async def scenario():
        app = web.Application()
        app.router.add_post("/v1/completions", server(step_s, open_now))
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
        start_ns = time.monotonic_ns() + 50_000_000
        try:
            async with open_session() as session:
                driving = asyncio.create_task(
                    drive(
                        session,
                        (url,),
                        arrival_s,
                        bodies,
                        lengths,
                        horizon_s,
                        start_ns,
                        on_record,
                        **options,
                    )
                )
                if cancel_after_s is not None:
                    await asyncio.sleep(0.05 + cancel_after_s)
                    driving.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await driving
                else:
                    await driving
        finally:
            await asyncio.sleep(0.05)
            left = len(open_now)
            await runner.cleanup()
        return start_ns, left

    start_ns, left = asyncio.run(scenario())
    return records, start_ns, left


def test_three_hundred_requests_all_recorded_and_on_time():
    run = Run(id="r", arrival_rate=150.0, horizon_s=2.0, warmup_s=0.5, seed=27)
    arrival_s = poisson(run.arrival_rate, run.horizon_s, run.seed)
    records, start_ns, left = offer(arrival_s, horizon_s=2.0, drain_s=1.0)
    assert sorted(r.id for r in records) == list(range(len(arrival_s)))
    assert {r.outcome for r in records} == {"completed"}
    assert {r.output_tokens for r in records} == {5}
    assert {r.prompt_tokens_reported for r in records} == {20}
    assert left == 0
    for r in records:
        assert r.scheduled_ns == start_ns + round(arrival_s[r.id] * 1e9)
        assert r.scheduled_ns <= r.sent_ns < r.first_token_ns < r.last_token_ns
    # How late a send may be is a matter of the machine, whose core the server here shares.
    result = fidelity(run, records, run.horizon_s, start_ns, max_lag_ms=1000.0)
    failed = {check.name for check in result.checks if check.passed is False}
    assert not failed & {"schedule", "all sent", "rate", "rejected", "failed", "lengths"}


def test_a_burst_goes_out_before_the_arrivals_that_follow():
    # The last arrival of this seed is 43 ms before the horizon: it is sent, if late.
    run = Run(id="r", arrival_rate=100.0, horizon_s=2.0, warmup_s=3.0, seed=27, preload=100)
    arrival_s = run_arrivals(run)
    records, start_ns, left = offer(arrival_s, horizon_s=2.0, drain_s=1.0)
    assert sorted(r.id for r in records) == list(range(len(arrival_s)))
    assert {r.outcome for r in records} == {"completed"}
    assert left == 0
    assert {r.scheduled_ns for r in records if r.id < 100} == {start_ns}
    sent_ns = [r.sent_ns for r in sorted(records, key=lambda r: r.id)]
    assert max(sent_ns[:100]) < start_ns + 1_000_000_000
    result = fidelity(run, records, run.horizon_s, start_ns, max_lag_ms=1000.0)
    failed = {check.name for check in result.checks if check.passed is False}
    assert not failed & {"schedule", "all sent", "burst", "rate", "rejected", "failed", "lengths"}


def test_what_is_in_flight_at_the_horizon_is_unfinished_and_stopped():
    arrival_s = np.linspace(0.0, 0.49, 50)
    records, start_ns, left = offer(arrival_s, tokens=1000, step_s=0.01, horizon_s=1.0)
    assert len(records) == 50
    assert {r.outcome for r in records} == {"unfinished"}
    assert all(r.sent_ns is not None and r.sent_ns < start_ns + 1_000_000_000 for r in records)
    received = [r.output_tokens for r in sorted(records, key=lambda r: r.id)]
    assert received[0] >= 20
    assert received[0] > received[-1]
    # The longest would go on for ten seconds if it were not stopped.
    assert all(r.last_token_ns < start_ns + 3_000_000_000 for r in records if r.last_token_ns)
    assert left == 0


def test_a_drain_lets_requests_finish_and_is_bounded():
    records, _, _ = offer(np.array([0.1, 0.18]), tokens=10, step_s=0.01, horizon_s=0.2, drain_s=5.0)
    assert [r.outcome for r in records] == ["completed", "completed"]
    started = time.monotonic()
    records, _, _ = offer(np.array([0.1]), tokens=999, step_s=0.01, horizon_s=0.2, drain_s=0.3)
    assert [r.outcome for r in records] == ["unfinished"]
    assert time.monotonic() - started < 4.5, "it did not wait for the horizon"


def test_a_slow_generator_sends_late_skips_nothing_and_is_found_out():
    run = Run(id="r", arrival_rate=100.0, horizon_s=2.0, warmup_s=0.0, seed=3)
    arrival_s = poisson(run.arrival_rate, run.horizon_s, run.seed)
    records, start_ns, _ = offer(arrival_s, horizon_s=2.0, send_delay_s=0.02)
    assert sorted(r.id for r in records) == list(range(len(arrival_s)))
    sent = sorted((r for r in records if r.sent_ns is not None), key=lambda r: r.id)
    unsent = [r for r in records if r.sent_ns is None]
    assert [r.id for r in sent] == list(range(len(sent)))
    assert 60 <= len(sent) <= 100
    assert {r.outcome for r in unsent} == {"unfinished"}
    failed = {c.name for c in fidelity(run, records, 2.0, start_ns).checks if c.passed is False}
    assert failed >= {"send lag", "all sent", "rate"}


def test_a_late_generator_keeps_the_instants_of_those_that_follow():
    arrival_s = np.array([0.0, 0.001, 0.002, 0.003, 0.4])
    records, _, _ = offer(arrival_s, horizon_s=0.6, send_delay_s=0.03)
    lag_s = [(r.sent_ns - r.scheduled_ns) / 1e9 for r in sorted(records, key=lambda r: r.id)]
    assert lag_s[3] > 0.1
    assert lag_s[4] < 0.06


def test_cancelling_records_what_was_due_and_nothing_else():
    arrival_s = np.linspace(0.0, 4.9, 50)
    records, _, left = offer(
        arrival_s, tokens=1000, step_s=0.01, horizon_s=5.0, cancel_after_s=0.55
    )
    ids = sorted(r.id for r in records)
    assert ids == list(range(len(ids)))
    assert 5 <= len(ids) < len(arrival_s)
    assert {r.outcome for r in records} == {"unfinished"}
    assert left == 0


def test_an_error_of_the_receiver_ends_the_run_and_is_raised():
    def full(record):
        raise OSError("no space left")

    started = time.monotonic()
    with pytest.raises(OSError, match="no space left"):
        offer(np.linspace(0.0, 4.9, 50), horizon_s=5.0, on_record=full)
    assert time.monotonic() - started < 4.5, "it did not wait for the horizon"


def test_progress_is_reported_and_collection_restored():
    seen = []
    offer(np.array([0.1]), horizon_s=0.3, progress=lambda *report: seen.append(report))
    assert seen
    _, sent, flying = seen[0]
    assert 0 <= flying <= sent <= 1
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_slice_keeps_the_ids_of_the_schedule():
    records, start_ns, _ = offer(np.array([0.1, 0.2]), horizon_s=0.5, drain_s=5.0, ids=[7, 3])
    assert {(r.id, r.scheduled_ns - start_ns) for r in records} == {(7, 10**8), (3, 2 * 10**8)}


def test_no_arrivals_just_pass_the_time():
    records, _, _ = offer(np.array([]), horizon_s=0.1)
    assert records == []


@pytest.mark.parametrize(
    ("arrival_s", "horizon_s"),
    [([0.2, 0.1], 1.0), ([-0.1], 1.0), ([1.0], 1.0)],
)
def test_schedules_outside_the_horizon_are_refused(arrival_s, horizon_s):
    with pytest.raises(ValueError, match="increasing and lie in"):
        offer(np.array(arrival_s), horizon_s=horizon_s)


def test_bodies_and_lengths_must_fit_the_arrivals():
    lengths = np.ones((2, 3), dtype=np.int64)
    with pytest.raises(ValueError, match="2 arrivals need 2 bodies"):
        asyncio.run(drive(None, ("",), np.array([0.1, 0.2]), [b""], lengths, 1.0, 0, print))


def test_the_file_limit_is_raised_or_its_mend_named(monkeypatch):
    limits = [(100, 1000)]
    monkeypatch.setattr(module, "_make_room", lambda needed: None)
    monkeypatch.setattr(module.resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(module.resource, "setrlimit", lambda which, pair: limits.append(pair))
    require_file_descriptors(500)
    assert limits[-1] == (1000, 1000)
    require_file_descriptors(10)
    assert len(limits) == 2
    with pytest.raises(TooFewFileDescriptors, match="ulimit -n 5128"):
        require_file_descriptors(5000)
    limits.append((100, resource.RLIM_INFINITY))
    require_file_descriptors(5000)
    assert limits[-1][0] == 5128


@pytest.mark.skipif(sys.platform != "linux", reason="its table of open files")
def test_the_table_of_open_files_does_not_grow_during_a_load():
    def table():
        (line,) = re.findall(r"FDSize:\s*(\d+)", Path("/proc/self/status").read_text())
        return int(line)

    wanted = 2 * table()
    before = len(os.listdir("/proc/self/fd"))
    require_file_descriptors(wanted - SPARE_FILE_DESCRIPTORS)
    assert table() >= wanted
    assert len(os.listdir("/proc/self/fd")) == before
