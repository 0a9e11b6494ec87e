"""The checks are judged by their error rates: honest loads pass, each known defect is caught."""

import numpy as np
import pytest
from scipy import stats

from loadgen.arrivals import SECOND_NS, evenly_spaced, poisson, schedule_ns
from loadgen.fidelity import fidelity
from loadgen.law_checks import (
    LEVEL,
    TWO_SIDED_Z,
    _chi_square,
    _gap_check,
    _longest_gap_check,
    _poisson_z,
    poisson_checks,
)
from loadgen.records import RequestRecord, Run

START_NS = 5 * SECOND_NS


def late_by_up_to_2_ms(rng, count):
    return rng.uniform(0.0, 0.002, count)


def rejected(rate, end_s, seed, defect=lambda instants, rate, end_s, rng: instants):
    rng = np.random.default_rng([seed, 1])
    instants = defect(poisson(rate, end_s, seed), rate, end_s, rng)
    lag = late_by_up_to_2_ms(rng, len(instants))
    checks = poisson_checks(instants + lag, lag, rate, end_s)
    return {check.name for check in checks if check.passed is False}


@pytest.mark.parametrize(("rate", "end_s"), [(100.0, 10.0), (20.0, 50.0), (2.0, 100.0)])
def test_honest_loads_pass(rate, end_s):
    runs = 1000
    failures = sum(bool(rejected(rate, end_s, seed)) for seed in range(runs))
    # Six checks at LEVEL: 0.6 expected in 1000; more than 5 has probability 4e-5.
    assert failures <= 5


def test_sends_on_a_millisecond_grid_pass():
    for seed in range(50):
        instants = poisson(300.0, 20.0, seed)
        sent = np.ceil(instants * 1e3) / 1e3 + 1e-4
        checks = poisson_checks(sent, sent - instants, 300.0, 20.0)
        assert not [check.name for check in checks if check.passed is False]


def repeated(instants, rate, end_s, rng):
    gaps = np.repeat(rng.exponential(1.0 / rate, round(rate * end_s / 5) + 50), 5)
    return cut(np.cumsum(gaps), end_s)


def pinned(instants, rate, end_s, rng):
    parts = []
    for second in range(int(end_s)):
        sums = np.cumsum(rng.exponential(size=rng.poisson(rate)))
        parts.append(second + sums / sums[-1] if len(sums) else sums)
    return np.concatenate(parts)


def even(instants, rate, end_s, rng):
    return evenly_spaced(rate, end_s, int(rng.integers(1 << 30)))


def clipped(instants, rate, end_s, rng):
    gaps = np.minimum(rng.exponential(1.0 / rate, round(2 * rate * end_s)), 3.0 / rate)
    return cut(np.cumsum(gaps), end_s)


def slow(instants, rate, end_s, rng):
    return cut(instants * 1.2, end_s)


def random_rate_each_second(instants, rate, end_s, rng):
    counts = rng.poisson(rate * rng.gamma(4.0, 0.25, int(end_s)))
    return np.concatenate([k + np.sort(rng.random(n)) for k, n in enumerate(counts)])


def caught_up_in_bursts(instants, rate, end_s, rng):
    return np.ceil(instants * 10.0) / 10.0


def cut(instants, end_s):
    return instants[instants < end_s]


@pytest.mark.parametrize(
    ("defect", "check", "rate", "power"),
    [
        (repeated, "gap correlation", 100.0, 1.0),
        (repeated, "dispersion", 20.0, 0.9),
        (pinned, "whole seconds", 20.0, 0.99),
        (even, "gaps", 100.0, 1.0),
        (even, "dispersion", 100.0, 1.0),
        (clipped, "longest gap", 100.0, 1.0),
        (slow, "rate", 100.0, 0.9),
        (random_rate_each_second, "dispersion", 20.0, 0.99),
        (caught_up_in_bursts, "gaps", 20.0, 1.0),
    ],
)
def test_defects_of_a_thousand_requests_are_caught(defect, check, rate, power):
    runs = 200
    caught = sum(check in rejected(rate, 1000.0 / rate, seed, defect) for seed in range(runs))
    assert caught >= power * runs


