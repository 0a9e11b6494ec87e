import json

import numpy as np
import pytest

from loadgen.prompts import FIRST_ORDINARY_ID, completion_body, make_prompts


def test_prompts_have_their_lengths_and_stay_in_the_vocabulary():
    lengths = np.random.default_rng(1).integers(1, 500, size=300)
    prompts = make_prompts(lengths, 4, range(FIRST_ORDINARY_ID, 1000))
    assert [len(p) for p in prompts] == lengths.tolist()
    ids = np.concatenate(prompts)
    assert ids.min() == 3
    assert ids.max() == 999
    again = make_prompts(lengths, 4, range(FIRST_ORDINARY_ID, 1000))
    assert all(np.array_equal(a, b) for a, b in zip(prompts, again, strict=True))


@pytest.mark.parametrize(("vocabulary", "prefix"), [(32_000, 1), (50, 2), (5, 5)])
def test_no_two_prompts_share_a_prefix(vocabulary, prefix):
    prompts = make_prompts(np.full(2000, 16), 1, range(3, 3 + vocabulary))
    assert len({tuple(p[:prefix]) for p in prompts}) == 2000


def test_prompts_of_two_seeds_differ_in_their_first_block():
    first, second = (make_prompts(np.full(500, 16), seed, range(3, 32_000)) for seed in (1, 2))
    assert not {tuple(p) for p in first} & {tuple(p) for p in second}


@pytest.mark.parametrize(
    ("lengths", "vocabulary", "message"),
    [
        ([4, 0], range(3, 100), "at least 1 token"),
        ([1] * 200, range(3, 100), "at least 2 tokens"),
        ([5], range(3, 4), "at least two token ids"),
        ([5], range(3, 100, 2), "at least two token ids"),
        ([[5]], range(3, 100), "shape"),
    ],
)
def test_impossible_prompts_are_refused(lengths, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        make_prompts(lengths, 0, vocabulary)


def test_body_asks_for_exactly_the_output():
    (prompt,) = make_prompts([7], 0, range(3, 100))
    body = json.loads(completion_body("some/model", prompt, 12, 12))
    assert body == {
        "model": "some/model",
        "prompt": prompt.tolist(),
        "max_tokens": 12,
        "min_tokens": 12,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def test_an_output_below_the_declared_limit_is_refused():
    with pytest.raises(ValueError, match="stops exactly only at its limit"):
        completion_body("m", np.array([1, 2], dtype=np.int32), 10, 20)
    with pytest.raises(ValueError, match="at least one output token"):
        completion_body("m", np.array([1, 2], dtype=np.int32), 0, 0)
