"""Against a real HTTP server on port 0 whose every answer is scripted."""

import asyncio
import json
import time

import numpy as np
import pytest
from aiohttp import web

from loadgen.client import complete, open_session
from loadgen.exchange import TimedStream, TokenStream
from loadgen.prompts import completion_body

pytestmark = pytest.mark.live

PROMPT = np.arange(3, 14, dtype=np.int32)


def event(tokens, finish=None, usage=True, space=False, text=" a"):
    body = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    body["usage"] = count(tokens) if usage else None
    separators = None if space else (",", ":")
    return f"data: {json.dumps(body, separators=separators)}\n\n".encode()


def count(tokens):
    return {"prompt_tokens": 11, "completion_tokens": tokens, "total_tokens": 11 + tokens}


def last_usage(tokens):
    return f"data: {json.dumps({'choices': [], 'usage': count(tokens)})}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def ask(answer, *, output_tokens=3, cancel_after_s=None, timeout_s=None, headers=None):
    """The record of one request to a server that answers with ``answer(request)``."""

    async def scenario():
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        body = completion_body("m", PROMPT, output_tokens, output_tokens)
        try:
            async with open_session(headers) as session:
                asking = asyncio.create_task(
                    complete(
                        session,
                        f"http://127.0.0.1:{port}/v1/completions",
                        body,
                        id=5,
                        scheduled_ns=time.monotonic_ns(),
                        prompt_tokens=11,
                        output_tokens_designed=output_tokens,
                        max_tokens=output_tokens,
                        timeout_s=timeout_s,
                    )
                )
                if cancel_after_s is not None:
                    await asyncio.sleep(cancel_after_s)
                    asking.cancel()
                return await asking
        finally:
            await runner.cleanup()

    return asyncio.run(scenario())


def stream_of(*pieces, pause_s=0.0, hang=False, die=False):
    async def answer(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(pause_s)
        if die:
            request.transport.abort()
        while hang and request.transport and not request.transport.is_closing():
            await asyncio.sleep(0.01)
        return response

    return answer


@pytest.mark.parametrize("space", [False, True])
def test_a_completion_gives_its_counts_and_the_order_of_its_times(space):
    events = [event(k, "length" if k == 3 else None, space=space) for k in (1, 2, 3)]
    before_ns = time.monotonic_ns()
    record = ask(stream_of(*events, last_usage(3), DONE, pause_s=0.02))
    assert (record.outcome, record.status, record.error) == ("completed", 200, None)
    assert (record.output_tokens, record.prompt_tokens_reported) == (3, 11)
    assert (record.id, record.prompt_tokens, record.max_tokens) == (5, 11, 3)
    assert before_ns < record.scheduled_ns < record.sent_ns < record.first_token_ns
    # Three tokens 20 ms apart; the usage 20 ms after the last token is none.
    assert 0.03 < (record.last_token_ns - record.first_token_ns) / 1e9 < 0.055


def test_tokens_are_counted_by_usage_and_not_by_events():
    record = ask(stream_of(event(2), event(7, "length"), last_usage(7), DONE), output_tokens=7)
    assert (record.outcome, record.output_tokens) == ("completed", 7)


def test_a_wrong_length_is_completed_with_the_true_count():
    record = ask(stream_of(event(1), event(2, "stop"), last_usage(2), DONE))
    assert (record.outcome, record.output_tokens, record.output_tokens_designed) == (
        "completed",
        2,
        3,
    )


def test_a_server_without_continuous_usage_is_counted_by_its_last_word_or_its_events():
    events = [event(k, "length" if k == 3 else None, usage=False) for k in (1, 2, 3)]
    assert ask(stream_of(*events, last_usage(3), DONE)).output_tokens == 3
    stopped = ask(stream_of(*events[:2], hang=True), cancel_after_s=0.3)
    assert (stopped.outcome, stopped.output_tokens) == ("unfinished", 2)
    assert stopped.prompt_tokens_reported is None


def test_a_cancelled_request_keeps_what_had_come_and_closes_its_connection():
    gone = []

    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(event(1) + event(2))
        try:
            while True:
                await asyncio.sleep(0.01)
                await response.write(b": ping\n\n")
        finally:
            gone.append(time.monotonic_ns())

    record = ask(answer, cancel_after_s=0.2)
    assert (record.outcome, record.output_tokens, record.status) == ("unfinished", 2, 200)
    assert record.first_token_ns == record.last_token_ns is not None
    assert len(gone) == 1


def test_a_request_cancelled_before_its_first_token_has_no_token_times():
    record = ask(stream_of(hang=True), cancel_after_s=0.2)
    assert (record.outcome, record.output_tokens, record.first_token_ns) == ("unfinished", 0, None)
    assert record.sent_ns is not None


def test_a_server_that_dies_midway_is_a_failure_with_its_text():
    record = ask(stream_of(event(1), event(2), pause_s=0.02, die=True))
    assert (record.outcome, record.output_tokens) == ("failed", 2)
    assert "Client" in record.error or "Server" in record.error


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((event(1), b'data: {"error":{"message":"engine is dead"}}\n\n', DONE), "engine is dead"),
        ((event(1), event(2, "abort"), DONE), "finish_reason abort"),
        ((event(1), DONE), "finish_reason None"),
        ((DONE,), "no content"),
        ((b"data: {not json}\n\n",), "no content"),
        ((b'{"object":"text_completion"}',), "no content"),
    ],
)
def test_a_stream_that_ends_without_a_reason_failed(pieces, words):
    record = ask(stream_of(*pieces))
    assert record.outcome == "failed"
    assert words in record.error
    assert len(record.error) <= 300


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(429, "rejected"), (503, "rejected"), (400, "failed"), (500, "failed")],
)
def test_other_statuses(status, outcome):
    async def answer(request):
        return web.Response(status=status, text="queue is full " * 100)

    record = ask(answer)
    assert (record.outcome, record.status, record.output_tokens) == (outcome, status, 0)
    assert record.error.startswith(f"HTTP {status}: queue is full")
    assert record.sent_ns is not None


