"""What SGLang 0.5.23 accepts, clips and refuses before a request reaches the queue, as data.

The rules are those of `managers/tokenizer_manager.py`, `sampling/sampling_params.py` and
`Scheduler.init_req_max_new_tokens`.
"""

from __future__ import annotations

from typing import Any

from analysis.schedulers.sglang import longest_request
from harness.mock.mock import MockConfig
from harness.mock.mock_requests import (
    ApiError,
    Asked,
    MalformedBody,
    designed_end,
    integer,
    stream_options,
)

DEFAULT_NEW_TOKENS = 128
UNLIMITED = 1 << 30
SAMPLING_FIELDS = (
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k"),
    *("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("min_new_tokens", "n"),
    *("json_schema", "regex", "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens"),
    *("spaces_between_special_tokens", "no_stop_trim", "stream_interval", "logit_bias"),
    *("sampling_seed", "custom_params", "beam_width", "watermark", "choice"),
)
"""What /generate takes; a field beside these is refused, one beside sampling_params is not."""


class TooLongForPool(ApiError):
    """The scheduler refuses a prompt that the front end let pass: a stream has begun by then."""


class UnknownField(MalformedBody):
    """/generate takes no sampling parameter of this name."""


def longest_input(config: MockConfig) -> int:
    """``max_req_input_len``: prompts have to be shorter than this."""
    return _longest(config) - 5


def _longest(config: MockConfig) -> int:
    return min(config.max_model_len - 1, config.limits.pool_tokens - 1)


def asked_for(
    config: MockConfig,
    body: dict[str, Any],
    sampling: dict[str, Any],
    prompt_tokens: int,
    max_new_tokens: int | None,
    min_new_tokens: int,
) -> Asked:
    """Check a request's numbers as SGLang does, and clip its ``max_new_tokens`` silently.

    ``sampling`` holds what ends an output: ignore_eos, stop_token_ids, logit_bias, n. Raises ApiError
    where SGLang would refuse, and unless n is 1.
    """
    if integer(sampling, "n", 1) != 1:
        raise ApiError("n must be 1: this server gives one choice per request.", "n")
    context = config.max_model_len
    if prompt_tokens >= context:
        raise ApiError(
            f"The input ({prompt_tokens} tokens) is longer than the model's context length "
            f"({context} tokens)."
        )
    total = prompt_tokens + (max_new_tokens or 0)
    if total > context:
        raise ApiError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. "
            f"You requested a total of {total} tokens: {prompt_tokens} tokens from the input messages "
            f"and {max_new_tokens} tokens for the completion. Please reduce the number of tokens in "
            "the input messages or the completion to fit within the limit."
        )
    _check_new_tokens(max_new_tokens, min_new_tokens)
    clipped = _clipped(config, prompt_tokens, max_new_tokens)
    ignore_eos = bool(sampling.get("ignore_eos"))
    # Stop tokens are ends of text to SGLang: ignore_eos switches them off, too.
    ends = {} if ignore_eos else sampling
    output_tokens, stop_token = designed_end(ends, min(min_new_tokens, clipped), clipped)
    usage, continuous = stream_options(body)
    return Asked(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_tokens=clipped,
        ignore_eos=ignore_eos,
        stop_token=stop_token,
        stream=bool(body.get("stream")),
        include_usage=usage,
        continuous_usage=continuous,
    )


def check_fields(sampling: dict[str, Any]) -> None:
    """Raise UnknownField for a sampling parameter that /generate does not know."""
    for name in sampling:
        if name not in SAMPLING_FIELDS:
            known = ", ".join(f"`{field}`" for field in SAMPLING_FIELDS)
            raise UnknownField(f"unknown field `{name}`, expected one of {known}")


def _check_new_tokens(most: int | None, least: int) -> None:
    if most is not None and most < 0:
        raise ApiError(f"max_new_tokens must be at least 0, got {most}.")
    if most == 0:
        raise ApiError("max_new_tokens must be at least 1 on this server, got 0.")
    if least < 0:
        raise ApiError(f"min_new_tokens must be in [0, max_new_tokens], got {least}.")
    if most is not None and least > most:
        raise ApiError(f"min_new_tokens must be in [0, max_new_tokens({most})], got {least}.")


def _clipped(config: MockConfig, prompt_tokens: int, max_new_tokens: int | None) -> int:
    """What the scheduler lets the request generate at most: it must fit the pool alone.

    Admission needs a little more than intake leaves. With ``ignore_eos`` and no radix cache the real
    server lets such a request, and all behind it, starve; here it ends one token earlier.
    """
    if prompt_tokens >= longest_input(config):
        raise TooLongForPool(
            f"Input length ({prompt_tokens} tokens) exceeds the maximum allowed length "
            f"({longest_input(config)} tokens). Use a shorter input or enable --allow-auto-truncate."
        )
    page, pool = config.limits.block_size, config.limits.pool_tokens
    paged = -(-prompt_tokens // page) * page
    intake = min(_longest(config) - prompt_tokens - 1, pool - paged - page - 1)
    room = min(intake, longest_request(config.limits) - prompt_tokens)
    if room < 1:
        raise TooLongForPool(
            f"Request prompt exceeds the KV memory budget: input_len={prompt_tokens}."
        )
    return min(UNLIMITED if max_new_tokens is None else max_new_tokens, room)
