"""Token-exact prompts as token ids, and request bodies encoded before the run.

Ids go to the server as they are: no tokenizer is needed, no template or start token is added, and
the prompt has exactly the length that the workload law drew.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import ArrayLike, NDArray

FIRST_ORDINARY_ID = 3
"""Ids 0, 1 and 2 are unknown, start and end of text in Llama-like vocabularies: a start id in the
middle of a prompt may be treated specially, so ids are drawn from here on. Vocabularies that keep
their special ids at the top need a range that ends below them."""


def make_prompts(prompt_tokens: ArrayLike, seed: int, vocabulary: range) -> list[NDArray[np.int32]]:
    """One prompt per length, token ids uniform in ``vocabulary``, such as range(3, 32000).

    The first tokens of each prompt spell its index (in an order shuffled by the seed), so that no
    two prompts of one call share their first block and a prefix cache never hits. Up to
    ``len(vocabulary)`` prompts even the first token is unique. Prompts of two seeds differ by
    chance only: a server's prefix cache should be off, or flushed between runs, all the same.

    Raises ValueError for a vocabulary without two ids, a length below 1, or a prompt that is too
    short to be told apart from the others.
    """
    lengths = np.asarray(prompt_tokens, dtype=np.int64)
    base = len(vocabulary)
    if base < 2 or vocabulary.step != 1 or vocabulary.start < 0:
        raise ValueError(f"vocabulary must be a range of at least two token ids, not {vocabulary}")
    if lengths.ndim != 1:
        raise ValueError(f"prompt lengths must have shape (n,), not {lengths.shape}")
    count = len(lengths)
    digits = 1
    while base**digits < count:
        digits += 1
    if count and lengths.min() < digits:
        raise ValueError(
            f"a prompt of {lengths.min()} tokens cannot be unique among {count} with {base} ids: "
            f"prompts need at least {digits} tokens"
        )
    rng = np.random.default_rng(seed)
    number = rng.permutation(count)
    label = np.stack([number // base**place % base for place in range(digits)], axis=1)
    prompts = []
    for own_label, length in zip(label, lengths, strict=True):
        prompt = rng.integers(base, size=length, dtype=np.int32)
        prompt[:digits] = own_label
        prompts.append(prompt + np.int32(vocabulary.start))
    return prompts


def completion_body(
    model: str,
    prompt_ids: NDArray[np.int32],
    output_tokens: int,
    max_tokens: int,
    temperature: float = 0.0,
) -> bytes:
    """JSON body of one streaming ``/v1/completions`` request that yields exactly ``output_tokens``.

    ``ignore_eos`` keeps the model from ending early, ``min_tokens`` also keeps stop ids of the
    server's own generation config from doing so, ``max_tokens`` ends the output. The usage in every
    chunk tells how far a request had come that was stopped at the horizon. The temperature is 0
    because greedy sampling costs the engine least and has no randomness of its own: the ids do not
    matter, only how many there are.

    Raises ValueError when the declared ``max_tokens`` exceeds the output length: a server cannot be
    told to stop before the limit it was given, so such a workload can be simulated but not yet
    driven.
    """
    if max_tokens != output_tokens:
        raise ValueError(
            f"declared max_tokens {max_tokens} differs from the designed output of {output_tokens} "
            "tokens: a live server stops exactly only at its limit, so declare the designed length"
        )
    if output_tokens < 1:
        raise ValueError(f"a completion needs at least one output token, not {output_tokens}")
    body = {
        "model": model,
        "prompt": prompt_ids.tolist(),
        "max_tokens": max_tokens,
        "min_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    return json.dumps(body, separators=(",", ":")).encode()
