"""SGLang's dialect as data: the bytes of its answers.

The shapes are those of SGLang 0.5.23 (`entrypoints/http_server.py`,
`entrypoints/openai`, `managers/tokenizer_manager.py`).
"""

from __future__ import annotations

import json
import time
from typing import Any

from harness.mock.mock_answers import DONE, Shape, Words
from harness.mock.mock_books import Job
from harness.mock.mock_requests import ApiError, Asked, MalformedBody, NoSuchRoute
from harness.mock.mock_sglang_intake import UnknownField

SECOND_NS = 1_000_000_000
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


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """A refusal as its route answers it."""
    if isinstance(error, NoSuchRoute):
        return {"detail": error.message}
    if isinstance(error, UnknownField):
        return {"error": error.message}
    if path == "/generate" and not isinstance(error, MalformedBody):
        return {"error": {"message": error.message}}
    kind = "Bad Request" if isinstance(error, MalformedBody) else "BadRequestError"
    return flat_error(error.message, kind, error.code)


def flat_error(message: str, kind: str, code: int) -> dict[str, Any]:
    """SGLang's OpenAI routes do not nest their errors."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def stream_error(path: str, error: ApiError) -> bytes:
    """A refusal as the only event of a stream that has begun."""
    if path != "/generate":
        shown = json.dumps({"error": flat_error(error.message, "BAD_REQUEST", error.code)})
        return b"data: " + shown.encode() + b"\n\n" + DONE
    fields = {
        "message": error.message,
        "type": "invalid_request_error",
        "code": error.code,
        "retryable": False,
    }
    return b"data: " + _compact({"error": fields}) + b"\n\n" + DONE


def aborted(job: Job, asked: Asked, rid: str, error: ApiError) -> bytes:
    """The stream of a /generate whose prompt the scheduler refused after a token in its place."""
    reason = {
        "type": "abort",
        "message": error.message,
        "status_code": error.code,
        "err_type": "BadRequestError",
    }
    body = {"text": "", "output_ids": [0], "meta_info": _meta_info(job, asked, rid, reason, True)}
    return b"data: " + _compact(body) + b"\n\n" + DONE


def _compact(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


class GenerateEvents:
    """The events of a streamed /generate: each brings everything so far."""

    __slots__ = ("_asked", "_rid", "_text", "_words")

    def __init__(self, asked: Asked, rid: str, words: Words) -> None:
        self._asked, self._rid, self._words = asked, rid, words
        self._text = b""

    def __call__(self, job: Job, first: int, outputs: int, finished: bool) -> bytes:
        end = self._asked.shown_tokens if finished else outputs
        self._text += self._words.text(first, end)
        event = generated(job, self._asked, self._rid, self._text, finished, first == 0)
        event = b"data: " + event + b"\n\n"
        return event + DONE if finished else event


def generated(
    job: Job, asked: Asked, rid: str, text: bytes, finished: bool, first: bool = True
) -> bytes:
    """The JSON of /generate: text, ids and what is known of the request, all of it cumulative."""
    ids = text.replace(b" w", b",")
    if finished and asked.stop_token is not None:
        ids += b",%d" % asked.stop_token
    reason: dict[str, Any] | None = None
    if finished:
        length, stop = ("length", asked.max_tokens), ("matched", asked.stop_token)
        reason = dict((("type", asked.finish_reason), stop if asked.stop_token else length))
    shown = _compact(_meta_info(job, asked, rid, reason, first))
    return b'{"text":"%b","output_ids":[%b],"meta_info":%b}' % (text, ids[1:], shown)


def _meta_info(
    job: Job, asked: Asked, rid: str, reason: dict[str, Any] | None, first: bool
) -> dict[str, Any]:
    """Times are wall times in s; a finished answer and the first event of a stream tell more."""
    epoch_s, outputs = time.time() - time.monotonic(), job.request.outputs
    sent = {"response_sent_to_client_ts": epoch_s + job.first_ns / SECOND_NS}
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": reason,
        "prompt_tokens": asked.prompt_tokens,
        "weight_version": "default",
        "num_retractions": job.request.preemptions,
        "storage_prefetch_wait": 0.0,
        "storage_staging_wait": 0.0,
        "forward_entry_time": epoch_s + job.scheduled_ns / SECOND_NS,
        "prefill_finished_time": epoch_s + job.first_ns / SECOND_NS,
        "queue_time": (job.scheduled_ns - job.receive_ns) / SECOND_NS,
        "reasoning_tokens": 0,
        "completion_tokens": outputs,
        "cached_tokens": 0,
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    if reason is None:
        return meta | sent if first else meta
    meta |= sent | {
        "weight_versions": weight_versions(outputs),
        "e2e_latency": (job.last_ns - job.receive_ns) / SECOND_NS,
        "request_received_ts": epoch_s + job.receive_ns / SECOND_NS,
        "first_token_latency": (job.first_ns - job.receive_ns) / SECOND_NS,
        "api_server_dispatch_finish_ts": epoch_s + job.receive_ns / SECOND_NS,
        "request_finished_ts": epoch_s + job.last_ns / SECOND_NS,
    }
    if outputs > 1:
        meta["decode_throughput"] = (
            (outputs - 1) / max(job.last_ns - job.first_ns, 1) * float(SECOND_NS)
        )
    return meta


def weight_versions(outputs: int) -> list[dict[str, Any]]:
    """Which weights generated which of the output tokens: always the same."""
    return [{"version": "default", "start": 0, "end": outputs}]


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
        "metadata": {
            "weight_version": "default",
            "weight_versions": weight_versions(asked.output_tokens),
        },
    }
