"""The self-test: what it measures, what it keeps, and what it refuses."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness.configs.config import ExperimentConfig
from harness.experiments.experiment import reach
from harness.machine.machine_limits import (
    BeyondThisMachine,
    MachineLimits,
    Needs,
    file,
    gate,
    machine,
    needs_of,
    save,
    saved,
)
from harness.machine.selftest import (
    COLD,
    INTERVAL_MS,
    LOWERED,
    RAISED,
    Step,
    offered,
    raised,
    said_of,
    sinks,
    step_of,
)
from loadgen.late_reading import LATE_S
from loadgen.records import Run
from loadgen.request_record import RequestRecord
from loadgen.workload import fixed

LIMITS = MachineLimits(
    date="2026-01-02T03:04:05+00:00",
    machine=machine(),
    send_lag_p50_ms=0.1,
    send_lag_p99_ms=0.4,
    requests_per_s=1000.0,
    tokens_per_s=64_000.0,
    sink_late_ms=0.2,
    sink_bound=False,
    streams=500,
    streams_tried=10_000,
    open_files=1024,
)
WITHIN = Needs(requests_per_s=900.0, tokens_per_s=60_000.0, streams=400)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_plan_within_reach_is_told_by_what_it_was_held() -> None:
    line = gate([WITHIN], LIMITS)
    assert "1000 requests/s" in line and "64000 streamed tokens/s" in line and "2026-01-02" in line


@pytest.mark.parametrize(
    ("changed", "figures"),
    [
        ({"requests_per_s": 1100.0}, "1100 requests/s and this machine reached 1000"),
        ({"tokens_per_s": 70_000.0}, "70000 streamed tokens/s and this machine reached 64000"),
        ({"streams": 501}, "501 open streams and this machine reached 500"),
    ],
)
def test_a_plan_beyond_reach_is_refused_with_the_figures_and_the_mend(
    changed: dict[str, Any], figures: str
) -> None:
    with pytest.raises(BeyondThisMachine, match=figures) as refused:
        gate([WITHIN, replace(WITHIN, **changed)], LIMITS)
    assert "lower the rate" in str(refused.value)


def test_several_workers_are_held_to_that_many_times_one() -> None:
    limits = replace(LIMITS, machine={**LIMITS.machine, "cores": 2})
    more = replace(WITHIN, requests_per_s=1900.0, workers=2)
    assert gate([more], limits)
    with pytest.raises(BeyondThisMachine, match="reached 2000"):
        gate([replace(more, requests_per_s=2001.0)], limits)
    # A third one has no core of its own.
    with pytest.raises(BeyondThisMachine, match="reached 2000"):
        gate([replace(more, requests_per_s=2001.0, workers=3)], limits)


def test_streams_that_met_no_limit_are_none() -> None:
    assert gate([replace(WITHIN, streams=600)], replace(LIMITS, streams=500, streams_tried=500))


def test_without_a_self_test_a_line_says_so() -> None:
    assert "`critrate selftest`" in gate([WITHIN], None)


@pytest.mark.parametrize(("rate", "tokens_per_s"), [(5.0, 50.0), (20.0, 100.0)])
def test_a_server_streams_no_faster_than_its_critical_rate(
    rate: float, tokens_per_s: float
) -> None:
    run = Run(id="000", arrival_rate=rate, horizon_s=1.0, warmup_s=0.0, seed=1)
    assert needs_of(run, 10.0, 10.0, 7) == Needs(rate, tokens_per_s, 7)


def test_an_experiment_asks_before_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(id="000", arrival_rate=20.0, horizon_s=10.0, warmup_s=0.0, seed=1)
    plan: Any = SimpleNamespace(runs=(run,))
    prediction: Any = SimpleNamespace(critical_rate=SimpleNamespace(value=10.0))
    workload = fixed(8, 100)
    targets: Any = [SimpleNamespace(url="http://a")]

    def asked(**load: Any) -> str:
        config = ExperimentConfig.model_validate(
            {
                "name": "x",
                "server": {"url": "http://a"},
                "workload": {"fixed": {"prompt": 8, "output": 100}},
                "load": load,
            }
        )
        return reach(plan, config, targets, workload, prediction)

    assert "nobody has measured" in asked()
    save(replace(LIMITS, tokens_per_s=1001.0))
    assert "1001 streamed tokens/s" in asked()
    slow = {**LIMITS.machine, "cores": 2}
    monkeypatch.setattr("harness.machine.machine_limits.machine", lambda: slow)
    save(replace(LIMITS, machine=slow, tokens_per_s=999.0))
    with pytest.raises(BeyondThisMachine, match=r"1000 streamed tokens/s .* reached 999"):
        asked()
    # Two processes can; machines of a cluster nobody has asked.
    assert "999 streamed tokens/s a process" in asked(workers=2)
    assert "not known here" in asked(workers=2, cluster="auto")


def test_what_was_kept_is_read_on_the_same_machine_alone() -> None:
    assert saved() is None
    save(LIMITS)
    assert saved() == LIMITS
    save(replace(LIMITS, machine={**LIMITS.machine, "cores": 1000}))
    assert saved() is None
    file().write_text("no JSON")
    assert saved() is None


def test_the_sink_streams_what_is_asked_and_counts_it() -> None:
    async def run() -> tuple[Step, dict[str, Any]]:
        async with sinks(INTERVAL_MS) as urls:
            step = await offered(urls, np.arange(10) / 50, 0.2, 6)
            return step, await said_of(urls[0])

    step, said = asyncio.run(run())
    assert (step.completed, step.offered) == (10, 10)
    assert step.rate == pytest.approx(50) and step.tokens_per_s == pytest.approx(300)
    assert 1 <= step.most_open <= 10
    assert step.lag_p99_ms > 0 and step.read_lag_p99_ms > 0
    # Counted anew since it was asked last.
    assert said["requests"] == 0


@pytest.mark.parametrize(("limit", "factor"), [(150.0, RAISED), (400.0, RAISED), (50.0, LOWERED)])
def test_the_rate_is_raised_or_lowered_until_the_limit_lies_between(
    limit: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tried(urls: object, rate: float, seconds: float) -> Step:
        lag_ms = 0.1 if rate <= limit else 9.0
        return Step(rate, lag_ms, lag_ms, 0.0, 10, 10, 64 * rate, 1, 0.0)

    monkeypatch.setattr("harness.machine.selftest.tried", tried)
    best, last = asyncio.run(raised([], 1.0, 1e6, lambda line: None))
    assert best.rate <= limit < last.rate == pytest.approx(best.rate * factor)


def test_a_machine_too_busy_for_any_rate_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def tried(urls: object, rate: float, seconds: float) -> Step:
        return Step(rate, 9.0, 9.0, 0.0, 10, 10, 64 * rate, 1, 0.0)

    monkeypatch.setattr("harness.machine.selftest.tried", tried)
    with pytest.raises(BeyondThisMachine, match=r"at 13 requests/s .* 9\.0 ms"):
        asyncio.run(raised([], 1.0, 1e6, lambda line: None))


@pytest.mark.parametrize(
    ("sent_late_ms", "first_late_ms", "last_late_ms", "had_late_ms", "outcome", "reached"),
    [
        (0.5, 1.0, 1.0, 0.0, "completed", True),
        (6.0, 1.0, 1.0, 0.0, "completed", False),
        (0.5, 50.0, 1.0, 0.0, "completed", False),
        (0.5, 1.0, 50.0, 0.0, "completed", False),
        (0.5, 1.0, 1.0, 50.0, "completed", False),
        (0.5, 1.0, 1.0, 0.0, "failed", False),
    ],
)
def test_a_load_is_reached_when_it_is_sent_and_read_in_time(
    sent_late_ms: float,
    first_late_ms: float,
    last_late_ms: float,
    had_late_ms: float,
    outcome: Any,
    reached: bool,
) -> None:
    first_ms = INTERVAL_MS + first_late_ms
    took_ms = 64 * INTERVAL_MS + last_late_ms
    record = RequestRecord(
        id=0,
        scheduled_ns=0,
        sent_ns=round(sent_late_ms * 1e6),
        first_token_ns=round((sent_late_ms + first_ms) * 1e6),
        last_token_ns=round((sent_late_ms + took_ms) * 1e6),
        prompt_tokens=1,
        output_tokens_designed=64,
        max_tokens=64,
        output_tokens=64,
        prompt_tokens_reported=1,
        outcome=outcome,
    )
    had_ns = round((sent_late_ms + took_ms + 1e3 * LATE_S + had_late_ms) * 1e6)
    step = step_of([(record, had_ns)], 100.0, 64, [{"open_most": 1, "late_p99_ms": 0.1}])
    assert step.reached is reached


def test_the_first_requests_open_connections_and_are_not_held_against_the_rate() -> None:
    def sent_late(number: int, late_ms: float) -> tuple[RequestRecord, int]:
        due_ns = number * 10_000_000
        record = RequestRecord(
            id=number,
            scheduled_ns=due_ns,
            sent_ns=due_ns + round(late_ms * 1e6),
            first_token_ns=due_ns + 5_000_000,
            last_token_ns=due_ns + round(64 * INTERVAL_MS * 1e6),
            prompt_tokens=1,
            output_tokens_designed=64,
            max_tokens=64,
            output_tokens=64,
            prompt_tokens_reported=1,
            outcome="completed",
        )
        return record, due_ns + round(1e9 * LATE_S)

    said = [{"open_most": 1, "late_p99_ms": 0.1}]
    cold = [sent_late(i, 6.0 if i < COLD else 0.2) for i in range(200)]
    # Records come in the order of their ends.
    assert step_of(cold[::-1], 100.0, 64, said).lag_p99_ms == pytest.approx(0.2)
    late = [sent_late(i, 6.0 if i % 20 == 0 else 0.2) for i in range(200)]
    assert not step_of(late, 100.0, 64, said).reached
