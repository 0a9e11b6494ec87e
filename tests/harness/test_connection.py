"""Servers behind a key and behind certificates of their own, on real sockets."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import trustme
from aiohttp import web

from harness.configs.config import ConfigError, ExperimentConfig, ServerConfig, load_config
from harness.configs.mock_config import MockServerConfig
from harness.experiments.experiment import write_inputs
from harness.live.connection import connect
from harness.live.sampler import ServerGone, sample_engine
from harness.live.target import target_server
from harness.mock.mock import PacedEngine
from harness.mock.mock_http import application
from harness.records.store import Store
from harness.servers.engines import MOCK
from harness.servers.server import ServerFailed, attached
from harness.servers.server_limits import LimitsUnreadable, get_text
from loadgen.client import complete
from loadgen.prompts import completion_body
from loadgen.records import RequestRecord

KEY = "sk-a-key-that-nobody-may-see"
VARIABLE = "CRITRATE_TEST_KEY"
MODEL = {
    "num_blocks": 64,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "max_model_len": 128,
    "step_time": {"b0_ms": 4},
}
LENGTHS = {"uniform": {"prompt": [8, 40], "output": [8, 40]}}


def experiment(url: str, **server: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {"name": "x", "server": {"url": url, **server}, "workload": LENGTHS}
    )


def of_server(**server: Any) -> ServerConfig:
    return ServerConfig.model_validate({"url": "https://localhost:1", **server})


async def one_request(session: aiohttp.ClientSession, url: str, body: bytes) -> RequestRecord:
    return await complete(
        session,
        f"{url}/v1/completions",
        body,
        id=0,
        scheduled_ns=time.monotonic_ns(),
        prompt_tokens=11,
        output_tokens_designed=5,
        max_tokens=5,
    )


class Guarded:
    """A mock vLLM whose pages under ``guarded`` want `KEY`; it repeats the key that it refuses."""

    def __init__(self, guarded: str = "/", tls: ssl.SSLContext | None = None) -> None:
        self.guarded, self.tls = guarded, tls
        self.paths: set[str] = set()
        self.refused: set[str] = set()

    def serve(self, talk: Callable[[str], Awaitable[Any]]) -> Any:
        """What ``talk`` makes of the server's URL."""

        @web.middleware
        async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
            shown = request.headers.get("Authorization", "")
            if request.path.startswith(self.guarded) and shown != f"Bearer {KEY}":
                self.refused.add(request.path)
                raise web.HTTPUnauthorized(text=f"{shown} is not the key")
            self.paths.add(request.path)
            answer: web.StreamResponse = await handler(request)
            return answer

        async def run() -> Any:
            config = MockServerConfig.model_validate(MODEL).server(0, None)
            engine = PacedEngine(config, asyncio.get_running_loop())
            app = application(config, engine)
            app.middlewares.append(keep)
            runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            try:
                await web.TCPSite(runner, "localhost", 0, ssl_context=self.tls).start()
                scheme = "http" if self.tls is None else "https"
                return await talk(f"{scheme}://localhost:{runner.addresses[0][1]}")
            finally:
                await runner.cleanup()
                engine.close()

        return asyncio.run(run())


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{KEY}\n")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def certified(authority: trustme.CA, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


def test_everything_goes_through_one_door_and_nothing_of_the_key_is_kept(
    tmp_path: Path, authority: trustme.CA, ca_file: Path, key: None
) -> None:
    """Readiness, limits, a sample and a request, by key and TLS."""
    server = Guarded(tls=certified(authority))
    store = Store.create(tmp_path / "out")

    async def talk(url: str) -> RequestRecord:
        config = experiment(
            url, api_key_env=VARIABLE, tls_ca=str(ca_file), headers={"X-Team": "us"}
        )
        write_inputs(config, store)
        async with target_server(config, store) as target:
            stop = asyncio.Event()
            # The prober, the driver and the sampler all take the session of the target.
            await sample_engine(
                target.session, target.url, target.facts, 0.02, stop, lambda _: stop.set()
            )
            body = completion_body(target.shown.model_id, np.arange(3, 14), 5, 5)
            return await one_request(target.session, target.url, body)

    record = server.serve(talk)
    assert (record.outcome, record.output_tokens) == ("completed", 5)
    assert server.refused == set()
    assert server.paths >= {"/health", "/v1/models", "/metrics", "/v1/completions"}
    written = {p.name: p.read_text() for p in store.path.rglob("*") if p.is_file()}
    assert "config.yaml" in written
    for text in written.values():
        assert not any(secret in text for secret in (KEY, VARIABLE, "X-Team", "ca.pem"))
    # The folder can be read where neither the key nor the certificates are.
    ca_file.unlink()
    load_config(store.path / "config.yaml")


@pytest.mark.parametrize(("guarded", "error"), [("/", ServerFailed), ("/v1", LimitsUnreadable)])
@pytest.mark.parametrize("wrong", [True, False])
def test_a_server_that_wants_another_key_says_where_to_look(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guarded: str,
    error: type[Exception],
    wrong: bool,
) -> None:
    monkeypatch.setenv(VARIABLE, "sk-wrong")

    async def talk(url: str) -> None:
        named = {"api_key_env": VARIABLE} if wrong else {}
        async with target_server(experiment(url, **named), Store.create(tmp_path / "out")):
            raise AssertionError

    with pytest.raises(error, match=r"the server answers 401: check server\.api_key_env") as caught:
        Guarded(guarded).serve(talk)
    assert "sk-wrong" not in str(caught.value)


