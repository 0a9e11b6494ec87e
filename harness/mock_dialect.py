"""vLLM's dialect of the OpenAI API as data: what a request asks for, and the bytes of its answer.

The shapes are those of vLLM 0.32.0. A text prompt has one token per word.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from dataclasses import dataclass
from typing import Any

from harness.mock import MockConfig

VOCABULARY = 1000


class ApiError(Exception):
    """A refused request: ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(self, message: str, param: str | None = None, code: int = 400) -> None:
        super().__init__(message)
        kind = {400: "BadRequestError", 404: "NotFoundError"}[code]
        self.code = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a completion request asks for, checked."""

    prompt_tokens: int
    output_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """The JSON around the text of an answer: plain completions or chat."""

    id_prefix: str
    object: str
    chunk_object: str
    chunk_open: bytes
    """From the choice's index to its text."""
    chunk_close: bytes
    chunk_close_last: bytes
    first_choice: bytes | None
    """The choice of a chunk that precedes the first token; None where there is none."""


COMPLETION = Shape(
    id_prefix="cmpl-",
    object="text_completion",
    chunk_object="text_completion",
    chunk_open=b'{"index":0,"text":"',
    chunk_close=(
        b'","logprobs":null,"finish_reason":null,"stop_reason":null,'
        b'"prompt_token_ids":null,"token_ids":null}]'
    ),
    chunk_close_last=(
        b'","logprobs":null,"finish_reason":"length","stop_reason":null,'
        b'"prompt_token_ids":null,"token_ids":null}]'
    ),
    first_choice=None,
)
CHAT = Shape(
    id_prefix="chatcmpl-",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    chunk_open=b'{"index":0,"delta":{"content":"',
    chunk_close=b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]',
    chunk_close_last=(
        b'"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]'
    ),
    first_choice=(
        b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}]'
    ),
)


class TokenStream:
    """Turns delivered tokens into server-sent events on one connection.

    The events go straight to the transport, framed as HTTP chunks: the step loop writes without
    waking a task per token. A client that does not read is buffered, up to its own output.
    """

    __slots__ = ("_asked", "_done", "_head", "_interval", "_sent", "_shape", "_transport", "_words")

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        shape: Shape,
        asked: Asked,
        head: bytes,
        words: Words,
        interval: int,
        done: asyncio.Future[None],
    ) -> None:
        self._transport = transport
        self._shape = shape
        self._asked = asked
        self._head = head
        self._words = words
        self._interval = interval
        self._done = done
        self._sent = 0

    def push(self, outputs: int, finished: bool) -> None:
        """One more token: the first and the last go out at once, others every ``interval``."""
        if not finished and (outputs - 1) % self._interval:
            return
        shape, head = self._shape, self._head
        text = self._words.text(self._sent, outputs)
        close = shape.chunk_close_last if finished else shape.chunk_close
        event = head + shape.chunk_open + text + close + self._usage(outputs)
        if self._sent == 0 and shape.first_choice is not None:
            event = head + shape.first_choice + self._usage(0) + event
        self._sent = outputs
        if finished:
            if self._asked.include_usage:
                usage = _usage_bytes(self._asked.prompt_tokens, outputs)
                event += head + b"]" + usage
            event += b"data: [DONE]\n\n"
            if not self._done.done():
                self._done.set_result(None)
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))

    def _usage(self, outputs: int) -> bytes:
        if self._asked.continuous_usage:
            return _usage_bytes(self._asked.prompt_tokens, outputs)
        return b"}\n\n"


def _usage_bytes(prompt_tokens: int, outputs: int) -> bytes:
    return b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}\n\n' % (
        prompt_tokens,
        prompt_tokens + outputs,
        outputs,
    )


class Words:
    """The words of one output: a stretch of a fixed cycle of words."""

    __slots__ = ("_cycle", "_start")

    def __init__(self, cycle: list[bytes], start: int) -> None:
        self._cycle = cycle
        self._start = start

    def text(self, first: int, end: int) -> bytes:
        """Words ``first`` to ``end`` - 1, each with a leading blank."""
        cycle, start = self._cycle, self._start
        if end - first == 1:
            return cycle[(start + first) % VOCABULARY]
        return b"".join(cycle[(start + i) % VOCABULARY] for i in range(first, end))


# -- reading requests ------------------------------------------------------------------------------


def integer(body: dict[str, Any], name: str, absent: int) -> int:
    """The integer under ``name``, or ``absent``. Raises ApiError for anything else."""
    value = body.get(name)
    if value is None:
        return absent
    if type(value) is not int:
        raise ApiError(f"{name} must be an integer, got {json.dumps(value)}.", name)
    return value


