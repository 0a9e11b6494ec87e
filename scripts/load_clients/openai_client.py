"""The `openai` package as a load client: every way to ask for a completion, a few times each.

    python openai_client.py --url http://127.0.0.1:8000 --report report.json

Synchronous and asynchronous, streamed and whole, completions and chat: eight ways. Prints what the
answers say of themselves, and how many words were received.
"""

import argparse
import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAI

MODEL = "critrate-mock"
PER_WAY = 6
TOO_LONG = 5000


@dataclass
class Report:
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    words: int = 0
    refused: int = 0

    def add(self, text: str, usage: Any, asked_tokens: int, finish_reason: str | None) -> None:
        if finish_reason != "length":
            raise SystemExit(f"finish_reason is {finish_reason!r}, not 'length'")
        if usage.completion_tokens != asked_tokens:
            raise SystemExit(f"{usage.completion_tokens} output tokens, {asked_tokens} asked for")
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.output_tokens += usage.completion_tokens
        self.words += len(text.split())

    def add_chunks(self, chunks: list[Any], chat: bool, asked_tokens: int) -> None:
        *content, last = chunks
        if last.choices:
            raise SystemExit("the last chunk should hold the usage alone")
        choices = [chunk.choices[0] for chunk in content]
        texts = [(c.delta.content if chat else c.text) or "" for c in choices]
        self.add("".join(texts), last.usage, asked_tokens, choices[-1].finish_reason)

    def add_whole(self, answer: Any, chat: bool, asked_tokens: int) -> None:
        choice = answer.choices[0]
        text = choice.message.content if chat else choice.text
        self.add(text, answer.usage, asked_tokens, choice.finish_reason)


def asked(chat: bool, stream: bool) -> Iterator[dict[str, Any]]:
    """Arguments of one way's requests: prompts of 8 to 128 words, 4 to 44 output tokens."""
    for i in range(PER_WAY):
        text = " ".join(f"w{(37 * i + j) % 1000}" for j in range(8 + 24 * i))
        request: dict[str, Any] = {"model": MODEL, "max_tokens": 4 + 8 * i}
        request |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        if stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        yield request


def synchronous(client: OpenAI, report: Report, chat: bool, stream: bool) -> None:
    create = client.chat.completions.create if chat else client.completions.create
    for request in asked(chat, stream):
        answer = create(**request)
        if stream:
            report.add_chunks(list(answer), chat, request["max_tokens"])
        else:
            report.add_whole(answer, chat, request["max_tokens"])


async def asynchronous(client: AsyncOpenAI, report: Report, chat: bool, stream: bool) -> None:
    create = client.chat.completions.create if chat else client.completions.create

    async def one(request: dict[str, Any]) -> None:
        answer = await create(**request)
        if stream:
            chunks = [chunk async for chunk in answer]
            report.add_chunks(chunks, chat, request["max_tokens"])
        else:
            report.add_whole(answer, chat, request["max_tokens"])

    await asyncio.gather(*map(one, asked(chat, stream)))


async def all_asynchronous(settings: dict[str, Any], report: Report) -> None:
    async with AsyncOpenAI(**settings) as client:
        for chat in (False, True):
            for stream in (False, True):
                await asynchronous(client, report, chat, stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--report", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    settings = {"base_url": f"{arguments.url}/v1", "api_key": "none", "max_retries": 0}
    report = Report()
    with OpenAI(**settings) as client:
        for chat in (False, True):
            for stream in (False, True):
                synchronous(client, report, chat, stream)
        try:
            client.completions.create(model=MODEL, prompt=["w1 " * TOO_LONG], max_tokens=4)
        except BadRequestError:
            report.refused += 1
    asyncio.run(all_asynchronous(settings, report))
    with open(arguments.report, "w") as file:
        json.dump(asdict(report), file)
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