def test_critical_values_against_exact_laws():
    for freedom in (9, 49, 499):
        upper = stats.chi2.sf(_chi_square(TWO_SIDED_Z, freedom), freedom)
        assert upper == pytest.approx(LEVEL / 2, rel=0.25)
    for expected in (100, 1000, 10_000):
        counts = np.arange(int(expected + 10 * expected**0.5))
        z = np.array([_poisson_z(int(count), expected) for count in counts])
        tail = stats.poisson.pmf(counts, expected)[np.abs(z) > TWO_SIDED_Z].sum()
        assert tail == pytest.approx(LEVEL, rel=0.15)
    for n in (100, 1000, 10_000):
        gaps = np.random.default_rng(n).exponential(size=n)
        check = _gap_check(gaps, 0.0)
        assert check.statistic == pytest.approx(stats.kstest(gaps, "expon").statistic)
        assert stats.kstwo.sf(check.threshold, n) == pytest.approx(LEVEL, rel=0.15)
        extreme = _longest_gap_check(np.full(n, 1e9), 0.0)
        beyond = -np.expm1(n * np.log1p(-np.exp(-extreme.threshold)))
        assert beyond == pytest.approx(LEVEL / 2)


def records_of(run, end_s=None, lag_ms=0.5):
    """Records of a run in which everything went well and took 0.3 s."""
    due = poisson(run.arrival_rate, run.horizon_s, run.seed)
    due = due[due < (end_s or run.horizon_s)]
    return [
        record(index, ns, lag_ms) for index, ns in enumerate(schedule_ns(due, START_NS).tolist())
    ]


def record(index, scheduled_ns, lag_ms=0.5, **changes):
    fields = {
        "id": index,
        "scheduled_ns": scheduled_ns,
        "sent_ns": scheduled_ns + round(lag_ms * 1e6),
        "first_token_ns": scheduled_ns + 100_000_000,
        "last_token_ns": scheduled_ns + 300_000_000,
        "prompt_tokens": 100,
        "output_tokens_designed": 20,
        "max_tokens": 20,
        "output_tokens": 20,
        "prompt_tokens_reported": 100,
        "outcome": "completed",
        "status": 200,
    }
    return RequestRecord(**{**fields, **changes})


def run_of(seed, rate=100.0, horizon_s=10.0):
    return Run(id="r", arrival_rate=rate, horizon_s=horizon_s, warmup_s=1.0, seed=seed)


def failed_checks(result):
    return {check.name for check in result.checks if check.passed is False}


def test_honest_runs_are_valid_and_cut_runs_too():
    for seed in range(20):
        run = run_of(seed)
        result = fidelity(run, records_of(run), run.horizon_s, START_NS)
        assert result.valid, failed_checks(result)
        assert result.achieved_rate == pytest.approx(100.0, rel=0.2)
        assert result.lag_p50_ms == result.lag_max_ms == pytest.approx(0.5)
        assert fidelity(run, records_of(run, 4.0), 4.0, START_NS).valid


def test_thinned_and_late_loads_are_always_caught():
    for seed in range(20):
        run = run_of(seed)
        records = records_of(run)
        thinned = [r for r in records if r.id % 10]
        assert failed_checks(fidelity(run, thinned, 10.0, START_NS)) >= {"schedule"}
        late = records_of(run, lag_ms=50.0)
        assert "send lag" in failed_checks(fidelity(run, late, 10.0, START_NS))
        other = run_of(seed + 1000)
        assert not fidelity(other, records, 10.0, START_NS).valid


@pytest.mark.parametrize(
    ("changes", "count", "check"),
    [
        ({"outcome": "rejected", "status": 503}, 1, "rejected"),
        ({"outcome": "failed", "error": "reset"}, 2, "failed"),
        ({"outcome": "timed_out"}, 2, "failed"),
        ({"output_tokens": 19}, 1, "lengths"),
        ({"prompt_tokens_reported": 101}, 1, "lengths"),
        ({"prompt_tokens_reported": None}, 1, "lengths"),
        ({"sent_ns": None, "outcome": "unfinished"}, 1, "all sent"),
    ],
)
def test_each_damaged_outcome_fails_its_check(changes, count, check):
    run = run_of(3)
    records = records_of(run)
    records[:count] = [record(r.id, r.scheduled_ns, **changes) for r in records[:count]]
    assert failed_checks(fidelity(run, records, 10.0, START_NS)) == {check}


def test_unfinished_requests_and_one_unsent_at_the_very_end_are_no_fault():
    run = run_of(3)
    records = records_of(run)
    horizon_ns = START_NS + 10 * SECOND_NS
    for r in records[-200:]:
        records[r.id] = record(r.id, r.scheduled_ns, outcome="unfinished", output_tokens=7)
    assert fidelity(run, records, 10.0, START_NS).valid
    last = records[-1]
    end_s = (last.scheduled_ns - START_NS) / 1e9 + 0.001
    records[-1] = record(last.id, last.scheduled_ns, sent_ns=None, outcome="unfinished")
    assert last.scheduled_ns < horizon_ns
    assert "all sent" not in failed_checks(fidelity(run, records, end_s, START_NS))