def is_token_ids(value: Any) -> bool:
    """Is this a list of whole numbers, none of them negative?"""
    return isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0


def prompt_ids(prompt: Any) -> list[int]:
    """Token ids of a string, of a list of ids, or of a list that holds one of these."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return words_to_ids(prompt)
    if prompt and is_token_ids(prompt):
        ids: list[int] = prompt
        return ids
    raise ApiError("prompt must be one non-empty string or one list of token ids.", "prompt")


def words_to_ids(text: str) -> list[int]:
    """One token per word, at least one; the server's own words map back to their numbers."""
    return [
        int(word[1:])
        if word[0] == "w" and word[1:].isdecimal()
        else zlib.crc32(word.encode(errors="surrogatepass")) % VOCABULARY
        for word in text.split()
    ] or [0]


def messages_text(body: dict[str, Any]) -> str:
    """The text of a chat, joined by spaces. Raises ApiError when there is none."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a non-empty list.", "messages")
    texts: list[str] = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = [{"text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
            raise ApiError("each message needs a content of text.", "messages")
        texts += [str(part.get("text", "")) for part in parts]
    return " ".join(texts)


def asked_for(
    body: dict[str, Any], prompt_tokens: int, max_tokens: int, max_model_len: int
) -> Asked:
    """Check a request's numbers. Raises ApiError where vLLM would refuse, and unless n is 1."""
    if integer(body, "n", 1) != 1:
        raise ApiError("n must be 1: this server gives one choice per request.", "n")
    if max_tokens < 1:
        message = f"max_tokens must be at least 1, got {max_tokens}."
        raise ApiError(message, "max_tokens")
    min_tokens = integer(body, "min_tokens", 0)
    if not 0 <= min_tokens <= max_tokens:
        raise ApiError(
            f"min_tokens must lie between 0 and max_tokens={max_tokens}, got {min_tokens}.",
            "min_tokens",
        )
    if prompt_tokens + max_tokens > max_model_len:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens. "
            f"However, you requested {max_tokens} output tokens and your prompt contains "
            f"{prompt_tokens} input tokens, for a total of {prompt_tokens + max_tokens} "
            "tokens. Please reduce the length of the input prompt or the number of requested "
            "output tokens.",
            "input_tokens",
        )
    stream = bool(body.get("stream"))
    options = body.get("stream_options") or {}
    if options and not stream:
        message = "Stream options can only be defined when `stream=True`."
        raise ApiError(message, "stream_options")
    if not isinstance(options, dict):
        raise ApiError("stream_options must be an object.", "stream_options")
    usage = bool(options.get("include_usage"))
    continuous = usage and bool(options.get("continuous_usage_stats"))
    return Asked(prompt_tokens, max_tokens, stream, usage, continuous)


# -- writing answers -------------------------------------------------------------------------------


def chunk_head(answer_id: str, shape: Shape, created: int, model: str) -> bytes:
    """A chunk from its start to the opening bracket of its choices."""
    fields = {"id": answer_id, "object": shape.chunk_object, "created": created, "model": model}
    return b"data: " + json.dumps(fields, separators=(",", ":"))[:-1].encode() + b',"choices":['


def whole_answer(
    answer_id: str, shape: Shape, model: str, text: str, asked: Asked
) -> dict[str, Any]:
    """An answer that is not streamed."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
    choice |= {"stop_reason": None, "token_ids": None}
    if shape is CHAT:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice |= {"text": text, "prompt_logprobs": None, "prompt_token_ids": None}
    return {
        "id": answer_id,
        "object": shape.object,
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {
            "prompt_tokens": asked.prompt_tokens,
            "total_tokens": asked.prompt_tokens + asked.output_tokens,
            "completion_tokens": asked.output_tokens,
            "prompt_tokens_details": None,
        },
        "kv_transfer_params": None,
    }


def cache_config(config: MockConfig) -> dict[str, str]:
    """Labels of ``vllm:cache_config_info``. vLLM counts its null block; so does the mock."""
    limits = config.limits
    num_blocks = (config.claimed_num_blocks or limits.num_blocks) + 1
    concurrency = num_blocks / -(-config.max_model_len // limits.block_size)
    return {
        "block_size": str(limits.block_size),
        "cache_dtype": "auto",
        "effective_attention_block_size": str(limits.block_size),
        "enable_prefix_caching": "False",
        "gpu_memory_utilization": "0.92",
        "kv_cache_max_concurrency": str(concurrency),
        "kv_cache_memory_bytes": "None",
        "kv_cache_size_tokens": str(int(concurrency * config.max_model_len)),
        "num_cpu_blocks": "None",
        "num_gpu_blocks": str(num_blocks),
        "num_gpu_blocks_override": str(num_blocks),
        "sliding_window": "None",
    }
