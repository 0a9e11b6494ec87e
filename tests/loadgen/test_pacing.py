"""Instants that a loop must not miss, on both loops, with the kernel's timer and without it."""

import asyncio
import gc
import time

import pytest
import uvloop

from loadgen import pacing
from loadgen.pacing import NEVER_NS, Alarm, without_collection_pauses

WAYS = [(asyncio.run, True), (uvloop.run, True), (asyncio.run, False), (uvloop.run, False)]


@pytest.fixture(params=WAYS, ids=["asyncio", "uvloop", "asyncio polled", "uvloop polled"])
def run(request, monkeypatch):
    runner, timerfd = request.param
    if not timerfd:
        monkeypatch.setattr(pacing, "_timerfd", lambda: None)
    return runner


def rung(run, instants_ns, between=None):
    """When an alarm rang that is set to one instant after another, in ns after the start."""

    async def scenario():
        start_ns = time.monotonic_ns()
        due, at, over = iter(instants_ns), [], asyncio.Event()
        alarm = Alarm()

        def ring(now_ns):
            at.append(now_ns - start_ns)
            assert alarm.at_ns == NEVER_NS
            again()

        def again():
            following = next(due, None)
            if following is None:
                over.set()
            else:
                alarm.set(start_ns + following)

        alarm.ring = ring
        again()
        if between is not None:
            await between(alarm)
        async with asyncio.timeout(20.0):
            await over.wait()
        alarm.close()
        return at

    return run(scenario())


def test_it_rings_once_for_each_instant_and_never_before(run):
    due_ns = [0, 0, 300_000, 400_000, 5_000_000, 5_000_000, 5_900_000]
    at_ns = rung(run, due_ns)
    assert len(at_ns) == len(due_ns)
    assert all(at >= due for at, due in zip(at_ns, due_ns, strict=True))


def test_a_later_instant_takes_the_place_of_an_earlier_one(run):
    async def put_off(alarm):
        begun_ns = time.monotonic_ns()
        alarm.set(begun_ns + 30_000_000)
        alarm.set(NEVER_NS)
        # A loop's own sleep may end a millisecond early, and yet well after both instants.
        await asyncio.sleep(0.05)
        alarm.set(begun_ns + 60_000_000)

    (at_ns,) = rung(run, [10_000_000], put_off)
    assert at_ns >= 60_000_000


def test_whoever_looks_at_the_clock_may_ring_it(run):
    async def look(alarm):
        time.sleep(0.005)
        alarm.go(time.monotonic_ns())
        await asyncio.sleep(0.01)

    assert len(rung(run, [4_000_000], look)) == 1


def test_the_next_turn_is_not_this_one(run):
    async def scenario():
        rings = []
        alarm = Alarm()
        alarm.ring = rings.append
        alarm.set_next_turn()
        before = len(rings), alarm.at_ns
        while not rings:
            await asyncio.sleep(0)
        alarm.close()
        return before

    assert run(scenario()) == (0, NEVER_NS)


def test_nothing_is_collected_meanwhile_and_collection_comes_back_as_it_was():
    for was in (True, False):
        (gc.enable if was else gc.disable)()
        try:
            with without_collection_pauses():
                assert not gc.isenabled()
            assert gc.isenabled() == was
        finally:
            gc.enable()
