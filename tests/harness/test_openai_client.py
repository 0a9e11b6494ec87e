"""The `openai` package, unmodified, against the mock server in both dialects."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
import pytest

from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime
from harness.mock.mock import MockConfig
from harness.mock.mock_http import serve

MAX_MODEL_LEN = 512
LIMITS = {
    "vllm": EngineLimits(num_blocks=256, block_size=16, max_model_len=MAX_MODEL_LEN),
    "sglang": EngineLimits(
        num_blocks=4096, block_size=1, max_model_len=MAX_MODEL_LEN, sglang=SGLangRules()
    ),
}
LENGTHS = ((1, 1), (20, 7), (300, 40))
"""Words of the prompt, tokens asked for."""
WAYS = [(chat, stream) for chat in (False, True) for stream in (False, True)]
FINISHED = {"vllm": "vllm:request_success_total", "sglang": "sglang:num_requests_total"}

Way = tuple[bool, bool]
"""Chat or not, streamed or not."""
Answer = tuple[str, str, Any]
"""Text, finish reason, usage."""


def with_server(dialect: str, talk: Callable[[str], Any]) -> Any:
    """Run ``talk`` with the URL of a mock on a free port, in a thread beside the server's loop."""
    config = MockConfig(limits=LIMITS[dialect], step_time=StepTime(b0_s=0.001))

    async def run() -> Any:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        server = asyncio.ensure_future(serve(config, port.set_result, stop))
        try:
            return await asyncio.to_thread(talk, f"http://127.0.0.1:{await port}")
        finally:
            stop.set()
            await server

    return asyncio.run(run())


def settings(url: str) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}


def books(url: str, dialect: str) -> tuple[float, float, float]:
    """(requests finished, prompt tokens, generation tokens) that the mock has counted."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        page = response.read().decode()

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", page, re.M))

    tokens = [total(f"{dialect}:{kind}_tokens_total") for kind in ("prompt", "generation")]
    return total(FINISHED[dialect]), *tokens


def request(chat: bool, stream: bool, prompt_words: int, max_tokens: int) -> dict[str, Any]:
    text = " ".join(f"w{i}" for i in range(prompt_words))
    body: dict[str, Any] = {"model": "critrate-mock", "max_tokens": max_tokens}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def read_whole(answer: Any, chat: bool) -> Answer:
    (choice,) = answer.choices
    return choice.message.content if chat else choice.text, choice.finish_reason, answer.usage


def read_chunks(chunks: list[Any], chat: bool) -> Answer:
    *content, last = chunks
    assert last.choices == []
    choices = [chunk.choices[0] for chunk in content]
    assert all(choice.finish_reason is None for choice in choices[:-1])
    texts = [(choice.delta.content if chat else choice.text) or "" for choice in choices]
    return "".join(texts), choices[-1].finish_reason, last.usage


def ask(url: str) -> dict[Way, list[Answer]]:
    """One request after the other."""
    answers: dict[Way, list[Answer]] = {}
    with openai.OpenAI(**settings(url)) as client:
        for chat, stream in WAYS:
            create = client.chat.completions.create if chat else client.completions.create
            got = [create(**request(chat, stream, s, o)) for s, o in LENGTHS]
            answers[chat, stream] = [
                read_chunks(list(answer), chat) if stream else read_whole(answer, chat)
                for answer in got
            ]
    return answers


def ask_at_once(url: str) -> dict[Way, list[Answer]]:
    """All requests of one way at the same time."""

    async def run() -> dict[Way, list[Answer]]:
        async with openai.AsyncOpenAI(**settings(url)) as client:

            async def one(chat: bool, stream: bool, s: int, o: int) -> Answer:
                create = client.chat.completions.create if chat else client.completions.create
                answer = await create(**request(chat, stream, s, o))
                if stream:
                    return read_chunks([chunk async for chunk in answer], chat)
                return read_whole(answer, chat)

            return {way: await asyncio.gather(*(one(*way, *a) for a in LENGTHS)) for way in WAYS}

    return asyncio.run(run())


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("ways", [ask, ask_at_once])
def test_answers_and_books_agree(dialect: str, ways: Callable[[str], Any]) -> None:
    def talk(url: str) -> Any:
        assert books(url, dialect) == (0, 0, 0)
        return ways(url), books(url, dialect)

    answers, counted = with_server(dialect, talk)
    assert list(answers) == WAYS
    for way, given in answers.items():
        for (s, o), (text, finish_reason, usage) in zip(LENGTHS, given, strict=True):
            assert (usage.prompt_tokens, usage.completion_tokens) == (s, o), way
            assert usage.total_tokens == s + o, way
            assert len(text.split()) == o, way
            assert finish_reason == "length", way
    prompt, output = (len(WAYS) * sum(lengths) for lengths in zip(*LENGTHS, strict=True))
    assert counted == (len(WAYS) * len(LENGTHS), prompt, output)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_prompt_that_is_too_long_is_a_bad_request(dialect: str) -> None:
    def talk(url: str) -> Any:
        errors = []
        with openai.OpenAI(**settings(url)) as client:
            for chat, stream in WAYS:
                create = client.chat.completions.create if chat else client.completions.create
                with pytest.raises(openai.BadRequestError) as refused:
                    create(**request(chat, stream, MAX_MODEL_LEN - 3, 4))
                errors.append(refused.value)
        return errors, books(url, dialect)

    errors, counted = with_server(dialect, talk)
    for error in errors:
        assert error.status_code == 400 and str(MAX_MODEL_LEN) in error.message
    assert counted == (0, 0, 0)


def test_an_unknown_model_is_not_found_by_vllm() -> None:
    def talk(url: str) -> None:
        with openai.OpenAI(**settings(url)) as client:
            assert [model.id for model in client.models.list()] == ["critrate-mock"]
            with pytest.raises(openai.NotFoundError, match="other"):
                client.completions.create(model="other", prompt="w1")

    with_server("vllm", talk)
