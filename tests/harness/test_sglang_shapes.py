"""The mock's answers beside those recorded from SGLang 0.5.23 (tests/harness/sglang/README.md)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime
from harness.mock.mock import MockConfig, SGLangSettings
from loadgen.exchange import TokenStream
from tests.harness import served

RECORDED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "sglang" / "answers.json").read_text()
)
FAMILIES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "sglang" / "families.json").read_text()
)
CONFIG = MockConfig(
    limits=EngineLimits(
        num_blocks=2048,
        block_size=1,
        max_num_seqs=1024,
        max_num_batched_tokens=4096,
        max_model_len=8192,
        sglang=SGLangRules(radix_cache=False),
    ),
    step_time=StepTime(b0_s=1e-3),
    model="tiny",
    sglang=SGLangSettings(decode_log_interval=1, load_snapshot_publish_interval=1),
)
DEPENDS_ON_ARGUMENTS = {"context_length", "max_running_requests"}
"""Null where the server's arguments leave them out; the mock's never do."""
VALIDATION = "validation error"


# -- shapes ----------------------------------------------------------------------------------------


def shape(value: Any, name: str = "") -> Any:
    """Keys and types of a JSON value; of an error message, its text without the numbers."""
    if isinstance(value, dict):
        return {key: shape(inner, key) for key, inner in value.items() if key != "critrate_mock"}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    if name in DEPENDS_ON_ARGUMENTS:
        return "argument"
    if name in ("message", "error"):
        return re.sub(r"\d+", "N", value)
    return type(value).__name__


def events(text: str) -> Iterator[Any]:
    """The events of a stream by their shapes; tokens that came together are one event or several."""
    *parts, rest = text.split("\n\n")
    assert rest == ""
    shapes = [
        part if part == "data: [DONE]" else shape(json.loads(part.removeprefix("data: ")))
        for part in parts
    ]
    return (event for event, _ in groupby(shapes, key=_without_ids))


def _without_ids(event: Any) -> Any:
    """/generate repeats all ids in each event: their number is none of its shape."""
    return event | {"output_ids": None} if "output_ids" in event else event


def answer_shape(status: int, content_type: str | None, text: str) -> tuple[Any, ...]:
    """What a client could notice of an answer, beside its values."""
    if content_type == "application/json" and text:
        found = json.loads(text)
        if VALIDATION in str(found) or found.get("type") == "Bad Request":
            found["message"] = VALIDATION
        return status, content_type, shape(found)
    if content_type is not None and content_type.startswith("text/event-stream"):
        return status, content_type, [_without_ids(event) for event in events(text)]
    if content_type is None:
        return status, text
    return status, content_type, re.sub(r"(?m) \S+$", "", text)


def recorded_shape(entry: dict[str, Any]) -> tuple[Any, ...]:
    text = json.dumps(entry["json"]) if "json" in entry else entry["text"]
    shown = answer_shape(entry["status"], entry.get("content_type"), text)
    return methods(entry.get("allow", "")), *shown


def methods(allow: str) -> set[str]:
    """Of an Allow header."""
    return set(re.findall(r"\w+", allow))


def spelled_out(value: Any) -> Any:
    """A request with the prompts that its recording abbreviates."""
    if isinstance(value, dict):
        if value.keys() == {"ids"}:
            return [5] * value["ids"]
        if value.keys() == {"words"}:
            return "word " * value["words"]
        return {key: spelled_out(inner) for key, inner in value.items()}
    return [spelled_out(inner) for inner in value] if isinstance(value, list) else value


async def ask(session: aiohttp.ClientSession, entry: dict[str, Any]) -> tuple[Any, ...]:
    method, path = entry["request"].split()
    body = spelled_out(entry.get("body"))
    data = body if isinstance(body, str) or body is None else json.dumps(body)
    headers = {} if data is None else {"Content-Type": "application/json"}
    async with session.request(method, path, data=data, headers=headers) as response:
        text = await response.text()
        kind = response.headers.get("Content-Type") if "content_type" in entry else None
        if kind is not None and kind.startswith("text/plain") and method == "HEAD":
            text = ""
        shown = answer_shape(response.status, kind, text)
        return methods(response.headers.get("Allow", "")), *shown


@pytest.fixture(scope="module")
def given() -> dict[str, tuple[Any, ...]]:
    """The shapes of the mock's answers to all recorded requests, in their order, from one server."""

    async def talk(session: aiohttp.ClientSession) -> dict[str, tuple[Any, ...]]:
        warm_up = {
            "text": "The capital city of France is",
            "sampling_params": {"max_new_tokens": 8},
        }
        async with session.post("/generate", json=warm_up) as response:
            await response.read()
        found = {}
        for name, entry in RECORDED.items():
            if entry.get("busy"):
                async with busy(session):
                    found[name] = await ask(session, entry)
            else:
                found[name] = await ask(session, entry)
        return found

    result: dict[str, tuple[Any, ...]] = served.with_server(CONFIG, talk)
    return result


def busy(session: aiohttp.ClientSession) -> Any:
    """A request that runs until it is left."""
    sampling = {"max_new_tokens": 2000, "ignore_eos": True}
    body = {"input_ids": [5], "stream": True, "sampling_params": sampling}
    return session.post("/generate", json=body)


@pytest.mark.parametrize("name", RECORDED)
def test_the_mock_answers_as_recorded(name: str, given: dict[str, tuple[Any, ...]]) -> None:
    assert given[name] == recorded_shape(RECORDED[name])


# -- metrics ---------------------------------------------------------------------------------------


