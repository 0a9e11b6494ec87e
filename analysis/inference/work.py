"""What a server has served of the resource that is short, and who had the tokens that it counted.

By even progress between a request's own instants, or by the engine's counter (theory.md 6.3).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.frames import RunFrames, tokens_received

Number = TypeVar("Number", float, NDArray[np.float64])


def kv_work(prompt_tokens: Number, tokens: Number) -> Number:
    """KV demand served, in token-steps, of a request that has so many of its output tokens.

    s*j + j*(j-1)/2: the prompt's step holds s tokens, each later step one more (theory.md 1.1, engine
    convention, whole prompt in one step).
    """
    return prompt_tokens * tokens + tokens * (tokens - 1.0) / 2.0


def work_of(
    binding: str,
    prompt_tokens: NDArray[np.float64],
    max_tokens: NDArray[np.float64],
    tokens: NDArray[np.float64],
) -> NDArray[np.float64]:
    """What a request with so many of its output tokens has taken of the resource that is short.

    ``binding``: "kv_cache", KV demand in token-steps (`kv_work`); "output_reservation", the same with
    the declared ``max_tokens`` held from the second token on; "max_num_batched_tokens", tokens computed;
    "max_num_seqs", steps. The prompt counts with the first token; nothing is taken before it.
    """
    if binding == "kv_cache":
        return kv_work(prompt_tokens, tokens)
    begun = np.minimum(tokens, 1.0)
    if binding == "output_reservation":
        return np.asarray((prompt_tokens + max_tokens - 1.0) * (tokens - begun))
    if binding == "max_num_batched_tokens":
        return np.asarray((prompt_tokens - 1.0) * begun + tokens)
    return tokens


def work_done(
    frames: RunFrames, at_s: NDArray[np.float64], binding: str = "kv_cache"
) -> NDArray[np.float64]:
    """Work served until each instant, in the unit of ``binding`` (`work_of`), shape of ``at_s``."""
    tokens = tokens_received(frames, at_s)
    return np.asarray(work_of(binding, *_lengths(frames), tokens).sum(axis=0))


def _lengths(frames: RunFrames) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Prompt and declared output of the started requests, shape (started requests, 1) each."""
    prompt, declared = (
        frames.per_request(column)[frames.started, None]
        for column in ("prompt_tokens", "max_tokens")
    )
    return prompt, declared


def work_by_counter(
    frames: RunFrames, at_s: NDArray[np.float64], binding: str = "kv_cache"
) -> NDArray[np.float64]:
    """Work served until each instant, with as many tokens as the engine's own counter has by then.

    Of output tokens and tokens computed the counter tells the work itself. KV demand takes who has them:
    tokens are put where they came (`tokens_by_counter`), and what then still differs from the counter,
    as of chunks that brought several tokens, weighs as much as a mean token between the first and the
    last instant. By even progress (`work_done`) where the counter was not recorded, stood still or went
    back. The instants lie within the samples.
    """
    if "generation_tokens" not in frames.engine:
        return work_done(frames, at_s, binding)
    counted = tokens_counted(frames, at_s)
    forward = bool((np.diff(frames.per_sample("generation_tokens")) >= 0).all())
    if not forward or counted[-1] <= counted[0]:
        return work_done(frames, at_s, binding)
    if binding == "max_num_seqs":
        return counted
    prompt, declared = _lengths(frames)
    if binding == "max_num_batched_tokens":
        read = at_s >= frames.per_request("first_token_s")[frames.started, None]
        return np.asarray(((prompt - 1.0) * read).sum(axis=0) + counted)
    tokens = tokens_by_counter(frames, at_s, counted)
    work = work_of(binding, prompt, declared, tokens).sum(axis=0)
    total = tokens.sum(axis=0)
    per_token = (work[-1] - work[0]) / max(total[-1] - total[0], 1.0)
    return np.asarray(work + (counted - total) * per_token)


def tokens_counted(frames: RunFrames, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Output tokens of this run by the engine's counter until each instant, shape of ``at_s``.

    The counter goes on from run to run: what it had before is what the first sample shows above the
    tokens that had been received by then.
    """
    seen_s, counter = frames.per_sample("t_s"), frames.per_sample("generation_tokens")
    before = counter[0] - tokens_received(frames, seen_s[:1]).sum()
    return np.asarray(np.interp(at_s, seen_s, counter) - before)


def tokens_by_counter(
    frames: RunFrames, at_s: NDArray[np.float64], counted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Output tokens of each started request until each instant, of which ``counted`` in all.

    Engines preempt the youngest: such a request stands still after its first tokens, and then takes one
    with each decoding step until its last. So what it has is what it ended with less the steps to come
    (`decoding_steps`), at least one; what the counter has beyond the sum of these is shared evenly by
    those that stand at one. Shape (started requests, instants).
    """
    first_s, last_s, got = (
        frames.per_request(column)[frames.started, None]
        for column in ("first_token_s", "last_token_s", "output_tokens")
    )
    to_come = np.maximum(decoding_steps(frames, last_s) - decoding_steps(frames, at_s), 0.0)
    tokens = np.where(at_s >= first_s, np.clip(got - to_come, 1.0, got), 0.0)
    still = (tokens == 1.0) & (got > 1.0)
    missing = np.maximum(counted - tokens.sum(axis=0), 0.0) / np.maximum(still.sum(axis=0), 1)
    return np.where(still, np.minimum(1.0 + missing, got), tokens)


def decoding_steps(frames: RunFrames, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Steps in which running requests took a token each, until each instant; shape of ``at_s``.

    Tokens counted that were nobody's first, over those running, from sample to sample; after the last
    sample at the pace of the last mean residence. Steps that only read prompts do not count, and where
    many of those running read theirs in chunks there were more.
    """
    seen_s, running = frames.per_sample("t_s"), frames.per_sample("running")
    begun = np.searchsorted(
        np.sort(frames.per_request("first_token_s")[frames.started]), seen_s, "right"
    )
    decoded = np.diff(frames.per_sample("generation_tokens") - begun)
    each = decoded / np.maximum((running[1:] + running[:-1]) / 2.0, 1.0)
    # A first token may reach the client before or after the counter.
    steps = np.maximum.accumulate(np.append(0.0, np.cumsum(each)))
    since = int(np.searchsorted(seen_s, seen_s[-1] - frames.mean_residence_s))
    since = min(since, len(seen_s) - 2)
    pace = (steps[-1] - steps[since]) / (seen_s[-1] - seen_s[since])
    beyond = np.maximum(at_s - seen_s[-1], 0.0) * pace
    return np.asarray(np.interp(at_s, seen_s, steps) + beyond)
