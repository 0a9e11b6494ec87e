"""One schedule from several processes against a small streaming server in this one."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loadgen import workers as module
from loadgen.workers import WorkerFailed, ready_workers, workers_for

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 3
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(pause_s, seen):
    """The URL of a server that answers with `TOKENS` events, this long apart; ``seen`` gets path and
    body of every request."""
    writers = []

    async def talk(reader, writer):
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                seen.append((head.split()[1].decode(), json.loads(await reader.readexactly(size))))
                writer.write(HEAD)
                for k in range(1, TOKENS + 1):
                    await asyncio.sleep(pause_s)
                    finish = '"length"' if k == TOKENS else "null"
                    usage = f'{{"prompt_tokens":1,"completion_tokens":{k}}}'
                    event = (
                        f'data: {{"choices":[{{"finish_reason":{finish}}}],"usage":{usage}}}\n\n'
                    )
                    writer.write(f"{len(event):x}\r\n{event}\r\n".encode())
                writer.write(b"0\r\n\r\n")

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def offer(
    arrival_s,
    *,
    count=2,
    horizon_s=1.0,
    pause_s=0.001,
    paths=("/a", "/b", "/c"),
    meanwhile=None,
    **options,
):
    """Records, what was lost, what the server saw, and the start."""
    lengths = np.tile(np.array([1, TOKENS, TOKENS]), (len(arrival_s), 1))
    bodies = [json.dumps({"number": i}).encode() for i in range(len(arrival_s))]
    records, seen = [], []

    async def scenario():
        async with serving(pause_s, seen) as url:
            urls = [url + path for path in paths]
            ready = ready_workers(count, {}, urls, arrival_s, bodies, lengths, horizon_s, **options)
            async with ready as load:
                start_ns = time.monotonic_ns() + 100_000_000
                offering = asyncio.create_task(load.offer(start_ns, records.append))
                if meanwhile is not None:
                    await meanwhile(load, offering, records)
                lost = await asyncio.gather(offering, return_exceptions=True)
            assert all(worker.process.returncode is not None for worker in load.processes)
        return start_ns, lost[0]

    start_ns, lost = asyncio.run(scenario())
    return records, lost, seen, start_ns


def test_all_slices_together_are_the_schedule_one_for_one():
    arrival_s = np.sort(np.random.default_rng(1).random(60)) * 0.4
    records, lost, seen, start_ns = offer(arrival_s, count=3, drain_s=20.0)
    assert lost == ()
    assert sorted(r.id for r in records) == list(range(60))
    assert {r.outcome for r in records} == {"completed"}
    for r in records:
        assert r.scheduled_ns == start_ns + round(arrival_s[r.id] * 1e9) <= r.sent_ns
        assert (r.output_tokens, r.prompt_tokens, r.max_tokens) == (TOKENS, 1, TOKENS)
    # Request i goes to the URL number i mod 3, whichever worker sends it.
    assert {(path, body["number"] % 3) for path, body in seen} == {("/a", 0), ("/b", 1), ("/c", 2)}
    assert sorted(body["number"] for _, body in seen) == list(range(60))


def test_what_is_in_flight_at_the_horizon_or_the_interrupt_is_recorded():
    async def interrupt(load, offering, records):
        while sum(worker.sent for worker in load.processes) < 8:
            await asyncio.sleep(0.02)
        offering.cancel()

    arrival_s = np.concatenate([np.linspace(0.0, 0.01, 10), [50.0]])
    records, error, _, _ = offer(arrival_s, horizon_s=60.0, pause_s=30.0, meanwhile=interrupt)
    assert isinstance(error, asyncio.CancelledError)
    assert sorted(r.id for r in records) == list(range(10))
    assert {r.outcome for r in records} == {"unfinished"}
    records, lost, _, _ = offer(arrival_s[:10], count=1, horizon_s=0.5, pause_s=30.0)
    assert lost == ()
    assert [r.outcome for r in records] == ["unfinished"] * 10


def test_a_lost_worker_is_told_and_keeps_what_was_recorded():
    async def kill(load, offering, records):
        while len(records) < 20:
            await asyncio.sleep(0.02)
        load.processes[0].process.kill()

    arrival_s = np.concatenate([np.linspace(0.0, 0.01, 20), np.linspace(3.5, 3.6, 20)])
    records, lost, _, _ = offer(arrival_s, horizon_s=4.0, drain_s=10.0, meanwhile=kill)
    assert len(lost) == 1
    assert re.match(
        r"worker 1 of 2 of the load was lost after \d+ requests: exit status -9", lost[0]
    )
    ids = {r.id for r in records}
    assert ids >= set(range(20)) | set(range(21, 40, 2))
    assert not ids & set(range(20, 40, 2))


def test_an_error_of_the_receiver_ends_the_load_and_is_raised():
    def full(record):
        raise OSError("no space left")

    async def scenario():
        async with serving(0.001, []) as url:
            lengths = np.ones((1, 3), dtype=np.int64)
            ready = ready_workers(1, {}, [url], np.zeros(1), [b'{"number": 0}'], lengths, 60.0)
            async with ready as load:
                await load.offer(time.monotonic_ns(), full)

    with pytest.raises(OSError, match="no space left"):
        asyncio.run(scenario())


def test_a_worker_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(module, "ROOT", "/nowhere")
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(
        WorkerFailed, match="worker 1 of 1 of the load did not start: exit status 1"
    ):
        offer(np.zeros(1), count=1)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="increasing and lie in"):
        offer(np.array([0.2, 0.1]))

    async def secure():
        lengths = np.ones((1, 3), dtype=np.int64)
        async with ready_workers(2, {}, ["https://a"], np.zeros(1), [b""], lengths, 1.0):
            pass

    with pytest.raises(ValueError, match="plain HTTP"):
        asyncio.run(secure())


def test_workers_end_with_the_process_that_started_them_however_it_ends():
    parent = """
import asyncio, os, time, numpy as np
from loadgen.workers import ready_workers
async def main():
    lengths = np.ones((4, 3), dtype=np.int64)
    urls, arrival_s = ["http://127.0.0.1:9/"], np.arange(4.0) * 20
    async with ready_workers(2, {}, urls, arrival_s, [b""] * 4, lengths, 100.0) as load:
        print(*(worker.process.pid for worker in load.processes), flush=True)
        await load.offer(time.monotonic_ns(), print)
asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline_s = time.monotonic() + 30.0
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline_s, "a worker outlived its parent"
        time.sleep(0.05)


def alive(pid):
    """Is there such a process, and not only its remains?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("worker", ("numpy", "aiohttp", "pandas", "scipy", "pydantic", "multiprocessing")),
        ("drive", ("pandas", "scipy", "pydantic", "multiprocessing")),
    ],
)
def test_a_generator_imports_only_what_it_needs(module, heavy):
    code = f"import sys, loadgen.{module}; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("tokens_per_s", "cores", "workers"),
    [
        (500.0, 8, 1),
        (10_000.0, 8, 1),
        (10_001.0, 8, 2),
        (200_000.0, 8, 5),
        (1e6, 8, 8),
        (1e6, 1, 1),
    ],
)
def test_as_many_workers_as_the_tokens_take(tokens_per_s, cores, workers):
    assert workers_for(tokens_per_s, cores) == workers