def test_the_deadline_counts_from_the_scheduled_arrival():
    record = ask(stream_of(event(1), hang=True), timeout_s=0.2)
    assert (record.outcome, record.output_tokens) == ("timed_out", 1)


def test_a_server_that_is_not_there_is_a_failure_and_nothing_was_sent():
    async def scenario():
        async with open_session() as session:
            return await complete(
                session,
                "http://127.0.0.1:1/v1/completions",
                b"{}",
                id=0,
                scheduled_ns=time.monotonic_ns(),
                prompt_tokens=1,
                output_tokens_designed=1,
                max_tokens=1,
            )

    record = asyncio.run(scenario())
    assert (record.outcome, record.sent_ns, record.status) == ("failed", None, None)
    assert "Cannot connect" in record.error


def test_headers_and_body_arrive_as_they_are():
    seen = {}

    async def answer(request):
        seen.update(request.headers)
        seen["body"] = await request.json()
        return await stream_of(event(1, "length"), last_usage(1), DONE)(request)

    record = ask(answer, output_tokens=1, headers={"Authorization": "Bearer abc"})
    assert record.outcome == "completed"
    assert seen["Authorization"] == "Bearer abc"
    assert seen["Content-Type"] == "application/json"
    assert seen["body"]["prompt"] == PROMPT.tolist()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
@pytest.mark.parametrize("line_end", [b"\n\n", b"\r\n\r\n"])
def test_any_division_into_reads_gives_the_same_counts(size, line_end):
    tricky = ' \\"completion_tokens\\" "choices":[{ data: \n\n'
    data = event(1, text=tricky) + event(2, text=tricky) + event(3, "length", text=tricky)
    data = (data + last_usage(3) + DONE).replace(b"\n\n", line_end)
    stream = TokenStream()
    for now_ns, start in enumerate(range(0, len(data), size)):
        stream.feed(data[start : start + size], now_ns)
    assert stream.ending() == ("completed", None)
    assert stream.usage_counts() == (3, 11)
    assert stream.content_events == 3
    assert 0 <= stream.first_token_ns <= stream.last_token_ns


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_a_timed_stream_says_when_how_many_tokens_were_there(size):
    data = b"".join(event(n) for n in (1, 9, 17)) + event(20, "length") + last_usage(20) + DONE
    stream, ends = TimedStream(), {}
    for now_ns, start in enumerate(range(0, len(data), size)):
        stream.feed(data[start : start + size], now_ns)
        for tokens in (1, 9, 17, 20):
            if f'"completion_tokens":{tokens},'.encode() in data[: start + size]:
                ends.setdefault(tokens, now_ns)
    reads = stream.token_reads()
    # A read that ends amid an event has it not yet; the one that completes it follows at once.
    assert [read.tokens for read in reads] == sorted({read.tokens for read in reads})
    assert reads[-1].tokens == 20
    assert all(ends[read.tokens] <= read.t_ns <= ends[read.tokens] + 80 for read in reads)
    assert size > 64 or len(reads) == 4


def test_a_timed_stream_without_counts_says_nothing():
    stream = TimedStream()
    for now_ns in range(3):
        stream.feed(event(now_ns + 1, usage=False), now_ns)
    assert stream.content_events == 3 and stream.token_reads() == ()
