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
    digits = label_tokens(count, base)
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


def label_tokens(count: int, ids: int) -> int:
    """How many first tokens tell ``count`` prompts apart, of so many token ids."""
    digits = 1
    while ids**digits < count:
        digits += 1
    return digits


def completion_body(
    model: str,
    prompt_ids: NDArray[np.int32],
    output_tokens: int,
    max_tokens: int,
    temperature: float = 0.0,
    *,
    ignore_eos: bool = True,
    stop_id: int = FIRST_ORDINARY_ID,
) -> bytes:
    """JSON body of one streaming ``/v1/completions`` request that yields exactly ``output_tokens``.

    **Declared as designed** (``max_tokens`` = o): ``max_tokens`` o ends the output, ``min_tokens`` o
    keeps end-of-text and other stop ids from ending it before, also where ``ignore_eos`` is false.
    The finish reason is ``length``.

    **Declared more** (``max_tokens`` > o): ``min_tokens`` o - 1, ``stop_token_ids`` [X] and
    ``logit_bias`` {X: 100} with X = ``stop_id``. While fewer than ``min_tokens`` ids are out, the
    server gives every stop id the logit -inf, which no finite bias lifts; after them the bias makes X
    the likeliest id, and X is a stop id. A server, real or mock, therefore ends the request with id
    number ``min_tokens`` + 1 = o, X itself, which counts as output; the finish reason is ``stop``,
    and no scheduler could foresee it. (An end-of-text that comes first at o ends it there as well.)
    X may be any id of the vocabulary, also one that prompts contain: stop ids are looked for in the
    output alone. Take the largest id that prompts are drawn from; one beyond them might lie beyond the
    model's vocabulary, which both engines refuse.

    Read in the sources of vLLM 0.32.0 (v1/sample/logits_processor/builtin.py: minimum first, then
    bias; worker/gpu/sample/logit_bias.py: bias first, then minimum, to the same effect, as -inf stays;
    v1/core/sched/utils.py: a stop id counts whatever ``ignore_eos`` says; engine/detokenizer.py: it is
    part of the output) and of SGLang 0.5.23 (sampling/sampling_batch_info.py: minimum first, then bias;
    managers/schedule_batch.py: **``ignore_eos`` switches stop ids off too**). Hence a request that
    declares more cannot ask for ``ignore_eos``. Not for SGLang under retraction: there a retracted
    request counts ``min_new_tokens`` anew from its second prefill, so that one retracted after k
    outputs ends at o + k or ``max_tokens``. vLLM keeps the count over a preemption.

    The usage in every chunk tells how far a request had come that was stopped at the horizon. The
    temperature is 0 because greedy sampling costs the engine least and has no randomness of its own:
    the ids do not matter, only how many there are.

    Raises ValueError for an output below 1, a declaration below the output, or one above it together
    with ``ignore_eos``.
    """
    if output_tokens < 1:
        raise ValueError(f"a completion needs at least one output token, not {output_tokens}")
    if max_tokens < output_tokens:
        raise ValueError(f"max_tokens {max_tokens} is below the output of {output_tokens} tokens")
    declares_more = max_tokens > output_tokens
    if declares_more and ignore_eos:
        raise ValueError(
            f"max_tokens {max_tokens} exceeds the output of {output_tokens} tokens, but a request "
            "with ignore_eos runs to its max_tokens: declare the output length or drop ignore_eos"
        )
    body = {
        "model": model,
        "prompt": prompt_ids.tolist(),
        "max_tokens": max_tokens,
        "min_tokens": output_tokens - 1 if declares_more else output_tokens,
        "ignore_eos": ignore_eos,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if declares_more:
        body |= {"stop_token_ids": [stop_id], "logit_bias": {str(stop_id): 100}}
    return json.dumps(body, separators=(",", ":")).encode()
