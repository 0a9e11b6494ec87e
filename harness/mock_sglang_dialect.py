"""SGLang's dialect as data: what it accepts, and the bytes of its answers.

The shapes and rules of intake are those of SGLang 0.5.23 (`entrypoints/http_server.py`,
`entrypoints/openai`, `managers/tokenizer_manager.py`, `Scheduler.init_req_max_new_tokens`).
"""

from __future__ import annotations

import json
import time
from typing import Any

from analysis.sglang import longest_request
from harness.mock import MockConfig
from harness.mock_answers import DONE, Shape, Words
from harness.mock_books import Job
from harness.mock_requests import (
    ApiError,
    Asked,
    MalformedBody,
    NoSuchRoute,
    designed_end,
    integer,
    stream_options,
)

SECOND_NS = 1_000_000_000
DEFAULT_NEW_TOKENS = 128
UNLIMITED = 1 << 30
_COUNTS = b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d'
_USAGE = (
    _COUNTS + b',"prompt_tokens_details":null,"reasoning_tokens":0,'
    b'"completion_tokens_details":null}}\n\n'
)
COMPLETION = Shape(
    object="text_completion",
    chunk_object="text_completion",
    choice=b'{"index":0,"text":"%b","logprobs":null,"finish_reason":%b,"matched_stop":%b}]',
    no_usage=b',"usage":null}\n\n',
    usage=_USAGE,
    final_usage=_COUNTS + b',"reasoning_tokens":0}}\n\n',
)
CHAT = Shape(
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    choice=(
        b'{"index":0,"delta":{"reasoning_content":null,"content":"%b"},"logprobs":null,'
        b'"finish_reason":%b,"matched_stop":%b}]'
    ),
    no_usage=b"}\n\n",
    usage=_USAGE,
    final_usage=_USAGE,
    first_choice=(
        b'{"index":0,"delta":{"reasoning_content":null,"role":"assistant","content":""},'
        b'"logprobs":null,"finish_reason":null,"matched_stop":null}]'
    ),
    last_choice=(
        b'{"index":0,"delta":{"reasoning_content":null},"logprobs":null,'
        b'"finish_reason":%b,"matched_stop":%b}]'
    ),
    usage_from_the_first=False,
)


class TooLongForPool(ApiError):
    """The scheduler refuses a prompt that the front end let pass: a stream has begun by then."""


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """A refusal as its route answers it."""
    if isinstance(error, NoSuchRoute):
        return {"detail": error.message}
    if path == "/generate" and not isinstance(error, MalformedBody):
        return {"error": {"message": error.message}}
    kind = "Bad Request" if isinstance(error, MalformedBody) else "BadRequestError"
    return flat_error(error.message, kind, error.code)


def flat_error(message: str, kind: str, code: int) -> dict[str, Any]:
    """SGLang's OpenAI routes do not nest their errors."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def stream_error(path: str, error: ApiError) -> bytes:
    """A refusal as the only event of a stream that has begun."""
    body: dict[str, Any]
    if path != "/generate":
        body = {"error": flat_error(error.message, "BAD_REQUEST", error.code)}
    elif isinstance(error, TooLongForPool):
        reason = {"type": "abort", "message": error.message, "status_code": error.code}
        body = {"text": "", "output_ids": [], "meta_info": {"finish_reason": reason}}
    else:
        body = {
            "error": {
                "message": error.message,
                "type": "invalid_request_error",
                "code": error.code,
                "retryable": False,
            }
        }
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n" + DONE


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


def _check_new_tokens(most: int | None, least: int) -> None:
    if most is not None and most < 1:
        raise ApiError(f"max_new_tokens must be at least 1 on this server, got {most}.")
    if least < 0:
        raise ApiError(f"min_new_tokens must be in [0, max_new_tokens], got {least}.")
    if most is not None and least > most:
        raise ApiError(f"min_new_tokens must be in [0, max_new_tokens({most})], got {least}.")


def _clipped(config: MockConfig, prompt_tokens: int, max_new_tokens: int | None) -> int:
    """What the scheduler lets the request generate at most: it must fit the pool alone.

    Admission needs a little more than intake leaves; the real server would let such a request starve.
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


class GenerateEvents:
    """The events of a streamed /generate: each brings everything so far."""

    __slots__ = ("_asked", "_rid", "_text", "_words")

    def __init__(self, asked: Asked, rid: str, words: Words) -> None:
        self._asked, self._rid, self._words = asked, rid, words
        self._text = b""

    def __call__(self, job: Job, first: int, outputs: int, finished: bool) -> bytes:
        end = self._asked.shown_tokens if finished else outputs
        self._text += self._words.text(first, end)
        event = b"data: " + generated(job, self._asked, self._rid, self._text, finished) + b"\n\n"
        return event + DONE if finished else event


def generated(job: Job, asked: Asked, rid: str, text: bytes, finished: bool) -> bytes:
    """The JSON of /generate: text, ids and what is known of the request, all of it cumulative."""
    ids = text.replace(b" w", b",")
    if finished and asked.stop_token is not None:
        ids += b",%d" % asked.stop_token
    reason: dict[str, Any] | None = None
    if finished:
        length, stop = ("length", asked.max_tokens), ("matched", asked.stop_token)
        reason = dict((("type", asked.finish_reason), stop if asked.stop_token else length))
    epoch_s = time.time() - time.monotonic()
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": reason,
        "prompt_tokens": asked.prompt_tokens,
        "weight_version": "default",
        "num_retractions": job.request.preemptions,
        "forward_entry_time": epoch_s + job.scheduled_ns / SECOND_NS,
        "prefill_finished_time": epoch_s + job.first_ns / SECOND_NS,
        "queue_time": (job.scheduled_ns - job.receive_ns) / SECOND_NS,
        "reasoning_tokens": 0,
        "completion_tokens": job.request.outputs,
        "cached_tokens": 0,
        "cached_tokens_details": None,
    }
    if finished:
        meta["e2e_latency"] = (job.last_ns - job.receive_ns) / SECOND_NS
    shown = json.dumps(meta, separators=(",", ":")).encode()
    return b'{"text":"%b","output_ids":[%b],"meta_info":%b}' % (text, ids[1:], shown)


def whole_answer(rid: str, shape: Shape, model: str, text: str, asked: Asked) -> dict[str, Any]:
    """An answer of an OpenAI route that is not streamed."""
    choice: dict[str, Any] = {"index": 0}
    if shape is CHAT:
        choice["message"] = {"role": "assistant", "content": text, "reasoning_content": None}
    else:
        choice["text"] = text
    choice |= {
        "logprobs": None,
        "finish_reason": asked.finish_reason,
        "matched_stop": asked.stop_token,
    }
    return {
        "id": rid,
        "object": shape.object,
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": asked.prompt_tokens,
            "total_tokens": asked.prompt_tokens + asked.output_tokens,
            "completion_tokens": asked.output_tokens,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
            "completion_tokens_details": None,
        },
        "metadata": {"weight_version": "default"},
    }
