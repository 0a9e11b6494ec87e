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


IDS = np.array([5, 6], dtype=np.int32)


def test_without_ignore_eos_a_minimum_keeps_end_of_text_away():
    body = json.loads(completion_body("m", IDS, 12, 12, ignore_eos=False))
    assert (body["min_tokens"], body["max_tokens"], body["ignore_eos"]) == (12, 12, False)
    assert not body.keys() & {"stop_token_ids", "logit_bias"}


@pytest.mark.parametrize(("output", "declared"), [(12, 13), (12, 400), (1, 2)])
def test_more_is_declared_and_a_stop_id_ends_the_output_in_time(output, declared):
    body = json.loads(completion_body("m", IDS, output, declared, ignore_eos=False, stop_id=899))
    assert (body["max_tokens"], body["ignore_eos"]) == (declared, False)
    assert body["stop_token_ids"] == [899]
    assert body["logit_bias"] == {"899": 100}
    assert generated(body, likes=lambda out: 7) == (output, "stop")
    # Even a model that wants to end at once, or to say the stop id, has to wait.
    assert generated(body, likes=lambda out: EOS) == (output, "stop")
    assert generated(body, likes=lambda out: 899) == (output, "stop")


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_declared_output_is_reached_whatever_the_model_likes(ignore_eos):
    body = json.loads(completion_body("m", IDS, 12, 12, ignore_eos=ignore_eos))
    assert generated(body, likes=lambda out: EOS) == (12, "length")


EOS = 2


def generated(body, likes):
    """Output length and finish reason by the engines' rules: masks, bias, then stop ids or length.

    ``likes(out)`` is the id to which a model gives logit 30, all others have 0.
    """
    out, stops = [], set(body.get("stop_token_ids", []))
    while True:
        logits = np.zeros(1000)
        logits[likes(out)] = 30.0
        if len(out) < body["min_tokens"]:
            logits[[EOS, *stops]] = -np.inf
        for token, bias in body.get("logit_bias", {}).items():
            logits[int(token)] += bias
        out.append(int(logits.argmax()))
        if not body["ignore_eos"] and out[-1] in stops | {EOS}:
            return len(out), "stop"
        if len(out) >= body["max_tokens"]:
            return len(out), "length"


@pytest.mark.parametrize(
    ("output", "declared", "ignore_eos", "message"),
    [
        (10, 20, True, "declare the output length or drop ignore_eos"),
        (10, 9, False, "below the output of 10 tokens"),
        (0, 0, True, "at least one output token"),
    ],
)
def test_impossible_outputs_are_refused(output, declared, ignore_eos, message):
    with pytest.raises(ValueError, match=message):
        completion_body("m", IDS, output, declared, ignore_eos=ignore_eos)
