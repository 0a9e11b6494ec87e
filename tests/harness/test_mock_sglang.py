"""The mock server as SGLang 0.5.23 over real sockets: shapes, lengths, refusals, books, staleness."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import aiohttp
import numpy as np
import pytest

from analysis.schedulers.engine import EngineLimits, Request, SGLangRules, Step
from analysis.schedulers.sglang import SGLangEngine, longest_request
from analysis.schedulers.step_time import StepTime
from harness.mock.mock import MockConfig, SGLangSettings
from harness.mock.mock_books import Ended
from harness.mock.mock_sglang_books import Gauges, SGLangBooks
from harness.mock.mock_sglang_metrics import SGLangMetrics
from harness.servers.engine_metrics import engine_sample
from harness.servers.engines import MOCK_SGLANG
from loadgen.client import complete, open_session
from loadgen.prompts import completion_body
from loadgen.records import RequestRecord
from tests.harness import served
from tests.harness.served import Talk, events

pytestmark = pytest.mark.waits

LIMITS = EngineLimits(
    num_blocks=1024,
    block_size=1,
    max_num_seqs=77,
    max_num_batched_tokens=256,
    max_model_len=2048,
    sglang=SGLangRules(),
)
STEP = StepTime(b0_s=0.002)
FORCED = {"stop_token_ids": [9], "logit_bias": {"9": 100}}


def with_server(talk: Talk, **options: Any) -> Any:
    """Run ``talk`` against a mock of SGLang that logs every decode step."""
    usual: dict[str, Any] = {"limits": LIMITS, "step_time": STEP}
    usual["sglang"] = SGLangSettings(decode_log_interval=1, load_snapshot_publish_interval=1)
    return served.with_server(MockConfig(**(usual | options)), talk)


async def answer(session: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, Any]:
    async with session.post(path, json=body) as response:
        return response.status, json.loads(await response.text())


# -- shapes ----------------------------------------------------------------------------------------


def test_completion_stream() -> None:
    body = {"prompt": [5] * 20, "max_tokens": 4, "stream": True, "model": "any"}

    async def talk(session: aiohttp.ClientSession) -> None:
        chunks = await events(session, "/v1/completions", body)
        assert len(chunks) == 4
        assert re.fullmatch("[0-9a-f]{32}", chunks[0]["id"])
        first = {k: v for k, v in chunks[0].items() if k not in ("id", "created")}
        text = first["choices"][0].pop("text")
        assert re.fullmatch(r" w\d+", text)
        assert first == {
            "object": "text_completion",
            "model": "any",
            "choices": [
                {"index": 0, "logprobs": None, "finish_reason": None, "matched_stop": None}
            ],
            "usage": None,
        }
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 3 + ["length"]

    with_server(talk)


def test_usage_only_where_asked() -> None:
    def body(**options: bool) -> dict[str, Any]:
        asked = {"prompt": "one two three", "max_tokens": 3, "stream": True}
        return asked | {"stream_options": options}

    async def talk(session: aiohttp.ClientSession) -> None:
        *chunks, last = await events(session, "/v1/completions", body(include_usage=True))
        counts = {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}
        assert last["choices"] == [] and last["usage"] == counts | {"reasoning_tokens": 0}
        assert len(chunks) == 3 and not any(c["usage"] for c in chunks)
        both = body(include_usage=True, continuous_usage_stats=True)
        chunks = await events(session, "/v1/completions", both)
        assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]
        # Unlike vLLM, the counts in chunks do not need those at the end.
        chunks = await events(session, "/v1/completions", body(continuous_usage_stats=True))
        assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3]
        status, whole = await answer(session, "/v1/completions", body() | {"stream": False})
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        assert (status, whole["usage"]) == (200, counts | {"reasoning_tokens": 0} | details)
        versions = [{"version": "default", "start": 0, "end": 3}]
        assert whole["metadata"] == {"weight_version": "default", "weight_versions": versions}
        assert len(whole["choices"][0]["text"].split()) == 3

    with_server(talk)


def test_chat_stream_and_whole() -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello there you"}],
        "max_completion_tokens": 5,
    }
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = body | {"stream": True, "stream_options": options}

    async def talk(session: aiohttp.ClientSession) -> None:
        first, *chunks, end, usage = await events(session, "/v1/chat/completions", streamed)
        role = {"reasoning_content": None, "role": "assistant", "content": ""}
        assert first["choices"][0]["delta"] == role and "usage" not in first
        deltas = [list(c["choices"][0]["delta"]) for c in chunks]
        assert deltas == [["reasoning_content", "content"]] * 5
        assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 5]
        assert all(c["choices"][0]["finish_reason"] is None for c in chunks)
        assert end["choices"][0]["delta"] == {"reasoning_content": None} and "usage" not in end
        assert end["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5
        status, whole = await answer(session, "/v1/chat/completions", body)
        message = whole["choices"][0]["message"]
        assert status == 200 and list(message) == ["role", "content", "reasoning_content"]
        assert len(message["content"].split()) == 5

    with_server(talk)


def test_generate_is_cumulative() -> None:
    body = {"input_ids": [4, 5], "sampling_params": {"max_new_tokens": 4}, "stream": True}

    async def talk(session: aiohttp.ClientSession) -> None:
        found = await events(session, "/generate", body)
        assert [len(e["output_ids"]) for e in found] == [1, 2, 3, 4]
        for event in found:
            assert event["text"] == "".join(f" w{token}" for token in event["output_ids"])
            assert event["meta_info"]["completion_tokens"] == len(event["output_ids"])
            assert event["meta_info"]["prompt_tokens"] == 2
        reasons = [e["meta_info"]["finish_reason"] for e in found]
        assert reasons == [None] * 3 + [{"type": "length", "length": 4}]
        assert ["e2e_latency" in e["meta_info"] for e in found] == [False] * 3 + [True]
        status, whole = await answer(session, "/generate", body | {"stream": False, "rid": "mine"})
        assert status == 200 and list(whole) == ["text", "output_ids", "meta_info"]
        assert whole["meta_info"]["id"] == "mine"
        assert list(whole["meta_info"]) == list(found[-1]["meta_info"])

    with_server(talk)


@pytest.mark.parametrize(
    ("asked", "length", "reason"),
    [
        ({"max_new_tokens": 8, "min_new_tokens": 2, **FORCED}, 3, "stop"),
        ({"max_new_tokens": 8, **FORCED}, 1, "stop"),
        ({"max_new_tokens": 8, "min_new_tokens": 7, **FORCED}, 8, "length"),
        ({"max_new_tokens": 8, "ignore_eos": True, **FORCED}, 8, "length"),
        ({"max_new_tokens": 8, **FORCED, "logit_bias": {"9": 49}}, 8, "length"),
        ({"max_new_tokens": 8, **FORCED, "logit_bias": {"8": 100}}, 8, "length"),
        ({"max_new_tokens": None, "ignore_eos": True}, longest_request(LIMITS) - 2, "length"),
        ({}, 128, "length"),
    ],
)
def test_a_request_ends_where_it_is_designed_to(
    asked: dict[str, Any], length: int, reason: str
) -> None:
    async def talk(session: aiohttp.ClientSession) -> Any:
        return await answer(session, "/generate", {"text": "a b", "sampling_params": asked})

    status, whole = with_server(talk, step_time=StepTime(b0_s=1e-5))
    meta = whole["meta_info"]
    assert (status, meta["completion_tokens"]) == (200, length)
    shown = {"type": "stop", "matched": 9} if reason == "stop" else {"type": "length"}
    assert meta["finish_reason"].items() >= shown.items()
    # The stop token is among the ids, not in the text.
    assert len(whole["output_ids"]) == length
    assert len(whole["text"].split()) == length - (reason == "stop")


def test_the_declared_length_is_clipped_silently() -> None:
    limits = EngineLimits(
        num_blocks=32, block_size=4, max_model_len=4096, sglang=SGLangRules(radix_cache=False)
    )
    body = {"prompt": [1] * 50, "max_tokens": 500, "ignore_eos": True}

    async def talk(session: aiohttp.ClientSession) -> Any:
        return await answer(session, "/v1/completions", body)

    status, whole = with_server(talk, limits=limits)
    assert status == 200 and whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == longest_request(limits) - 50


# -- refusals --------------------------------------------------------------------------------------

TOO_LONG = "The input (2048 tokens) is longer than the model's context length (2048 tokens)."
POOL = "Input length (1100 tokens) exceeds the maximum allowed length (1018 tokens)."


@pytest.mark.parametrize(
    ("path", "body", "kind", "message"),
    [
        ("/v1/completions", {"prompt": [1] * 2048}, "BadRequestError", TOO_LONG),
        ("/v1/completions", {"prompt": [1] * 1100}, "BadRequestError", POOL),
        (
            "/v1/completions",
            {"prompt": [1] * 2000, "max_tokens": 49},
            "BadRequestError",
            "a total of 2049 tokens: 2000 tokens from the input messages and 49",
        ),
        ("/v1/completions", {"prompt": [1], "max_tokens": 0}, "Bad Request", "must be positive"),
        ("/v1/completions", {"prompt": [1], "max_tokens": "x"}, "Bad Request", "max_tokens"),
        ("/v1/completions", {"prompt": ""}, "BadRequestError", "Prompt cannot be empty"),
        ("/v1/completions", {"prompt": [1], "n": 2}, "BadRequestError", "n must be 1"),
        (
            "/v1/completions",
            {"prompt": [1], "max_tokens": 4, "min_tokens": 5},
            "BadRequestError",
            "min_new_tokens must be in [0, max_new_tokens(4)], got 5.",
        ),
        ("/v1/completions", [], "Bad Request", "JSON object"),
        ("/v1/chat/completions", {"messages": []}, "Bad Request", "messages"),
        ("/generate", {"input_ids": [1] * 2048}, None, TOO_LONG),
        ("/generate", {"input_ids": [1] * 1100}, None, POOL),
        ("/generate", {}, None, "Either text, input_ids or input_embeds should be provided."),
        ("/generate", {"text": ["a", "b"]}, None, "Batches are not served here"),
        ("/generate", {"input_ids": [[1], [2]]}, None, "Batches are not served here"),
        ("/generate", {"text": "a", "sampling_params": {"n": 2}}, None, "n must be 1"),
        ("/generate", {"text": "a", "sampling_params": 3}, "Bad Request", "sampling_params"),
    ],
)
def test_refusals(path: str, body: Any, kind: str | None, message: str) -> None:
    async def talk(session: aiohttp.ClientSession) -> Any:
        return await answer(session, path, body)

    status, found = with_server(talk)
    assert status == 400
    if kind is None:
        assert list(found) == ["error"] and list(found["error"]) == ["message"]
        assert message in found["error"]["message"]
    else:
        assert message in found.pop("message")
        assert found == {"object": "error", "type": kind, "param": None, "code": 400}


def test_a_stream_that_has_begun_brings_the_refusal() -> None:
    async def talk(session: aiohttp.ClientSession) -> None:
        pool = {"prompt": [1] * 1100, "input_ids": [1] * 1100, "stream": True}
        (event,) = await events(session, "/v1/completions", pool)
        assert POOL in event["error"]["message"] and event["error"]["type"] == "BAD_REQUEST"
        (event,) = await events(session, "/generate", pool)
        reason = event["meta_info"]["finish_reason"]
        assert (reason["type"], reason["status_code"]) == ("abort", 400)
        context = {"prompt": [1] * 2048, "input_ids": [1] * 2048, "stream": True}
        (event,) = await events(session, "/generate", context)
        assert event["error"]["message"] == TOO_LONG and event["error"]["code"] == 400
        status, _ = await answer(session, "/v1/completions", context)
        assert status == 400

    with_server(talk)


def test_only_json_is_read() -> None:
    async def talk(session: aiohttp.ClientSession) -> None:
        async with session.post("/v1/completions", data="{}") as response:
            assert response.status == 400
            assert "Unsupported Media Type" in (await response.json())["message"]
        headers = {"Content-Type": "application/json"}
        async with session.post("/v1/completions", data="{", headers=headers) as response:
            assert (response.status, (await response.json())["type"]) == (400, "Bad Request")

    with_server(talk)


# -- what it shows ---------------------------------------------------------------------------------


def test_small_routes() -> None:
    async def got(session: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
        async with session.get(path) as response:
            text = await response.text()
            return response.status, json.loads(text) if text[:1] == "{" else text

    async def talk(session: aiohttp.ClientSession) -> None:
        for path in ("/health", "/health_generate", "/ping", "/ready"):
            assert await got(session, path) == (200, "")
        for path in ("/version", "/get_load", "/slow_down", "/nowhere"):
            assert await got(session, path) == (404, {"detail": "Not Found"})
        card = (await got(session, "/v1/models"))[1]["data"][0]
        assert (card["owned_by"], card["max_model_len"]) == ("sglang", 2048)
        assert (await got(session, f"/v1/models/{card['id']}"))[1] == card
        assert (await got(session, "/v1/models/other"))[0] == 404
        _, info = await got(session, "/server_info")
        assert info == (await got(session, "/get_server_info"))[1]
        assert (info["version"], info["status"]) == ("0.5.23", "ready")
        assert (info["max_total_num_tokens"], info["max_req_input_len"]) == (1024, 1018)
        assert (info["chunked_prefill_size"], info["disable_overlap_schedule"]) == (256, True)
        assert info["internal_states"][0]["effective_max_running_requests_per_dp"] == 77
        assert (await got(session, "/model_info"))[1] == (await got(session, "/get_model_info"))[1]
        status, tokens = await answer(session, "/tokenize", {"prompt": "w3 some w17"})
        assert (status, tokens["count"], tokens["tokens"][2]) == (200, 3, 17)
        assert await answer(session, "/v1/detokenize", {"tokens": [3]}) == (200, {"text": "w3"})
        status, loads = await got(session, "/v1/loads?include=core,queues")
        assert status == 200 and "queues" in loads["loads"][0] and "memory" not in loads["loads"][0]
        assert loads["loads"][0]["decode_moments"] is None
        assert (await got(session, "/v1/loads?include=nothing"))[0] == 400
        _, text = await got(session, "/v1/loads?format=prometheus")
        assert 'sglang_memory_token_capacity{dp_rank="0"} 1024' in text

    with_server(talk)


def test_nothing_secret_is_shown() -> None:
    async def talk(session: aiohttp.ClientSession) -> str:
        pages: list[str] = []
        for path in ("/metrics", "/v1/models", "/server_info", "/model_info", "/v1/loads"):
            async with session.get(path) as response:
                pages.append(await response.text())
        return "".join(pages)

    pages = with_server(talk, step_time=StepTime(b0_s=0.0719), claimed_num_blocks=800)
    assert not re.search(r"0719|71\.9|\b1024(\.0)?\b", re.sub(r'le="[^"]*"', "", pages))
    assert '"max_total_num_tokens":800' in pages


def test_flush_is_refused_while_busy() -> None:
    body = {"prompt": [1] * 10, "max_tokens": 50, "stream": True}

    async def cached(session: aiohttp.ClientSession) -> float:
        async with session.get("/metrics") as response:
            found = re.search(r"kv_evictable_tokens\{.*\} (\S+)", await response.text())
        assert found is not None
        return float(found[1])

    async def talk(session: aiohttp.ClientSession) -> None:
        async with session.post("/v1/completions", json=body) as running:
            async with session.post("/flush_cache") as response:
                assert (response.status, await response.text()) == (400, "Flush cache failed.\n")
            await running.read()
        assert await cached(session) == 59
        async with session.get("/flush_cache") as response:
            assert response.status == 200
            assert (await response.text()).startswith("Cache flushed.\n")
        # The gauges of an idle scheduler are those of the last step that it logged.
        assert await cached(session) == 59
        async with session.post("/v1/completions", json=body | {"max_tokens": 1}) as response:
            await response.read()
        assert await cached(session) == 10

    with_server(talk)


@pytest.mark.parametrize(
    ("timeout", "status", "said"),
    [
        ("30", 200, "Cache flushed."),
        ("0.02", 400, "Timed out waiting for idle state."),
        ("0", 400, "Flush cache failed."),
        ("-1", 400, "timeout must not be negative"),
        ("nan", 400, "timeout must not be negative"),
        ("soon", 400, "timeout must be a number"),
    ],
)
def test_flush_waits_for_an_idle_server_as_long_as_asked(
    timeout: str, status: int, said: str
) -> None:
    body = {"prompt": [1] * 10, "max_tokens": 80, "stream": True}

    async def talk(session: aiohttp.ClientSession) -> tuple[int, str]:
        async with (
            session.post("/v1/completions", json=body),
            session.post(f"/flush_cache?timeout={timeout}") as response,
        ):
            return response.status, await response.text()

    found, text = with_server(talk)
    assert found == status and said in text


def test_a_disconnect_frees_the_pages() -> None:
    async def talk(session: aiohttp.ClientSession) -> None:
        body = {"prompt": [1] * 100, "max_tokens": 400, "stream": True, "ignore_eos": True}
        leaving = [await session.post("/v1/completions", json=body) for _ in range(2)]
        before = {"num_running_reqs": 0}
        async with asyncio.timeout(5):
            while before["num_running_reqs"] < 2:
                async with session.get("/v1/loads?include=core") as response:
                    before = (await response.json())["loads"][0]
        assert before["num_waiting_reqs"] == 0
        for response in leaving:
            response.close()
        async with asyncio.timeout(5):
            while True:
                async with session.get("/metrics") as response:
                    page = await response.text()
                found = engine_sample(page, 1, 2, MOCK_SGLANG)
                if found.running == 0:
                    break
        assert (found.kv_usage, found.finished) == (0.0, 2)
        assert "num_aborted_requests_total" in page

    with_server(talk)


# -- books -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("retracting", [False, True])
def test_the_books_are_what_was_sent(retracting: bool) -> None:
    """Streamed and whole requests of random lengths; the counters against what clients received."""
    rules = SGLangRules(
        whole_output_of_ignore_eos=not retracting, schedule_conservativeness=0.1, radix_cache=True
    )
    limits = EngineLimits(num_blocks=200, block_size=1, max_num_batched_tokens=32, sglang=rules)
    rng = np.random.default_rng(3)
    lengths = rng.integers(8, 60, (30, 2)).tolist()

    async def talk(session: aiohttp.ClientSession) -> None:
        async def one(number: int, prompt: int, output: int) -> None:
            body = {"prompt": [3] * prompt, "max_tokens": output, "ignore_eos": True}
            if number % 5:
                chunks = await events(session, "/v1/completions", body | {"stream": True})
                assert len(chunks) == output
            else:
                _, whole = await answer(session, "/v1/completions", body)
                assert whole["usage"]["completion_tokens"] == output

        async def page() -> str:
            async with session.get("/metrics") as response:
                return await response.text()

        assert "inter_token_latency" not in await page()
        await asyncio.gather(*(one(i, s, o) for i, (s, o) in enumerate(lengths)))
        text = await page()
        assert ("num_retracted_requests_total" in text) == retracting
        found = engine_sample(text, 1, 2, MOCK_SGLANG)
        prompts, outputs = np.sum(lengths, axis=0)
        streamed = sum(o for i, (_, o) in enumerate(lengths) if i % 5)
        assert found.prompt_tokens == prompts and found.finished == len(lengths)
        counted = {
            (m[1], m[2]): float(m[3])
            for m in re.finditer(r'sglang:(\w+)\{.*?(?:is_streaming|mode)="(\w+)".*\} (\S+)', text)
        }
        assert counted["generation_tokens_total", "true"] == streamed
        assert counted["generation_tokens_total", "false"] == outputs - streamed
        # A stream's tokens are counted one by one, a whole answer's in lots.
        assert streamed <= found.generation_tokens <= outputs
        decodes = counted["realtime_tokens_total", "decode"]
        assert decodes == outputs - len(lengths) - found.preemptions
        prefills = counted["realtime_tokens_total", "prefill_compute"]
        assert prefills == prompts if not retracting else prefills > prompts
        passes = [v for (name, _), v in counted.items() if name == "cuda_graph_passes_total"]
        assert found.steps == sum(passes) and found.step_tokens == decodes + prefills
        assert (found.running, found.waiting, found.kv_usage) == (0, 0, 0.0)

    with_server(talk, limits=limits, step_time=StepTime(b0_s=2e-4))


class Stepped:
    """An engine and its books, without a clock."""

    def __init__(self, log_interval: int, publish_interval: int) -> None:
        self.engine = SGLangEngine(LIMITS)
        self.books = SGLangBooks(self.engine, log_interval, publish_interval)
        self.requests = 0

    def submit(self, output_tokens: int) -> None:
        self.engine.submit(Request(self.requests, 10, output_tokens))
        self.requests += 1

    def step(self) -> Step:
        step = self.engine.start()
        if step is None:
            self.books.idled(0)
            return Step(-1)
        free = self.engine.free_blocks
        ends = [r for r, finished in self.engine.complete(step) if finished]
        now_ns = time.monotonic_ns()
        self.books.ended(Ended(step, ends, now_ns, now_ns, now_ns, free, 1, 0))
        return step


def test_gauges_are_those_of_the_last_logged_step() -> None:
    run = Stepped(log_interval=3, publish_interval=1)
    run.submit(5)
    run.submit(6)
    assert run.step().prefill
    gauges = run.books.gauges
    # A prefill step shows the batch beside it: nobody.
    assert (gauges.running, gauges.waiting, gauges.used_tokens) == (0, 0, 20)
    assert gauges.new_token_ratio == 0.7
    run.step()
    run.step()
    assert run.books.gauges is gauges
    run.step()
    gauges = run.books.gauges
    assert (gauges.running, gauges.used_tokens, gauges.sum_seq_lens) == (2, 26, 26)
    assert gauges.new_token_ratio == 0.7 > run.engine.new_token_ratio
    run.submit(4)
    assert run.step().prefill
    assert (run.books.gauges.running, run.books.gauges.used_tokens) == (2, 36)
    run.step()
    run.step()
    assert (run.books.gauges.running, run.books.gauges.used_tokens) == (2, 36)
    run.step()
    # Nothing is left and nothing was logged: the gauge is put right by the idle loop.
    assert run.books.gauges.running == 1
    run.step()
    assert (run.books.gauges.running, run.books.gauges.used_tokens) == (0, 0)


def test_the_snapshot_is_taken_before_anything_is_freed() -> None:
    run = Stepped(log_interval=1, publish_interval=2)
    run.submit(4)
    run.step()
    assert (run.books.loads().running, run.books.loads().used_tokens) == (0, 10)
    run.step()
    assert run.books.loads().used_tokens == 10
    run.step()
    assert (run.books.loads().running, run.books.loads().used_tokens) == (1, 12)
    run.step()
    assert (run.books.loads().running, run.books.loads().used_tokens) == (0, 0)


def test_retractions_show_at_once() -> None:
    run = Stepped(log_interval=40, publish_interval=40)
    run.engine.preemptions = 2
    page = _page_of(run)
    assert re.search(r"num_retracted_requests_total\{.*\} 2.0\n", page)


def _page_of(run: Stepped) -> str:
    return SGLangMetrics("m", LIMITS, 1024, 2048).render(run.books).decode()


# -- the client ------------------------------------------------------------------------------------


async def our_client(
    session: aiohttp.ClientSession, prompt_tokens: int, declared: int
) -> RequestRecord:
    """One request for 7 tokens, as an experiment sends it."""
    prompt = np.full(prompt_tokens, 5, dtype=np.int32)
    body = completion_body("m", prompt, 7, declared, ignore_eos=declared == 7)
    async with open_session() as own:
        return await complete(
            own,
            str(session._build_url("/v1/completions")),
            body,
            id=0,
            scheduled_ns=time.monotonic_ns(),
            prompt_tokens=prompt_tokens,
            output_tokens_designed=7,
            max_tokens=declared,
        )


@pytest.mark.parametrize("declared", [7, 20])
def test_our_client_reads_the_stream(declared: int) -> None:
    record = with_server(lambda session: our_client(session, 12, declared))
    assert record.outcome == "completed" and record.error is None
    assert (record.output_tokens, record.prompt_tokens_reported) == (7, 12)


def test_our_client_sees_a_refusal_within_a_stream() -> None:
    record = with_server(lambda session: our_client(session, 1100, 7))
    assert record.outcome == "failed" and POOL in str(record.error)


def test_a_queue_that_was_given_up_at_once_is_shown_for_up_to_30_s() -> None:
    """As the real one: only a wrong number of running requests is put right at once."""
    engine = SGLangEngine(EngineLimits(num_blocks=100, block_size=1, sglang=SGLangRules()))
    books = SGLangBooks(engine, log_interval=1, publish_interval=1)
    books.gauges = Gauges(waiting=7)
    books.log_idle()
    assert books.gauges.waiting == 7
    books._logged_s -= 31
    books.log_idle()
    assert books.gauges.waiting == 0
    books.gauges = Gauges(running=1, waiting=7)
    books.log_idle()
    assert (books.gauges.running, books.gauges.waiting) == (0, 0)
