"""Several machines: their slices are the schedule, their clocks become one, a lost one is said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.live.ray_load import (
    ClusterFailed,
    NodeClock,
    Offset,
    best,
    on_driver_clock,
    ready_senders,
)
from harness.machine.selftest import sinks
from loadgen.request_record import RequestRecord

SECOND_NS = 10**9
NANOSECONDS = st.integers(0, 10**15)


@settings(max_examples=25)
@given(
    st.integers(-(10**12), 10**12),
    st.lists(st.tuples(NANOSECONDS, st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1),
)
def test_the_offset_is_within_its_error_whatever_the_ways_take(
    offset_ns: int, ways: list[tuple[int, int, int]]
) -> None:
    exchanges = [(t, t + there + offset_ns, t + there + back) for t, there, back in ways]
    found = best(exchanges)
    assert abs(found.offset_ns - offset_ns) <= found.error_ns
    assert found.error_ns <= min(there + back + 1 for _, there, back in ways) / 2 + 1


@settings(max_examples=25)
@given(st.integers(-(10**14), 10**14), st.floats(-1e-4, 1e-4), st.floats(0.0, 3600.0))
def test_an_evenly_drifting_clock_is_mapped_back(offset_ns: int, drift: float, at_s: float) -> None:
    def theirs(t_ns: int) -> int:
        return t_ns + offset_ns + round(drift * t_ns)

    ends = [Offset(t, theirs(t) - t, 0) for t in (0, 3600 * SECOND_NS)]
    clock = NodeClock("n", *ends)
    t_ns = round(at_s * SECOND_NS)
    # Its second-order term: the drift over the time that the offset itself is off by.
    assert abs(clock.to_driver(theirs(t_ns)) - t_ns) <= 3600e9 * drift**2 + 2


def test_without_a_second_estimate_the_first_one_holds() -> None:
    clock = NodeClock("n", Offset(5, 100, 7), None)
    assert (clock.to_driver(1100), clock.error_ns) == (1000, 7)


def test_a_record_keeps_what_did_not_happen() -> None:
    record = record_of(0, sent_ns=1000)
    clock = NodeClock("n", Offset(0, 400, 1), Offset(10, 400, 1))
    mapped = on_driver_clock(record, clock)
    assert (mapped.sent_ns, mapped.first_token_ns) == (600, None)


@pytest.mark.parametrize("actors", [1, 2, 3, 7])
def test_the_slices_together_are_the_schedule(actors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arrival_s = np.arange(10) / 10
    bodies = [b"%d" % index for index in range(10)]
    lengths = np.arange(30).reshape(10, 3)
    ray = stand_in(monkeypatch)

    async def made() -> None:
        schedule = (["http://a"], arrival_s, bodies, lengths, 1.0)
        async with ready_senders("local:2", actors, {}, *schedule):
            pass

    asyncio.run(made())
    parts = [sender.part for sender in ray.senders]
    rows = [
        (id, float(arrival), body, tuple(length))
        for part in parts
        for id, arrival, body, length in zip(
            part.ids, part.arrival_s, part.bodies, part.lengths.tolist(), strict=True
        )
    ]
    wanted = zip(range(10), arrival_s.tolist(), bodies, map(tuple, lengths.tolist()), strict=True)
    assert sorted(rows) == list(wanted)


def test_what_comes_back_is_the_schedule_on_this_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    records, lost, clocks, _ = offered(monkeypatch)
    assert [record.id for record in records] == list(range(6))
    assert {record.outcome for record in records} == {"completed"}
    assert all((record.sent_ns or 0) > record.scheduled_ns - 10**7 for record in records)
    assert lost == () and len(clocks) == 2
    # The stand-in's actors have this very clock.
    assert all(abs(clock.before.offset_ns) <= clock.before.error_ns for clock in clocks)


def test_a_lost_actor_is_said_and_its_requests_have_no_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records, lost, clocks, _ = offered(monkeypatch, lose=1)
    assert [record.id for record in records] == [0, 2, 4]
    assert lost == ("sender 2 of 2 was lost, with all of its records",)
    assert clocks[1].after is None


def test_an_actor_that_is_lost_behind_its_records_costs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records, lost, clocks, _ = offered(monkeypatch, lose=1, at="clock_ns")
    assert [record.id for record in records] == list(range(6))
    assert lost == () and [clock.after is None for clock in clocks] == [False, True]


def test_how_far_the_actors_are_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.load.PROGRESS_INTERVAL_S", 0.02)
    monkeypatch.setattr("harness.live.ray_load.PROGRESS_INTERVAL_S", 0.02)
    *_, said = offered(monkeypatch)
    elapsed_s, sent, in_flight = said[-1]
    assert sent == 6 and 0 <= in_flight <= 6 and elapsed_s > 0.0


def test_a_load_that_is_stopped_hands_over_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    records, *_ = offered(monkeypatch, tokens=5000, stop_after_s=0.4)
    assert [record.id for record in records] == list(range(6))
    assert {record.outcome for record in records} == {"unfinished"}
    early, *_ = offered(monkeypatch, tokens=5000, stop_after_s=0.11)
    assert [record.id for record in early] == list(range(len(early)))


def test_a_cluster_that_cannot_be_had_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = stand_in(monkeypatch)

    def nobody(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", nobody)

    async def made(cluster: str) -> None:
        schedule = (["http://a"], np.arange(2.0), [b""] * 2, np.ones((2, 3), int), 2.0)
        async with ready_senders(cluster, 1, {}, *schedule):
            pass

    with pytest.raises(ClusterFailed, match=r"load.cluster auto: Could not find any running Ray"):
        asyncio.run(made("auto"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterFailed, match="not installed"):
        asyncio.run(made("local:2"))
    stand_in(monkeypatch, busy=True)
    monkeypatch.setattr("harness.live.ray_load.READY_TIMEOUT_S", 0.05)
    with pytest.raises(ClusterFailed, match="each needs a free CPU"):
        asyncio.run(made("local:2"))


# -- a stand-in for Ray: its actors are threads ----------------------------------------------------


class ActorDied(Exception):
    """What Ray raises of an actor that is gone."""


class StandInRay:
    """Just what ready_senders asks of Ray; actor number ``lose`` dies when it is to offer, or of what
    ``at`` says, once it has."""

    exceptions = SimpleNamespace(RayActorError=ActorDied)

    def __init__(self, lose: int | None, busy: bool, at: str) -> None:
        self.lose = lose
        self.at = at
        self.busy = busy
        self.senders: list[Any] = []
        self.pool = ThreadPoolExecutor(16)

    def init(self, **arguments: Any) -> None:
        pass

    def shutdown(self) -> None:
        self.pool.shutdown()

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "stand-in")

    def remote(self, **options: Any) -> Callable[[type], Any]:
        return lambda kind: SimpleNamespace(remote=lambda: self.actor(kind()))

    def actor(self, sender: Any) -> Any:
        dies = len(self.senders) == self.lose
        self.senders.append(sender)

        def die(*arguments: object) -> None:
            raise ActorDied

        def once_offered(sender: Any, function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda: die() if sender.at[0] else function()

        def call(name: str) -> Any:
            function = getattr(sender, name)
            if dies and name == self.at:
                function = die if name == "offer" else once_offered(sender, function)
            if self.busy:
                return SimpleNamespace(remote=lambda *_: SimpleNamespace(future=Future))

            def remote(*arguments: object) -> Any:
                future = self.pool.submit(function, *arguments)
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=remote)

        names = ("node", "clock_ns", "take", "offer", "state", "stop")
        return SimpleNamespace(**{name: call(name) for name in names})


def stand_in(
    monkeypatch: pytest.MonkeyPatch,
    lose: int | None = None,
    busy: bool = False,
    at: str = "offer",
) -> StandInRay:
    ray = StandInRay(lose, busy, at)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setattr("harness.live.ray_load.EXCHANGES", 5)
    return ray


def offered(
    monkeypatch: pytest.MonkeyPatch,
    lose: int | None = None,
    tokens: int = 2,
    stop_after_s: float | None = None,
    at: str = "offer",
) -> tuple[list[RequestRecord], tuple[str, ...], tuple[NodeClock, ...], list[Any]]:
    """Six requests from two actors: the records, who was lost, the clocks, and what was said."""
    stand_in(monkeypatch, lose, at=at)
    body = json.dumps({"max_tokens": tokens, "prompt": [1], "stream": True}).encode()
    records: list[RequestRecord] = []
    said: list[Any] = []

    async def run() -> Any:
        async with sinks(1.0) as urls:
            schedule = (
                [f"{url}/v1/completions" for url in urls],
                np.arange(6) / 50,
                [body] * 6,
                np.full((6, 3), [1, tokens, tokens]),
                0.2,
            )
            async with ready_senders("local:2", 2, {}, *schedule, drain_s=5.0) as senders:
                start_ns = time.monotonic_ns() + SECOND_NS // 20
                load = asyncio.ensure_future(
                    senders.offer(start_ns, records.append, lambda *given: said.append(given))
                )
                if stop_after_s is not None:
                    await asyncio.sleep(stop_after_s)
                    load.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await load
                    return (), senders.clocks
                return await load, senders.clocks

    lost, clocks = asyncio.run(run())
    return records, lost, clocks, said


def record_of(id: int, sent_ns: int | None) -> RequestRecord:
    return RequestRecord(
        id=id,
        scheduled_ns=0,
        sent_ns=sent_ns,
        first_token_ns=None,
        last_token_ns=None,
        prompt_tokens=1,
        output_tokens_designed=2,
        max_tokens=2,
        output_tokens=0,
        prompt_tokens_reported=None,
        outcome="unfinished",
    )