def families(page: str) -> dict[str, dict[str, Any]]:
    """Types, label sets and bucket edges of a metrics page, without the mock's own families."""
    types = dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", page))
    found: dict[str, dict[str, Any]] = {}
    for line in page.splitlines():
        if line.startswith(("#", "critrate_mock")):
            continue
        name, inner = re.fullmatch(r"([^{]+)\{(.*)\} \S+", line).groups()  # type: ignore[union-attr]
        labels = dict(re.findall(r'(\w+)="([^"]*)"', inner))
        edge = labels.pop("le", None)
        for varying in labels.keys() & {"model_name", "pid"}:
            labels[varying] = "*"
        family = re.sub("_(bucket|count|sum)$", "", name)
        family = family if types.get(family) == "histogram" else name
        entry = found.setdefault(family, {"type": types[family], "labels": [], "edges": []})
        entry["labels"] += [labels] * (labels not in entry["labels"])
        entry["edges"] += [edge] * (edge is not None and edge not in entry["edges"])
    return found


def recorded_families(later: bool) -> dict[str, dict[str, Any]]:
    shown: dict[str, dict[str, Any]] = {}
    for name, entry in FAMILIES.items():
        labels = entry["at_start"] + entry["later"] * later
        if labels:
            shown[name] = {
                "type": entry["type"],
                "labels": labels,
                "edges": entry.get("edges", []),
            }
    return shown


def test_series_appear_as_recorded() -> None:
    """At the start those of the warm-up; then those of a stream, an abort and retractions."""
    rules = SGLangRules(
        whole_output_of_ignore_eos=False, schedule_conservativeness=0.1, radix_cache=True
    )
    limits = EngineLimits(num_blocks=60, block_size=1, max_num_batched_tokens=64, sglang=rules)
    config = MockConfig(limits=limits, step_time=StepTime(b0_s=2e-3))

    async def talk(session: aiohttp.ClientSession) -> tuple[str, str]:
        async def page() -> str:
            async with session.get("/metrics") as response:
                return await response.text()

        body = {"prompt": [3] * 10, "max_tokens": 30, "stream": True, "ignore_eos": True}

        async def stream() -> None:
            async with session.post("/v1/completions", json=body) as response:
                await response.read()

        start = await page()
        await asyncio.gather(*(stream() for _ in range(6)))
        leaving = await session.post("/v1/completions", json=body)
        leaving.close()
        await asyncio.sleep(0.05)
        return start, await page()

    start, end = served.with_server(config, talk)
    for page, later in ((start, False), (end, True)):
        shown, recorded = families(page), recorded_families(later)
        assert shown.keys() == recorded.keys()
        for name, entry in recorded.items():
            assert shown[name]["type"] == entry["type"], name
            assert shown[name]["edges"] == entry["edges"], name
            by_items = [
                sorted(map(sorted, map(dict.items, e["labels"]))) for e in (shown[name], entry)
            ]
            assert by_items[0] == by_items[1], name


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_is_computed_for_a_prompt_that_the_scheduler_refuses(stream: bool) -> None:
    """Counted as on the real server: one token in, one out, a latency, but no first token."""
    body = {"prompt": [1] * 2042, "max_tokens": 4, "stream": stream}

    async def talk(session: aiohttp.ClientSession) -> str:
        async with session.post("/v1/completions", json=body) as response:
            await response.read()
        async with session.get("/metrics") as response:
            return await response.text()

    page = served.with_server(CONFIG, talk)

    def value(name: str, label: str = f'is_streaming="{str(stream).lower()}"') -> float:
        found = re.search(rf"(?m)^sglang:{name}\{{.*{label}.*\}} (\S+)$", page)
        return float(found[1]) if found else 0.0

    assert value("realtime_tokens_total", 'mode="prefill_compute"') == 1
    for name in ("num_requests_total", "prompt_tokens_total", "generation_tokens_total"):
        assert value(name) == 1
    assert value("e2e_request_latency_seconds_count") == 1
    assert value("time_to_first_token_seconds_count") == 0


# -- the client ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outcome", "counts", "content_events"),
    [
        ("completions_stream", "completed", (None, None), 4),
        ("completions_stream_usage", "completed", (4, 8), 4),
        ("completions_stream_usage_continuous", "completed", (4, 8), 4),
        ("completions_stream_continuous_only", "completed", (4, 8), 4),
        ("completions_stream_stop", "completed", (9, 8), 9),
        ("completions_input_too_long_pool_stream", "failed", (None, None), 0),
        # The role and the end are events of their own, and two of the four tokens came as one.
        ("chat_stream", "completed", (None, None), 5),
        ("chat_stream_usage_continuous", "completed", (4, 5), 6),
    ],
)
@pytest.mark.parametrize("read_bytes", [7, 1 << 20])
def test_our_client_reads_what_was_recorded(
    name: str,
    outcome: str,
    counts: tuple[int | None, int | None],
    content_events: int,
    read_bytes: int,
) -> None:
    """However the bytes are cut into reads."""
    stream, data = TokenStream(), RECORDED[name]["text"].encode()
    reads = range(0, len(data), read_bytes)
    for i in reads:
        stream.feed(data[i : i + read_bytes], i)
    found, error = stream.ending()
    assert (found, stream.usage_counts()) == (outcome, counts)
    assert stream.content_events == content_events
    if outcome == "completed":
        assert error is None
        assert stream.first_token_ns is not None and stream.last_token_ns is not None
        assert (stream.first_token_ns < stream.last_token_ns) == (len(reads) > 1)
    else:
        assert "Input length (2042 tokens) exceeds" in str(error)
        assert stream.first_token_ns is None
