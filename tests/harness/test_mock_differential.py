"""The mock server against the engine and the simulator: the same run, step by step."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from analysis.schedulers.engine import EngineLimits, Request, SGLangRules, Step
from analysis.schedulers.scheduler import engine_of
from analysis.schedulers.simulate import SECOND_NS, Simulation, simulate
from analysis.schedulers.step_time import StepTime
from harness.mock.mock import MockConfig
from harness.mock.mock_http import serve

LAW = StepTime(b0_s=0.005, b1_s_per_token=1e-5, b2_s_per_kv_token=1e-6, b3_s_per_request=2e-5)
"""Whole nanoseconds for whole tokens, so that float and integer clocks agree."""


GAUGES = (
    *("vllm:num_requests_running{", "vllm:num_requests_waiting{"),
    *("sglang:num_running_reqs{", "sglang:num_queue_reqs{"),
)


def replay(limits: EngineLimits, rows: list[dict[str, Any]]) -> None:
    """Play a step log through a fresh engine; raise AssertionError at the first difference."""
    engine = engine_of(limits)
    requests: dict[int, Request] = {}
    step: Step | None = None
    end_ns = 0
    for row in rows:
        if step is not None:
            engine.complete(step)
            if row["start_ns"] > end_ns:
                assert engine.start() is None, "idle, which the next arrival ended"
        for number, *asked, _ in row["submissions"]:
            requests[number] = Request(number, *asked)
            engine.submit(requests[number])
        for number in row["aborts"]:
            engine.abort(requests[number])
        step = engine.start()
        assert step is not None
        seen = {
            "step": step.index,
            "waiting": len(engine.waiting),
            "running": len(engine.running),
            "free_blocks": engine.free_blocks,
            "preemptions": engine.preemptions,
            "tokens": step.tokens,
            "kv_tokens": step.kv_tokens,
        }
        assert seen == {name: row[name] for name in seen}
        law_s = LAW(step.tokens, step.kv_tokens, len(step.scheduled))
        end_ns = row["start_ns"] + round(law_s * SECOND_NS)


def simulated(limits: EngineLimits, rows: list[dict[str, Any]]) -> tuple[Simulation, int]:
    """`simulate` fed with the recorded receive times, and the monotonic ns of its time zero."""
    submissions = [submission for row in rows for submission in row["submissions"]]
    origin_ns = submissions[0][-1] - SECOND_NS
    arrival_s = np.array([(s[-1] - origin_ns) / SECOND_NS for s in submissions])
    lengths = np.array([s[1:4] for s in submissions])
    (ignore_eos,) = {s[4] for s in submissions}
    horizon_s = (rows[-1]["start_ns"] - origin_ns) / SECOND_NS + 1.0
    run = simulate(limits, LAW, arrival_s, lengths, horizon_s, ignore_eos=ignore_eos)
    return run, origin_ns


def capacity(limits: EngineLimits, lengths: np.ndarray, ignore_eos: bool) -> float:
    """Requests per second of an engine whose queue is never empty, by simulation."""
    run = simulate(limits, LAW, np.zeros(len(lengths)), lengths, 1e4, ignore_eos=ignore_eos)
    return len(lengths) / (max(r.last_token_ns or 0 for r in run.records) / SECOND_NS)


def body_of(prompt: int, output: int, declared: int, ignore_eos: bool) -> dict[str, Any]:
    """A request for exactly ``output`` tokens, of which the scheduler knows ``declared``."""
    body = {"prompt": [7] * prompt, "max_tokens": declared, "stream": True}
    body |= {"ignore_eos": ignore_eos}
    if declared > output:
        body |= {"min_tokens": output - 1, "stop_token_ids": [9], "logit_bias": {"9": 100}}
    return body


async def offer(
    limits: EngineLimits,
    log: Path,
    arrival_s: np.ndarray,
    lengths: np.ndarray,
    leave: bool,
    ignore_eos: bool,
) -> list[tuple[int, int, int]]:
    """Offer the requests to a mock; (read began, read ended, waiting + running) of each scrape.

    With ``leave`` every fifth client goes away a little after it has sent its request.
    """
    loop = asyncio.get_running_loop()
    stop, port = asyncio.Event(), loop.create_future()
    config = MockConfig(limits=limits, step_time=LAW, step_log=log)
    server = asyncio.ensure_future(serve(config, port.set_result, stop))
    base = f"http://127.0.0.1:{await port}"
    scrapes: list[tuple[int, int, int]] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base, connector=connector) as session:

        async def one(number: int) -> None:
            await asyncio.sleep(float(arrival_s[number]))
            prompt, output, declared = map(int, lengths[number])
            body = body_of(prompt, output, declared, ignore_eos)
            patience_s = 0.2 if leave and number % 5 == 0 else 60.0
            try:
                async with asyncio.timeout(patience_s):
                    async with session.post("/v1/completions", json=body) as response:
                        assert (await response.text()).count("data: ") == output + 1
            except TimeoutError:
                assert patience_s < 60.0

        async def scrape() -> None:
            while True:
                began_ns = time.monotonic_ns()
                async with session.get("/metrics") as response:
                    text = await response.text()
                gauges = [
                    int(float(line.split()[-1]))
                    for line in text.splitlines()
                    if line.startswith(GAUGES)
                ]
                scrapes.append((began_ns, time.monotonic_ns(), sum(gauges)))
                await asyncio.sleep(0.02)

        scraping = asyncio.ensure_future(scrape())
        await asyncio.gather(*(one(i) for i in range(len(lengths))))
        scraping.cancel()
    stop.set()
    await server
    return scrapes


def offered(
    limits: EngineLimits,
    log: Path,
    load: float,
    count: int,
    leave: bool = False,
    ignore_eos: bool = True,
    declared_more: int = 0,
) -> tuple[list[dict[str, Any]], list[tuple[int, int, int]]]:
    """A Poisson run at ``load`` times the capacity: its step log and its scrapes."""
    rng = np.random.default_rng(7)
    outputs = rng.integers(16, 72, count)
    lengths = np.stack([rng.integers(8, 64, count), outputs, outputs + declared_more], axis=1)
    rate = load * capacity(limits, lengths, ignore_eos)
    arrival_s = 0.1 + np.cumsum(rng.exponential(1 / rate, count))
    scrapes = asyncio.run(offer(limits, log, arrival_s, lengths, leave, ignore_eos))
    return [json.loads(line) for line in log.read_text().splitlines()], scrapes


def shown_sequence(run: Simulation) -> np.ndarray:
    """Number in system that the endpoint shows from the start of each step on: what the previous
    step left, without those who came during it."""
    starts = np.array(run.steps.start_s)
    in_system = np.array(run.steps.running) + np.array(run.steps.waiting)
    left = np.sort([r.last_token_ns for r in run.records]) / SECOND_NS
    departed = np.searchsorted(left, starts + 1e-7)
    joined = in_system + departed
    return np.concatenate(([0], joined[:-1])) - departed


@pytest.mark.live
def test_wall_clock_run_is_the_simulated_run(tmp_path: Path) -> None:
    limits = EngineLimits(num_blocks=40, block_size=16, max_num_seqs=64, max_num_batched_tokens=256)
    rows, scrapes = offered(limits, tmp_path / "steps.jsonl", load=1.1, count=150)
    assert sum(len(row["submissions"]) for row in rows) == 150
    assert rows[-1]["preemptions"] > 0 and max(row["waiting"] for row in rows) > 5
    replay(limits, rows)

    run, origin_ns = simulated(limits, rows)
    starts_ns = np.round(np.array(run.steps.start_s) * SECOND_NS).astype(np.int64) + origin_ns
    assert run.steps.running.tolist() == [row["running"] for row in rows]
    assert run.steps.waiting.tolist() == [row["waiting"] for row in rows]
    assert np.abs(starts_ns - [row["start_ns"] for row in rows]).max() < 10

    shown = shown_sequence(run)
    agree = []
    for began_ns, ended_ns, in_system in scrapes:
        first = np.searchsorted(starts_ns, began_ns, side="right") - 2
        last = np.searchsorted(starts_ns, ended_ns, side="right")
        near = np.concatenate(([0], shown))[max(first + 1, 0) : last + 2]
        agree.append(in_system in near)
    assert len(agree) > 100
    assert np.mean(agree) >= 0.99


@pytest.mark.waits
@pytest.mark.parametrize("asynchronous", [False, True])
def test_replay_is_exact_when_clients_leave(tmp_path: Path, asynchronous: bool) -> None:
    limits = EngineLimits(num_blocks=60, block_size=16, async_scheduling=asynchronous)
    rows, _ = offered(limits, tmp_path / "steps.jsonl", load=2.0, count=50, leave=True)
    assert sum(len(row["aborts"]) for row in rows) > 5
    replay(limits, rows)


SGLANG = [
    pytest.param(SGLangRules(), False, True, 0, id="radix cache"),
    pytest.param(SGLangRules(radix_cache=False), False, True, 0, id="looking ahead"),
    pytest.param(SGLangRules(), True, True, 0, id="overlap"),
    pytest.param(
        SGLangRules(whole_output_of_ignore_eos=False, schedule_conservativeness=0.1),
        *(False, True, 0),
        id="over-committing",
    ),
    pytest.param(SGLangRules(schedule_conservativeness=0.1), False, False, 30, id="declared more"),
]


@pytest.mark.waits
@pytest.mark.parametrize(("rules", "overlap", "ignore_eos", "declared_more"), SGLANG)
def test_sglang_on_the_wall_clock_is_sglang_simulated(
    tmp_path: Path, rules: SGLangRules, overlap: bool, ignore_eos: bool, declared_more: int
) -> None:
    limits = EngineLimits(
        num_blocks=600,
        block_size=1,
        max_num_seqs=64,
        max_num_batched_tokens=48,
        async_scheduling=overlap,
        sglang=rules,
    )
    rows, _ = offered(
        *(limits, tmp_path / "steps.jsonl"),
        load=1.4,
        count=60,
        ignore_eos=ignore_eos,
        declared_more=declared_more,
    )
    assert sum(len(row["submissions"]) for row in rows) == 60
    retracts = rules.schedule_conservativeness < 1
    assert (rows[-1]["preemptions"] > 0) == retracts and max(r["waiting"] for r in rows) > 3
    replay(limits, rows)
    run, _ = simulated(limits, rows)
    assert run.steps.running.tolist() == [row["running"] for row in rows]
    assert run.steps.waiting.tolist() == [row["waiting"] for row in rows]


@pytest.mark.waits
@pytest.mark.parametrize("overlap", [False, True])
def test_sglang_replay_is_exact_when_clients_leave(tmp_path: Path, overlap: bool) -> None:
    limits = EngineLimits(
        num_blocks=800, block_size=4, async_scheduling=overlap, sglang=SGLangRules()
    )
    rows, _ = offered(limits, tmp_path / "steps.jsonl", load=2.0, count=50, leave=True)
    assert sum(len(row["aborts"]) for row in rows) > 5
    replay(limits, rows)
