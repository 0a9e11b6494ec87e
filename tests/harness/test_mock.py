"""The mock server over real sockets: shapes of vLLM 0.32.0, exact lengths, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from analysis.schedulers.engine import EngineLimits, check_conservation
from analysis.schedulers.step_time import StepTime
from harness.mock.mock import MockConfig, PacedEngine
from tests.harness import served
from tests.harness.served import Talk, events

pytestmark = pytest.mark.waits

LIMITS = EngineLimits(
    num_blocks=64, block_size=16, max_num_seqs=77, max_num_batched_tokens=613, max_model_len=512
)
STEP = StepTime(b0_s=0.002)


def config_with(**options: Any) -> MockConfig:
    usual: dict[str, Any] = {"limits": LIMITS, "step_time": STEP}
    return MockConfig(**(usual | options))


def with_server(talk: Talk, **options: Any) -> Any:
    """Run ``talk`` against a mock of vLLM."""
    return served.with_server(config_with(**options), talk)


async def metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    """Samples by name and labels other than engine and model_name."""
    async with session.get("/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = re.sub(r'engine="0",?|model_name="[^"]*",?', "", name).replace(",}", "}")
            found[name.removesuffix("{}")] = float(value)
    return found


async def metrics_when(session: aiohttp.ClientSession, name: str, value: float) -> dict[str, float]:
    """The metrics once ``name`` has this value; TimeoutError where it never has."""
    async with asyncio.timeout(5):
        while (found := await metrics(session))[name] != value:
            await asyncio.sleep(0.005)
    return found


def test_completion_stream() -> None:
    body = {"prompt": [5] * 20, "max_tokens": 7, "stream": True}

    async def talk(session: aiohttp.ClientSession) -> None:
        chunks = await events(session, "/v1/completions", body)
        assert len(chunks) == 7
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 6 + ["length"]
        assert all(c["object"] == "text_completion" for c in chunks)
        assert list(chunks[0]) == ["id", "object", "created", "model", "choices"]
        assert list(chunks[0]["choices"][0]) == [
            "index",
            "text",
            "logprobs",
            "finish_reason",
            "stop_reason",
            "prompt_token_ids",
            "token_ids",
        ]
        assert len({c["id"] for c in chunks}) == 1 and chunks[0]["id"].startswith("cmpl-")
        assert len("".join(c["choices"][0]["text"] for c in chunks).split()) == 7

    with_server(talk)


def test_usage_only_where_asked() -> None:
    def body(**options: bool) -> dict[str, Any]:
        asked = {"prompt": "one two three", "max_tokens": 4, "stream": True}
        return asked | {"stream_options": options}

    async def talk(session: aiohttp.ClientSession) -> None:
        usage = {"prompt_tokens": 3, "total_tokens": 7, "completion_tokens": 4}
        *chunks, last = await events(session, "/v1/completions", body(include_usage=True))
        assert last["choices"] == [] and last["usage"] == usage
        assert len(chunks) == 4 and not any("usage" in c for c in chunks)
        both = body(include_usage=True, continuous_usage_stats=True)
        chunks = await events(session, "/v1/completions", both)
        assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 4]
        chunks = await events(session, "/v1/completions", body(continuous_usage_stats=True))
        assert len(chunks) == 4 and not any("usage" in c for c in chunks)

    with_server(talk)


def test_stream_interval_groups_tokens_after_the_first() -> None:
    body = {"prompt": [1], "max_tokens": 9, "stream": True}

    async def talk(session: aiohttp.ClientSession) -> None:
        chunks = await events(session, "/v1/completions", body)
        assert [len(c["choices"][0]["text"].split()) for c in chunks] == [1, 3, 3, 2]

    with_server(talk, stream_interval=3)


def test_chat_stream_and_whole() -> None:
    body = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hello there you"}]},
        ],
        "max_completion_tokens": 5,
    }
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}

    async def talk(session: aiohttp.ClientSession) -> None:
        first, *chunks, usage = await events(session, "/v1/chat/completions", streamed)
        assert first["object"] == "chat.completion.chunk" and first["id"].startswith("chatcmpl-")
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [list(c["choices"][0]["delta"]) for c in chunks] == [["content"]] * 5
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["length"]
        assert usage["usage"]["prompt_tokens"] == usage["usage"]["completion_tokens"] == 5
        async with session.post("/v1/chat/completions", json=body) as response:
            whole = await response.json()
        assert whole["object"] == "chat.completion"
        assert len(whole["choices"][0]["message"]["content"].split()) == 5
        assert whole["choices"][0]["finish_reason"] == "length"

    with_server(talk)


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("a b  c", 3), ([1, 2], 2), ([[1, 2, 3]], 3), (["a b"], 2), (" ", 1)]
)
def test_whole_completion_counts_the_prompt(prompt: Any, tokens: int) -> None:
    async def talk(session: aiohttp.ClientSession) -> Any:
        async with session.post("/v1/completions", json={"prompt": prompt}) as response:
            assert response.status == 200
            return await response.json()

    answer = with_server(talk)
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == tokens
    assert answer["usage"]["completion_tokens"] == 16
    assert len(answer["choices"][0]["text"].split()) == 16


@pytest.mark.parametrize(
    ("asked", "length", "reason"),
    [
        ({"max_tokens": 8, "min_tokens": 2}, 3, "stop"),
        ({"max_tokens": 8, "min_tokens": 2, "ignore_eos": True}, 3, "stop"),
        ({"max_tokens": 8}, 1, "stop"),
        ({"max_tokens": 8, "min_tokens": 7}, 8, "length"),
        ({"max_tokens": 8, "logit_bias": {"9": 49.0}}, 8, "length"),
        ({"max_tokens": 8, "stop_token_ids": [8]}, 8, "length"),
    ],
)
def test_a_forced_stop_token_ends_a_request(
    asked: dict[str, Any], length: int, reason: str
) -> None:
    """Stop ids count whatever ignore_eos says; min_tokens keeps them back."""
    forced = {"stop_token_ids": [9], "logit_bias": {"9": 100}}
    body = {"prompt": [1], "stream": True, "stream_options": {"include_usage": True}} | forced

    async def talk(session: aiohttp.ClientSession) -> None:
        *chunks, usage = await events(session, "/v1/completions", body | asked)
        last = chunks[-1]["choices"][0]
        assert usage["usage"]["completion_tokens"] == length == len(chunks)
        assert (last["finish_reason"], last["stop_reason"]) == (
            (reason, 9) if reason == "stop" else (reason, None)
        )
        assert (last["text"] == "") == (reason == "stop")
        found = await metrics(session)
        assert found[f'vllm:request_success_total{{finished_reason="{reason}"}}'] == 1
        assert sum(v for k, v in found.items() if k.startswith("vllm:request_success_total")) == 1

    with_server(talk)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": [1] * 500, "max_tokens": 13}, 400, "input_tokens"),
        ({"prompt": [1], "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": [1], "max_tokens": "many"}, 400, "max_tokens"),
        ({"prompt": [1], "max_tokens": 4, "min_tokens": 5}, 400, "min_tokens"),
        ({"prompt": [1], "n": 2}, 400, "n"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[1], [2]]}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "prompt"),
        ({"prompt": [1], "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": [1], "model": "other"}, 404, "model"),
        ("{not json", 400, "body"),
        ("[]", 400, "body"),
    ],
)
def test_refusals(body: Any, status: int, param: str) -> None:
    data = body if isinstance(body, str) else json.dumps(body)

    async def talk(session: aiohttp.ClientSession) -> Any:
        async with session.post("/v1/completions", data=data) as response:
            return response.status, await response.json()

    code, answer = with_server(talk)
    error = answer["error"]
    assert code == error["code"] == status
    assert error["param"] == param and error["message"]
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]


def test_small_routes() -> None:
    async def talk(session: aiohttp.ClientSession) -> None:
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            async with session.request(method, path) as response:
                assert (response.status, await response.text()) == (200, "")
        async with session.get("/version") as response:
            assert await response.json() == {"version": "0.32.0", "critrate_mock": True}
        async with session.get("/v1/models") as response:
            card = (await response.json())["data"][0]
        assert (card["id"], card["root"]) == ("critrate-mock", "critrate-mock")
        assert (card["owned_by"], card["max_model_len"]) == ("vllm", 512)
        async with session.post("/tokenize", json={"prompt": "w3 some w17"}) as response:
            tokens = await response.json()
        assert (tokens["count"], tokens["max_model_len"]) == (3, 512)
        assert (tokens["tokens"][0], tokens["tokens"][2]) == (3, 17)
        async with session.post("/detokenize", json={"tokens": [3, 17]}) as response:
            assert await response.json() == {"prompt": "w3 w17"}
        async with session.get("/nowhere") as response:
            assert response.status == (await response.json())["error"]["code"] == 404

    with_server(talk)


def test_metrics_count_what_was_done() -> None:
    async def talk(session: aiohttp.ClientSession) -> dict[str, float]:
        body = {"prompt": [1] * 10, "max_tokens": 5}
        for _ in range(3):
            async with session.post("/v1/completions", json=body) as response:
                await response.read()
        return await metrics(session)

    found = with_server(talk)
    for name, value in {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        'vllm:num_requests_waiting_by_reason{reason="capacity"}': 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:num_preemptions_total": 0,
        "vllm:prompt_tokens_total": 30,
        "vllm:generation_tokens_total": 15,
        'vllm:request_success_total{finished_reason="length"}': 3,
        'vllm:request_success_total{finished_reason="stop"}': 0,
        "vllm:prefix_cache_queries_total": 0,
        "vllm:prefix_cache_hits_total": 0,
        "vllm:iteration_tokens_total_count": 15,
        "vllm:iteration_tokens_total_sum": 45,
        'vllm:iteration_tokens_total_bucket{le="1.0"}': 12,
        'vllm:iteration_tokens_total_bucket{le="+Inf"}': 15,
        "vllm:time_to_first_token_seconds_count": 3,
        "vllm:inter_token_latency_seconds_count": 12,
        "vllm:e2e_request_latency_seconds_count": 3,
        "vllm:request_queue_time_seconds_count": 3,
        "vllm:request_prompt_tokens_sum": 30,
        "vllm:request_generation_tokens_sum": 15,
        "critrate_mock_steps_total": 15,
    }.items():
        assert found[name] == value, name
    assert found["vllm:request_queue_time_seconds_sum"] < 1e-6
    assert found["vllm:e2e_request_latency_seconds_sum"] >= 3 * 5 * STEP.b0_s
    assert found["critrate_mock_overrun_steps_total"] <= 15


def test_cache_config_counts_the_null_block_and_can_lie() -> None:
    async def talk(session: aiohttp.ClientSession) -> str:
        async with session.get("/metrics") as response:
            return next(
                line
                for line in (await response.text()).splitlines()
                if line.startswith("vllm:cache_config_info")
            )

    honest = with_server(talk)
    assert 'num_gpu_blocks="65"' in honest and 'kv_cache_size_tokens="1040"' in honest
    assert 'block_size="16"' in honest and 'enable_prefix_caching="False"' in honest
    assert 'engine="0"' in honest and honest.endswith(" 1.0")
    lying = with_server(talk, claimed_num_blocks=128)
    assert 'num_gpu_blocks="129"' in lying and 'kv_cache_size_tokens="2064"' in lying


def test_nothing_secret_is_shown() -> None:
    async def talk(session: aiohttp.ClientSession) -> str:
        pages: list[str] = []
        for path in ("/metrics", "/v1/models", "/version", "/server_info"):
            async with session.get(path) as response:
                pages.append(await response.text())
        return re.sub(r"_created\{.*", "", "".join(pages))

    pages = with_server(talk, step_time=StepTime(b0_s=0.0719))
    assert not re.search(r"\b(77|613)(\.0)?\b|0719|71\.9", re.sub(r'"modelperm-.*', "", pages))


def test_a_disconnect_frees_the_blocks() -> None:
    """Three requests fill the engine; two clients leave, one of them while it still waits."""
    limits = EngineLimits(num_blocks=64, block_size=16, max_num_seqs=2, max_model_len=512)

    async def talk(session: aiohttp.ClientSession) -> None:
        def asked(tokens: int) -> dict[str, Any]:
            return {"prompt": [1] * 100, "max_tokens": tokens, "stream": True}

        async with session.post("/v1/completions", json=asked(80)) as stays:
            leaving = [await session.post("/v1/completions", json=asked(400)) for _ in range(2)]
            before = await metrics_when(session, "vllm:num_requests_waiting", 1)
            assert before["vllm:num_requests_running"] == 2
            for response in leaving:
                response.close()
            after = await metrics_when(session, "vllm:num_requests_running", 1)
            assert after["vllm:num_requests_waiting"] == 0
            assert after['vllm:request_success_total{finished_reason="abort"}'] == 2
            assert 7 / 64 - 1e-9 <= after["vllm:kv_cache_usage_perc"] <= 12 / 64
            assert (await stays.text()).count("data: ") == 81
        end = await metrics(session)
        assert end["vllm:kv_cache_usage_perc"] == end["vllm:num_requests_running"] == 0

    with_server(talk, limits=limits)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_conservation_with_abandoned_requests(asynchronous: bool) -> None:
    limits = EngineLimits(
        num_blocks=16, block_size=16, max_model_len=256, async_scheduling=asynchronous
    )

    async def run() -> None:
        config = MockConfig(limits=limits, step_time=StepTime(b0_s=0.001))
        paced = PacedEngine(config, asyncio.get_running_loop())
        tokens = [0] * 40
        jobs = []
        for i in range(40):

            def push(outputs: int, finished: bool, i: int = i) -> None:
                tokens[i] = outputs

            jobs.append(paced.submit(20 + i, 5 + i, 5 + i, True, push))
            if i % 4 == 0:
                paced.abandon(jobs[i // 2])
            await asyncio.sleep(0.002)
            joined = [job.request for job in jobs if job.request.state != "new"]
            check_conservation(paced.engine, joined)
        while paced.engine.finished + paced.engine.aborted < 40:
            await asyncio.sleep(0.01)
            assert not paced.failed.done()
        check_conservation(paced.engine, [job.request for job in jobs])
        assert paced.engine.free_blocks == 16 and paced.engine.preemptions > 0
        kept = [job for job in jobs if not job.abandoned]
        assert all(tokens[job.request.id] == job.request.output_tokens for job in kept)
        assert paced.engine.aborted + paced.engine.finished == 40 and paced.engine.aborted > 0
        paced.close()

    asyncio.run(run())


def test_an_engine_failure_ends_the_server() -> None:
    class Broken(StepTime):
        def __call__(self, tokens: float, kv_tokens: float, running: float) -> float:
            raise RuntimeError("no law for this batch")

    async def talk(session: aiohttp.ClientSession) -> None:
        with pytest.raises(aiohttp.ClientError):
            async with session.post("/v1/completions", json={"prompt": [1]}) as response:
                await response.read()

    with pytest.raises(RuntimeError, match="no law"):
        with_server(talk, step_time=Broken(b0_s=0.001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_time": StepTime(b0_s=0.0)}, "b0_s must be positive"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"limits": EngineLimits(num_blocks=4, block_size=16, max_model_len=65)}, "does not fit"),
        (
            {"limits": EngineLimits(num_blocks=4, block_size=16), "claimed_num_blocks": 9},
            "max_model_len",
        ),
    ],
)
def test_config_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_with(**options)


def test_run_mock_announces_itself_and_stops_on_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    code = (
        "from pathlib import Path; import sys\n"
        "from analysis.schedulers.engine import EngineLimits\n"
        "from analysis.schedulers.step_time import StepTime\n"
        "from harness.mock.mock import MockConfig\n"
        "from harness.mock.mock_http import run_mock\n"
        "limits = EngineLimits(num_blocks=64, block_size=16)\n"
        "law = StepTime(b0_s=0.002)\n"
        "run_mock(MockConfig(limits=limits, step_time=law, step_log=Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+\n", line)

        async def talk() -> None:
            base = line.split()[-1]
            async with aiohttp.ClientSession(base) as session:
                chunks = await events(
                    session, "/v1/completions", {"prompt": [1], "max_tokens": 3, "stream": True}
                )
                assert len(chunks) == 3

        asyncio.run(talk())
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert process.stdout.read() == ""
    assert [json.loads(row)["step"] for row in log.read_text().splitlines()] == [0, 1, 2]
