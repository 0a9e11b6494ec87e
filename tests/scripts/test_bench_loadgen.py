"""The bench of load generators, small: its sink counts, its statistics see, its search finds."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from loadgen.arrivals import evenly_spaced, poisson
from tests.scripts.program import script

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        module = script("bench/loadgen")
    finally:
        sys.path.remove(str(BENCH))
    return module


def part(name: str) -> Any:
    """A module of the bench, which has been imported with it."""
    return sys.modules[f"generators.{name}"]


# -- statistics at the sink ------------------------------------------------------------------------


def test_poisson_arrivals_pass_and_others_are_seen(bench: ModuleType) -> None:
    arrivals = part("at_sink").arrivals
    honest = arrivals(poisson(50.0, 100.0, 3), 50.0)
    assert honest.ks_p > 0.01
    assert abs(honest.dispersion - 1) < 3 * honest.dispersion_se
    assert abs(honest.correlation) < 3 * honest.correlation_se
    assert honest.share == pytest.approx(1.0, abs=3 / math.sqrt(5000))
    even = arrivals(evenly_spaced(50.0, 100.0, 3), 50.0)
    assert even.ks_p < 1e-6 and even.dispersion < 0.01
    assert even.share == pytest.approx(1.0, abs=1e-3)
    # Each gap twice: a histogram of gaps does not see it, their correlation does.
    gaps = np.repeat(np.random.default_rng(1).exponential(1 / 50, 2000), 2)
    twice = arrivals(np.cumsum(gaps), 50.0)
    assert twice.correlation == pytest.approx(0.5, abs=0.1) and twice.dispersion > 1.2


@pytest.mark.parametrize(
    ("share", "count", "exact", "delivered"),
    [
        (0.99, 1000, True, True),
        (0.98, 1000, True, False),
        # 1.645 standard deviations of a count of 1000 are 5.2 %.
        (0.94, 1000, False, True),
        (0.93, 1000, False, False),
        (0.5, 0, False, False),
    ],
)
def test_a_drawn_rate_is_granted_its_chance(
    bench: ModuleType, share: float, count: int, exact: bool, delivered: bool
) -> None:
    assert part("at_sink").delivers(share, count, exact) is delivered


def test_pooled_statistics_are_those_of_poisson_streams(bench: ModuleType) -> None:
    fidelity, window_counts = part("fidelity"), part("at_sink").window_counts
    streams = [poisson(20.0, 40.0, seed) for seed in range(100)]
    counts = np.concatenate([window_counts(stream, 40.0) for stream in streams])
    index, index_se = fidelity.pooled_dispersion(counts)
    assert len(counts) == 4000 and index_se == pytest.approx(math.sqrt(2.05 / 4000), rel=0.01)
    assert abs(index - 1) < 3 * index_se
    correlation, se = fidelity.pooled_correlation([np.diff(stream) for stream in streams])
    assert abs(correlation) < 3 * se < 0.02


def test_streams_side_by_side_are_the_seeds_own(bench: ModuleType) -> None:
    schedule = part("schedule")
    instants, numbers = schedule.drawn(20.0, 3.0, 5, 4)
    assert (np.diff(instants) >= 0).all()
    for index in range(4):
        own = numbers // schedule.OF_A_STREAM == index
        assert np.array_equal(instants[own], poisson(20.0, 3.0, 5 + index))
        assert np.array_equal(numbers[own] % schedule.OF_A_STREAM, np.arange(own.sum()))


# -- the search for a limit ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3.0, 90.0, 312.0, 5000.0])
def test_the_search_ends_just_below_the_limit(bench: ModuleType, limit: float) -> None:
    def at(rate: float) -> Any:
        return bench.Row("a peer", rate, 1.0, 1, 1, delivers=rate <= limit)

    rows = list(bench.raised(300.0, 0.06, at))
    best = max(row.rate for row in rows if bench.good(row))
    above = min(row.rate for row in rows if not bench.good(row))
    assert best <= limit < above
    assert above / best <= 1.06 or above - best <= 1
    assert len(rows) < 25


def test_critrate_must_also_be_on_time(bench: ModuleType) -> None:
    row = {"rate": 1.0, "seconds": 1.0, "seed": 1, "tokens": 1, "delivers": True}
    assert bench.good(bench.Row(client="vllm bench serve", **row))
    assert bench.good(bench.Row(client="critrate", send_lag_ms=0.9, **row))
    assert not bench.good(bench.Row(client="critrate", send_lag_ms=1.1, **row))
    assert not bench.good(bench.Row(client="critrate", **row))
    assert bench.good(bench.Row(client="critrate on aiohttp", send_lag_ms=1.1, **row))
    assert not bench.good(bench.Row(client="critrate", send_lag_ms=0.9, sink_busy=0.97, **row))


def test_a_rate_that_was_missed_is_tried_again(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = iter([False, True, False, False])

    def measure(_: Any, client: Any, rate: float, *__: Any) -> Any:
        return bench.Row(client.name, rate, 1.0, 1, 1, delivers=next(came))

    monkeypatch.setattr(bench, "measure", measure)
    kept: list[Any] = []
    arguments = argparse.Namespace(rates=[10.0, 20.0], seconds=1.0, seed=1, tokens=1, tries=2)
    best = bench.measured(None, bench.CLIENTS["guidellm"], arguments, kept.append)
    assert [(row.rate, row.delivers) for row in kept] == [
        (10.0, False),
        (10.0, True),
        (20.0, False),
        (20.0, False),
    ]
    assert best.rate == 10.0


def test_of_several_rounds_the_middle_one_is_shown(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arrivals = part("at_sink").arrivals(poisson(50.0, 10.0, 1), 50.0)
    rounds = [
        bench.Row("a peer", 50.0, 10.0, 1, 1, arrivals=arrivals, tokens_per_s=speed)
        for speed in (300.0, 100.0, 200.0)
    ]
    bench.summary([rounds, []], markdown=True)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "a peer" in line]) == 1
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[3] == "200" and cells[-1] == "100, 200, 300"


# -- the sink and a client -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("loadgen")
    try:
        program = part("sink").compiled(out)
    except part("sink").NoCompiler as error:
        pytest.skip(str(error))
    return part("measured").Bench(program, None, None, 2.0, 1, out / "tokenizer", out)


def test_what_a_client_sends_is_what_the_sink_has(bench: ModuleType, machine: Any) -> None:
    row = bench.measure(machine, bench.CLIENTS["bare protocol"], 60.0, 0.5, 7, 8)
    assert row.problem == ""
    sent = len(poisson(60.0, 0.5, 7))
    assert row.one_for_one and row.whole == row.arrivals.count == sent
    assert row.send_lag_ms > 0 and row.read_lag_ms > 0
    assert row.cpu_s_per_million > 0 and row.peak_mb > 4
    assert 1 <= row.open_most <= sent


def test_the_arrivals_of_critrate_are_the_drawn_schedule(bench: ModuleType, machine: Any) -> None:
    fidelity = part("fidelity")
    asked = fidelity.Asked(rate=20.0, seeds=3, seed=1, at_once=3, windows=3)
    found = fidelity.streams_of(machine, bench.CLIENTS["critrate"], asked)
    assert found.one_for_one and found.problems == []
    assert [int(counts.sum()) for counts in found.counts] == pytest.approx(
        [len(poisson(20.0, 1.0, seed)) for seed in (1, 2, 3)], abs=2
    )


def test_a_client_that_fails_is_a_row_with_the_reason(bench: ModuleType, machine: Any) -> None:
    broken = part("commands").Client("broken", "python -c 'raise SystemExit(3)'", 10.0)
    row = bench.measure(machine, broken, 10.0, 0.2, 1, 1)
    assert not row.delivers and "status 3" in row.problem
    assert bench.cells(row)[2] == "no"


def test_a_client_that_cannot_be_installed_is_listed(
    bench: ModuleType, machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CRITRATE_CLIENT_GUIDELLM", "/nowhere/python")
    arguments = argparse.Namespace(
        rates=[10.0],
        seconds=0.2,
        seed=1,
        tokens=1,
        interval_ms=2.0,
        rounds=2,
        tries=1,
        markdown=False,
    )
    bench.limits(machine, ["guidellm"], arguments)
    said = capsys.readouterr().out
    assert "guidellm: not run: CRITRATE_CLIENT_GUIDELLM=/nowhere/python is not a file" in said
