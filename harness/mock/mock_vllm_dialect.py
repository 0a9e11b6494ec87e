"""vLLM's dialect of the OpenAI API as data: what it accepts, and the bytes of its answers.

The shapes are those of vLLM 0.32.0.
"""

from __future__ import annotations

import time
from typing import Any

from harness.mock.mock import MockConfig
from harness.mock.mock_answers import Shape
from harness.mock.mock_requests import (
    ApiError,
    Asked,
    NoSuchRoute,
    designed_end,
    integer,
    stream_options,
)

_USAGE = b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}\n\n'
COMPLETION = Shape(
    object="text_completion",
    chunk_object="text_completion",
    choice=(
        b'{"index":0,"text":"%b","logprobs":null,"finish_reason":%b,"stop_reason":%b,'
        b'"prompt_token_ids":null,"token_ids":null}]'
    ),
    no_usage=b"}\n\n",
    usage=_USAGE,
    final_usage=_USAGE,
)
CHAT = Shape(
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    choice=(
        b'{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b,'
        b'"stop_reason":%b,"token_ids":null}]'
    ),
    no_usage=b"}\n\n",
    usage=_USAGE,
    final_usage=_USAGE,
    first_choice=(
        b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}]'
    ),
)
ID_PREFIX = {COMPLETION.object: "cmpl-", CHAT.object: "chatcmpl-"}
_ERROR_TYPES = {400: "BadRequestError", 404: "NotFoundError"}


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """A refusal, the same on every route."""
    kind = error.message if isinstance(error, NoSuchRoute) else _ERROR_TYPES[error.code]
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": body}


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
    if body.get("stream_options") and not stream:
        message = "Stream options can only be defined when `stream=True`."
        raise ApiError(message, "stream_options")
    usage, continuous = stream_options(body)
    output_tokens, stop_token = designed_end(body, min_tokens, max_tokens)
    return Asked(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_tokens=max_tokens,
        ignore_eos=bool(body.get("ignore_eos")),
        stop_token=stop_token,
        stream=stream,
        include_usage=usage,
        continuous_usage=usage and continuous,
    )


def whole_answer(
    answer_id: str, shape: Shape, model: str, text: str, asked: Asked
) -> dict[str, Any]:
    """An answer that is not streamed."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": asked.finish_reason}
    choice |= {"stop_reason": asked.stop_token, "token_ids": None}
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