def test_few_requests_are_not_tested_and_none_is_refused():
    run = run_of(1, rate=1.0, horizon_s=20.0)
    result = fidelity(run, records_of(run), 20.0, START_NS)
    undecided = {check.name for check in result.checks if check.passed is None}
    assert result.valid
    assert undecided >= {"rate", "gaps", "dispersion", "gap correlation", "whole seconds"}
    assert failed_checks(fidelity(run, [], 20.0, START_NS)) == {"schedule"}
    with pytest.raises(ValueError, match="no load to judge"):
        fidelity(run, [], 0.0, START_NS)


def full_run_of(seed, rate=100.0, horizon_s=12.0, preload=200):
    return Run(
        id="r", arrival_rate=rate, horizon_s=horizon_s, warmup_s=3.0, seed=seed, preload=preload
    )


def records_behind_a_burst(run, send_s=0.5, lag_ms=0.5):
    """The burst leaves evenly over ``send_s``; what was due meanwhile leaves right after it."""
    gone_ns = START_NS + round(send_s * 1e9)
    burst = [
        record(i, START_NS, lag_ms=1e3 * send_s * (i + 1) / run.preload) for i in range(run.preload)
    ]
    due = poisson(run.arrival_rate, run.horizon_s, run.seed)
    later = [
        record(run.preload + i, ns, lag_ms=max((gone_ns - ns) / 1e6, 0.0) + lag_ms)
        for i, ns in enumerate(schedule_ns(due, START_NS).tolist())
    ]
    return burst + later


def test_behind_a_burst_the_poisson_part_is_tested_as_such():
    invalid = 0
    for seed in range(60):
        run = full_run_of(seed)
        result = fidelity(run, records_behind_a_burst(run), run.horizon_s, START_NS)
        invalid += not result.valid
        assert result.lag_max_ms == pytest.approx(0.5)
        assert result.achieved_rate == pytest.approx(100.0, rel=0.2)
    # Six checks at LEVEL: 0.04 expected; more than 1 has probability 6e-4.
    assert invalid <= 1


def defective(run, defect, lag_ms=0.5):
    rng = np.random.default_rng([run.seed, 1])
    instants = defect(poisson(run.arrival_rate, run.horizon_s, run.seed), 100.0, 12.0, rng)
    sent = schedule_ns(np.sort(instants), START_NS).tolist()
    honest = records_behind_a_burst(run)
    later = [
        record(r.id, r.scheduled_ns, lag_ms=(ns - r.scheduled_ns) / 1e6)
        for r, ns in zip(honest[run.preload :], sent, strict=False)
    ]
    return honest[: run.preload] + later


@pytest.mark.parametrize("defect", [caught_up_in_bursts, slow])
def test_a_poisson_part_that_is_none_is_caught_behind_a_burst(defect):
    for seed in range(20):
        run = full_run_of(seed)
        result = fidelity(run, defective(run, defect), run.horizon_s, START_NS, max_lag_ms=1e6)
        assert not result.valid


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda run, records: records[1:], "schedule"),
        (lambda run, records: [*records, record(9999, START_NS)], "schedule"),
        (lambda run, records: records_behind_a_burst(run, send_s=1.5), "burst"),
        (lambda run, records: records_behind_a_burst(run, lag_ms=40.0), "send lag"),
        (
            lambda run, records: [
                record(0, START_NS, sent_ns=None, outcome="unfinished"),
                *records[1:],
            ],
            "all sent",
        ),
    ],
)
def test_a_burst_is_part_of_the_offered_load(change, check):
    run = full_run_of(3)
    records = change(run, records_behind_a_burst(run))
    assert check in failed_checks(fidelity(run, records, run.horizon_s, START_NS))


def test_a_run_from_empty_has_no_place_for_a_burst():
    run = full_run_of(3)
    records = records_behind_a_burst(run)
    empty = run_of(3, horizon_s=12.0)
    assert "schedule" in failed_checks(fidelity(empty, records, 12.0, START_NS))
    later = records[run.preload :]
    assert "schedule" in failed_checks(fidelity(run, later, 12.0, START_NS))
