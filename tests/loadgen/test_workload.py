"""Length laws: their moments and errors, their draws, what clipping, parts and declarations do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import workload as wl


def test_fixed_lengths() -> None:
    law = wl.fixed(512, 128)
    assert law.exact and law.mean(law.prompt_tokens) == 512 and law.mean(law.output_tokens) == 128
    assert law.ignore_eos and not law.declares_more
    assert law.decode_demand().tolist() == [512 * 128 + 128 * 129 / 2]


def test_uniform_is_the_exact_product_law() -> None:
    law = wl.uniform((10, 1600), (10, 1600))
    s, o = law.prompt_tokens, law.output_tokens
    assert len(s) == 1591**2
    assert law.mean(s) == pytest.approx(805) and law.mean(o) == pytest.approx(805)
    assert law.mean(s * o) == pytest.approx(805**2)
    assert law.mean(s**2) == pytest.approx(805**2 + (1591**2 - 1) / 12)
    assert law.standard_error(s) == 0.0


def test_mixture_is_the_weighted_law() -> None:
    law = wl.mixture([(0.25, wl.fixed(100, 10)), (0.75, wl.uniform((1, 3), (5, 5)))])
    assert law.mean(law.prompt_tokens) == pytest.approx(0.25 * 100 + 0.75 * 2)
    assert law.exact
    observed = wl.pairs([1, 2], [3, 4], name="seen", source="here")
    assert not wl.mixture([(0.5, observed), (0.5, wl.fixed(1, 1))]).exact


def test_clipping_reports_what_it_cut() -> None:
    law, cut = wl.clipped(wl.uniform((1, 10), (1, 10)), 10)
    assert cut == pytest.approx(0.55)
    assert (law.prompt_tokens + law.output_tokens).max() == 10
    assert law.weight.sum() == pytest.approx(1.0)
    whole, nothing = wl.clipped(law, 10)
    assert whole is law and nothing == 0.0


def test_the_notes_of_a_clipped_law_say_what_was_cut() -> None:
    lengths = wl.pairs([2, 9, 1], [1, 1, 1], name="seen", source="here", count=[4, 4, 2])
    law, cut = wl.clipped(lengths, 3)
    assert cut == pytest.approx(0.4)
    # Demands of 3, 10 and 2 token-steps: the mean falls from 5.6 to 16/6.
    means = [w.mean(w.decode_demand()) for w in (lengths, law)]
    assert means == pytest.approx([5.6, 16 / 6])
    assert law.notes == (
        "seen: at most 3 tokens in total: 40 % of the requests cut; mean KV demand changes by -52.4 %",
    )
    assert lengths.notes == ()
    assert wl.mixture([(0.5, law), (0.5, law)]).notes == law.notes


def test_clipping_lowers_declarations_and_says_so() -> None:
    law, cut = wl.clipped(wl.declared(wl.uniform((1, 4), (2, 2)), extra=4), 8)
    assert cut == 0.0
    assert law.max_tokens.tolist() == [6, 6, 5, 4]
    assert law.notes[0].endswith(
        "at most 8 tokens in total: 50 % of the requests declare less, to fit"
    )


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_clipping_keeps_the_ratio_of_weights(limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    law = wl.pairs(rng.integers(1, 20, 30), rng.integers(1, 20, 30), name="seen", source="here")
    if (law.prompt_tokens + law.output_tokens).min() > limit:
        with pytest.raises(ValueError, match="the shortest has"):
            wl.clipped(law, limit)
        return
    kept, cut = wl.clipped(law, limit)
    assert len(kept.weight) == pytest.approx(30 * (1 - cut))
    assert np.allclose(kept.weight, 1 / len(kept.weight))


def test_draws_repeat_with_the_seed_and_follow_the_law() -> None:
    law = wl.uniform((10, 1600), (10, 800))
    first = law.sample(np.random.default_rng(7), 100_000)
    assert (first == law.sample(np.random.default_rng(7), 100_000)).all()
    assert first.shape == (100_000, 3)
    error = np.sqrt((1591**2 - 1) / 12 / 100_000)
    assert abs(first[:, 0].mean() - 805) < 4 * error
    assert first[:, 1].min() == 10 and first[:, 1].max() == 800
    weighted = wl.mixture([(0.9, wl.fixed(1, 1)), (0.1, wl.fixed(2, 1))])
    ones = (weighted.sample(np.random.default_rng(3), 10_000)[:, 0] == 1).mean()
    assert abs(ones - 0.9) < 4 * np.sqrt(0.09 / 10_000)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"max_tokens": 7}, [7, 7, 7]),
        ({"factor": 1.5}, [3, 5, 8]),
        ({"extra": 2}, [4, 5, 7]),
        ({"extra": 0}, [2, 3, 5]),
    ],
)
def test_declared_lengths(how: dict[str, float], expected: list[int]) -> None:
    law = wl.declared(wl.uniform((1, 1), (2, 5)), **how)  # type: ignore[arg-type]
    assert law.max_tokens[[0, 1, 3]].tolist() == expected
    more = how != {"extra": 0}
    assert (law.declares_more, law.ignore_eos) == (more, not more)
    assert ("declare" in law.name) == more
    draws = law.sample(np.random.default_rng(1), 50)
    assert {tuple(row[1:]) for row in draws.tolist()} <= set(
        zip(law.output_tokens.tolist(), law.max_tokens.tolist(), strict=True)
    )


@pytest.mark.parametrize(
    ("factor", "outputs", "expected"),
    [
        (1.1, [50, 90, 100, 110, 170, 51], [55, 99, 110, 121, 187, 57]),
        (1.15, [20, 40, 100, 7], [23, 46, 115, 9]),
        (1.3, [10, 90, 110], [13, 117, 143]),
        (1.4, [5, 15, 35, 45], [7, 21, 49, 63]),
        (1.0, [1, 3, 1_000_003], [1, 3, 1_000_003]),
        (1.0000001, [10_000_000, 10_000_001], [10_000_001, 10_000_003]),
        (1.2345678901234567, [1_000_000], [1_234_568]),
    ],
)
def test_a_factor_is_the_decimal_that_was_written(
    factor: float, outputs: list[int], expected: list[int]
) -> None:
    law = wl.pairs(np.ones(len(outputs)), outputs, name="seen", source="here")
    assert wl.declared(law, factor=factor).max_tokens.tolist() == expected


@given(st.integers(0, 400), st.integers(1, 5000))
def test_a_factor_in_hundredths_is_exact(hundredths: int, output: int) -> None:
    factor = float(f"{1 + hundredths // 100}.{hundredths % 100:02d}")
    exact = -(-(100 + hundredths) * output // 100)
    assert wl.declared(wl.fixed(1, output), factor=factor).max_tokens.tolist() == [exact]


def test_declarations_survive_clipping_and_mixing() -> None:
    more = wl.declared(wl.uniform((1, 9), (1, 9)), factor=2)
    clipped, _ = wl.clipped(more, 12)
    mixed = wl.mixture([(0.5, clipped), (0.5, more)])
    assert not clipped.ignore_eos and not mixed.ignore_eos and mixed.declares_more
    with pytest.raises(ValueError, match="set ignore_eos to false in every part"):
        wl.mixture([(0.5, more), (0.5, wl.fixed(1, 1))])


def test_parts_are_disjoint_and_complete() -> None:
    law = wl.pairs(np.arange(1, 102), np.ones(101), name="seen", source="here")
    one, other = (wl.part(law, 0.8, 3, side) for side in ("estimate", "test"))
    assert (len(one.weight), len(other.weight)) == (81, 20)
    both = np.concatenate([one.prompt_tokens, other.prompt_tokens])
    assert np.array_equal(np.sort(both), law.prompt_tokens)
    assert np.array_equal(one.prompt_tokens, wl.part(law, 0.8, 3, "estimate").prompt_tokens)
    assert not np.array_equal(one.prompt_tokens, wl.part(law, 0.8, 4, "estimate").prompt_tokens)
    assert one.notes == ("seen: the 81 of 101 requests to estimate, drawn with seed 3",)
    with pytest.raises(ValueError, match="only a law of observed requests"):
        wl.part(wl.fixed(1, 1), 0.8, 1, "test")
    with pytest.raises(ValueError, match="leaves one side empty"):
        wl.part(law, 0.999, 1, "test")


def test_parts_share_out_the_requests_of_each_bin() -> None:
    law = wl.pairs([5, 7, 9], [1, 2, 3], count=[60, 1, 39], name="bins", source="here")
    one, other = (wl.part(law, 0.8, 3, side) for side in ("estimate", "test"))
    assert (one.observed.sum(), other.observed.sum()) == (80, 20)
    seen = dict.fromkeys((5, 7, 9), 0.0)
    for side in (one, other):
        assert side.weight == pytest.approx(side.observed / side.observed.sum())
        for s, count in zip(side.prompt_tokens.tolist(), side.observed, strict=True):
            seen[s] += count
    assert seen == {5: 60, 7: 1, 9: 39}


def test_the_parts_of_a_cycle_take_turns_and_keep_the_law() -> None:
    """Of each 10 requests 3 follow the first law, then 7 the second; the long-run law is the mixture."""
    parts = [(0.3, wl.uniform((1, 9), (1, 9))), (0.7, wl.uniform((11, 19), (11, 19)))]
    law, mixed = wl.mixture(parts, cycle_requests=10), wl.mixture(parts)
    drawn = law.sample(np.random.default_rng(2), 20_000)
    assert ((drawn[:, 0] > 10) == (np.arange(20_000) % 10 >= 3)).all()
    for column, values in ((0, mixed.prompt_tokens), (1, mixed.output_tokens)):
        error = np.sqrt(mixed.mean(values.astype(float) ** 2) / 20_000)
        assert drawn[:, column].mean() == pytest.approx(mixed.mean(values), abs=4 * error)
    assert abs(np.corrcoef(drawn[:, 0] % 10, drawn[:, 1] % 10)[0, 1]) < 0.03
    for refused in (
        lambda: wl.mixture(parts, cycle_requests=2),
        lambda: wl.mixture([(1.0, law)]),
        lambda: wl.clipped(law, 20),
    ):
        with pytest.raises(ValueError, match=r"turn|cycle"):
            refused()


def observed(rng: np.random.Generator, count: int) -> wl.Workload:
    """Requests whose demand is about as spread out as that of the Azure chats (CV 1.1)."""
    prompt = 1 + rng.lognormal(6.5, 0.8, count).astype(int)
    output = 1 + rng.lognormal(5, 0.6, count).astype(int)
    return wl.pairs(prompt, output, name="seen", source="here")


def test_a_law_from_80_percent_covers_the_other_20_at_the_stated_rate() -> None:
    """Error rate over 1 000 random splits; with the right error 0.90 +- 0.028 (3 sd) of them agree."""
    law = observed(np.random.default_rng(5), 2000)
    scores = []
    for seed in range(1000):
        one, other = (wl.part(law, 0.8, seed, side) for side in ("estimate", "test"))
        demands = one.decode_demand(), other.decode_demand()
        error = np.hypot(one.standard_error(demands[0]), other.standard_error(demands[1]))
        scores.append((one.mean(demands[0]) - other.mean(demands[1])) / error)
    assert np.mean(np.abs(scores) < 1.645) == pytest.approx(0.90, abs=0.028)
    assert np.std(scores) == pytest.approx(1.0, abs=0.07)


def test_the_interval_of_an_observed_mean_covers_the_true_one() -> None:
    """1 000 samples of 1 000 requests; a skewed demand costs an exact 90 % interval about 1 %."""
    whole = observed(np.random.default_rng(8), 400_000)
    truth = whole.mean(whole.decode_demand())
    covered = 0
    for seed in range(1000):
        law = observed(np.random.default_rng([9, seed]), 1000)
        demand = law.decode_demand()
        covered += abs(law.mean(demand) - truth) < 1.645 * law.standard_error(demand)
    assert 0.865 < covered / 1000 < 0.925


def test_the_standard_error_of_a_mixture_is_never_too_small() -> None:
    """A tenth of the requests is observed, with nearly all of the scatter; the rest is stated."""
    means, errors = [], []
    for seed in range(400):
        seen = observed(np.random.default_rng([4, seed]), 200)
        law = wl.mixture([(0.1, seen), (0.9, wl.fixed(10, 10))])
        means.append(law.mean(law.decode_demand()))
        errors.append(law.standard_error(law.decode_demand()))
    assert np.std(means) < 1.05 * np.mean(errors)
    assert np.std(means) > 0.5 * np.mean(errors)


def test_counts_stand_for_single_requests() -> None:
    values = np.random.default_rng(1).integers(1, 9, 400)
    single = wl.pairs(values, values, name="seen", source="here")
    distinct, count = np.unique(values, return_counts=True)
    counted = wl.pairs(distinct, distinct, name="seen", source="here", count=count)
    assert counted.mean(distinct) == pytest.approx(single.mean(values))
    assert counted.standard_error(distinct) == pytest.approx(single.standard_error(values))


def test_the_standard_error_of_an_observed_law_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).integers(1, 1000, 400)
    law = wl.pairs(values, values, name="seen", source="here")
    assert law.standard_error(values) == pytest.approx(values.std(ddof=1) / 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wl.uniform((0, 5), (1, 5)), "prompt range"),
        (lambda: wl.uniform((1, 5), (6, 5)), "output range"),
        (lambda: wl.uniform((1, 100_000), (1, 100_000)), "narrow a range"),
        (lambda: wl.mixture([(0.5, wl.fixed(1, 1))]), "sum to 1"),
        (lambda: wl.fixed(0, 5), "at least one token"),
        (lambda: wl.fixed(5, 5, 4), "below the longest output of 5"),
        (lambda: wl.declared(wl.fixed(5, 5), factor=0.5), "less than the output"),
        (lambda: wl.declared(wl.fixed(5, 5), extra=-1), "less than the output"),
        (lambda: wl.declared(wl.fixed(5, 5), extra=1, factor=2), "exactly one of"),
        (lambda: replace(wl.fixed(5, 5, 9), ignore_eos=True), "run to their max_tokens"),
        (lambda: wl.pairs([1, 2], [1], name="seen", source="here"), "one length"),
    ],
)
def test_laws_that_cannot_be(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