def test_a_key_that_is_refused_later_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-wrong")

    async def talk(url: str) -> tuple[RequestRecord, ServerGone]:
        async with connect(of_server(api_key_env=VARIABLE)) as session:
            record = await one_request(session, url, b"{}")
            with pytest.raises(ServerGone) as gone:
                await sample_engine(
                    session, url, MOCK, 0.02, asyncio.Event(), lambda _: None, gone_after_s=0.1
                )
        return record, gone.value

    record, gone = Guarded().serve(talk)
    assert (record.outcome, record.status) == ("failed", 401)
    assert "check server.api_key_env" in str(gone)
    assert "sk-wrong" not in f"{record.error}{gone}{gone.stats}"


def test_no_error_shows_the_headers_that_were_sent(key: None) -> None:
    """The repr of aiohttp's own error for an answer that is no HTTP holds them."""

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 twohundred what\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run() -> list[str]:
        listening = await asyncio.start_server(garbage, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        said = []
        async with listening, connect(of_server(api_key_env=VARIABLE)) as session:
            with pytest.raises(LimitsUnreadable) as unreadable:
                await get_text(session, url)
            said.append(str(unreadable.value))
            with pytest.raises(ServerFailed) as caught:
                async with attached(session, url, timeout_s=3.0):
                    raise AssertionError
            said.append(str(caught.value))
        return said

    for text in asyncio.run(run()):
        assert "Bad" in text
        assert KEY not in text


def test_the_last_try_that_is_cut_short_does_not_hide_what_was_answered() -> None:
    answers = iter([b"HTTP/1.1 503 busy\r\nContent-Length: 0\r\n\r\n"])

    async def busy_then_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(next(answers, b""))
        await writer.drain()
        await reader.read()
        writer.close()

    async def run() -> str:
        listening = await asyncio.start_server(busy_then_silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with listening, aiohttp.ClientSession() as session:
            with pytest.raises(ServerFailed) as caught:
                async with attached(session, url, timeout_s=0.4):
                    raise AssertionError
        return str(caught.value)

    assert "it answers 503" in asyncio.run(run())


@pytest.mark.parametrize("value", [None, "", "  \n", "with\nbreak", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_a_mistake_of_the_config(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=r"server\.api_key_env: .*export") as caught:
        connect(of_server(api_key_env=VARIABLE))
    # Somebody may have written the key itself where the variable's name belongs.
    assert VARIABLE not in str(caught.value)


def ready(ca: Path | None) -> Callable[[str], Awaitable[bool]]:
    """Is the server at a URL healthy and trusted by this file?"""

    async def talk(url: str) -> bool:
        async with connect(of_server(tls_ca=ca)) as session, attached(session, url):
            return True

    return talk


def test_a_certificate_is_trusted_by_its_authority(authority: trustme.CA, ca_file: Path) -> None:
    server = Guarded("/none", certified(authority))
    assert server.serve(ready(ca_file))
    with pytest.raises(ServerFailed, match=r"is not trusted \(.*\): .* server\.tls_ca"):
        server.serve(ready(None))
    other = Guarded("/none", certified(trustme.CA()))
    with pytest.raises(ServerFailed, match=r"is not trusted \(.*\): .* server\.tls_ca"):
        other.serve(ready(ca_file))


def test_a_certificate_of_another_name_is_not_trusted(authority: trustme.CA, ca_file: Path) -> None:
    server = Guarded("/none", certified(authority, "elsewhere.example"))
    with pytest.raises(ServerFailed, match=r"[Hh]ostname mismatch.*use a name"):
        server.serve(ready(ca_file))


def test_a_file_without_certificates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"server\.tls_ca: .*ca\.pem holds no certificate"):
        connect(of_server(tls_ca=tmp_path / "ca.pem"))


CONFIG = "name: x\nworkload: {fixed: {prompt: 4, output: 4}}\nserver: "


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("{url: 'https://h', api_key_env: sk-a-key}", "server.api_key_env: string should match"),
        ("{url: 'https://h', headers: {x-api-key: [sk-a-key]}}", "server.headers.x-api-key: "),
        (
            "{url: 'https://h', api_key_env: A, headers: {authorization: Bearer sk-a-key}}",
            "give one of them",
        ),
        ("{url: 'https://me:sk-a-key@h'}", "leave user and password out"),
        ("{url: 'https://h', tls_ca: nowhere.pem}", "there is no file .*nowhere.pem"),
        ("{url: 'http://h', tls_ca: here.pem}", "tls_ca: it goes with a url"),
        ("{launch: {environment: vllm}, tls_ca: here.pem}", "tls_ca: it goes with a url"),
        ("{url: 'https://h', tls_insecure: true}", "unknown key"),
    ],
)
def test_a_config_is_refused_without_showing_a_key(
    tmp_path: Path, server: str, message: str
) -> None:
    (tmp_path / "here.pem").touch()
    file = tmp_path / "x.yaml"
    file.write_text(CONFIG + server)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "sk-a-key" not in str(caught.value)
