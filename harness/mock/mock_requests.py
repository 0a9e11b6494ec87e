"""What a request to the mock server asks for: read from its JSON, the same in both dialects.

A text prompt has one token per word; the mock's own words map back to their numbers.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from aiohttp import web

VOCABULARY = 1000
FORCING_BIAS = 50.0
"""A logit bias from here on makes its token the likeliest, whatever the model says."""


class ApiError(Exception):
    """A refused request; each dialect has its own JSON for it."""

    def __init__(self, message: str, param: str | None = None, code: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class MalformedBody(ApiError):
    """The body is not what the route takes, whatever the server's state."""


class NoSuchRoute(ApiError):
    """There is nothing at this path, or not by this method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request asks for, checked; ``output_tokens`` is the length it will have at its end."""

    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    ignore_eos: bool
    stop_token: int | None
    """The token that will end the output before ``max_tokens``; None where nothing does."""
    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def finish_reason(self) -> str:
        return "length" if self.stop_token is None else "stop"

    @property
    def shown_tokens(self) -> int:
        """Output tokens that appear as text: a stop token does not."""
        return self.output_tokens - (self.stop_token is not None)


async def json_object(request: web.Request) -> dict[str, Any]:
    """The request's body. Raises MalformedBody for anything but a JSON object."""
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise MalformedBody(f"The request body is not valid JSON: {error}.", "body") from error
    if not isinstance(body, dict):
        raise MalformedBody("The request body must be a JSON object.", "body")
    return body


def integer(body: dict[str, Any], name: str, absent: int) -> int:
    """The integer under ``name``, or ``absent``. Raises MalformedBody for anything else."""
    value = body.get(name)
    if value is None:
        return absent
    if type(value) is not int:
        raise MalformedBody(f"{name} must be an integer, got {json.dumps(value)}.", name)
    return value


def stream_options(body: dict[str, Any]) -> tuple[bool, bool]:
    """Is usage asked for at the end, and in every chunk?"""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise MalformedBody("stream_options must be an object.", "stream_options")
    return bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))


def designed_end(body: dict[str, Any], min_tokens: int, max_tokens: int) -> tuple[int, int | None]:
    """Output tokens that the request will have, and the stop token that ends it before its limit.

    A stop token that its bias makes the likeliest comes as soon as ``min_tokens`` allow it.
    """
    bias, stops = body.get("logit_bias") or {}, body.get("stop_token_ids") or []
    if not isinstance(bias, dict) or not is_token_ids(stops):
        raise MalformedBody(
            "logit_bias must be an object, stop_token_ids a list of ids.", "logit_bias"
        )
    for token in stops:
        forced = bias.get(str(token))
        if (
            isinstance(forced, int | float)
            and forced >= FORCING_BIAS
            and min_tokens + 1 < max_tokens
        ):
            return min_tokens + 1, token
    return max_tokens, None


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
    raise MalformedBody("prompt must be one non-empty string or one list of token ids.", "prompt")


def words_to_ids(text: str) -> list[int]:
    """One token per word, at least one; the server's own words map back to their numbers."""
    return [
        int(word[1:])
        if word[0] == "w" and word[1:].isdecimal()
        else zlib.crc32(word.encode(errors="surrogatepass")) % VOCABULARY
        for word in text.split()
    ] or [0]


def ids_to_words(tokens: Any) -> str:
    """The text of token ids. Raises MalformedBody for anything else."""
    if not is_token_ids(tokens):
        raise MalformedBody("tokens must be a list of token ids.", "tokens")
    return " ".join(f"w{token}" for token in tokens or [])


def messages_text(body: dict[str, Any]) -> str:
    """The text of a chat, joined by spaces. Raises MalformedBody when there is none."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise MalformedBody("messages must be a non-empty list.", "messages")
    texts: list[str] = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = [{"text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
            raise MalformedBody("each message needs a content of text.", "messages")
        texts += [str(part.get("text", "")) for part in parts]
    return " ".join(texts)


def text_to_tokenize(body: dict[str, Any]) -> str:
    """The prompt or the messages of a /tokenize request. Raises MalformedBody when there is no text."""
    text = messages_text(body) if "messages" in body else body.get("prompt")
    if not isinstance(text, str):
        raise MalformedBody("prompt must be a string.", "prompt")
    return text
