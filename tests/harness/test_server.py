from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from harness.servers.server import (
    Server,
    ServerFailed,
    attached,
    free_port,
    launched,
    require_free,
    url_is_loopback,
)
from loadgen.client import open_session

pytestmark = pytest.mark.waits

# Serves 200 at /health after a delay, has a child of its own, and writes both pids down.
PROGRAM = """
import http.server, os, pathlib, signal, subprocess, sys, time
port, delay_s, pids = int(sys.argv[1]), float(sys.argv[2]), pathlib.Path(sys.argv[3])
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pids.write_text(f"{os.getpid()} {child.pid}")
print("hello", os.environ["GREETING"], flush=True)
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() - start > delay_s else 503)
        self.end_headers()
        if self.path == "/die":
            os._exit(3)
    def log_message(self, *_):
        pass
start = time.monotonic()
http.server.HTTPServer(("127.0.0.1", port), Page).serve_forever()
"""


def gone(pid: int) -> bool:
    """Has the process ended? One that only waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until_gone(pids: list[int], seconds: float = 2.0) -> None:
    end = time.monotonic() + seconds
    while not all(map(gone, pids)):
        assert time.monotonic() < end, "a process was left behind"
        time.sleep(0.02)


def with_server(
    tmp_path: Path,
    body: Callable[[Server], Awaitable[None]],
    *extra: str,
    delay_s: float = 0.2,
    timeout_s: float = 10.0,
) -> list[int]:
    """Run ``body`` on a launched server; the pids of the server and its child."""
    port = free_port()
    pids = tmp_path / "pids"
    argv = [sys.executable, "-c", PROGRAM, str(port), str(delay_s), str(pids), *extra]

    async def run() -> None:
        url, log = f"http://127.0.0.1:{port}", tmp_path / "engine.log"
        async with (
            open_session() as session,
            launched(
                argv,
                {"GREETING": "world"},
                url,
                "/health",
                timeout_s,
                log,
                session,
                grace_s=0.5,
            ) as server,
        ):
            await body(server)

    try:
        asyncio.run(run())
    finally:
        started = [int(p) for p in pids.read_text().split()]
        wait_until_gone(started)
        require_free(port)
    return started


async def nothing(_: Server) -> None:
    pass


def test_a_server_is_launched_and_stopped_with_its_children(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        assert server.poll() is None
        assert server.pid is not None
        assert os.getpgid(server.pid) == server.pid
        with pytest.raises(ServerFailed, match="choose another port"):
            require_free(int(server.url.rsplit(":", 1)[1]))

    with_server(tmp_path, body)
    assert (tmp_path / "engine.log").read_text() == "hello world\n"


def test_a_server_that_ignores_the_first_signal_is_killed(tmp_path: Path) -> None:
    start = time.monotonic()
    with_server(tmp_path, nothing, "stubborn")
    assert time.monotonic() - start < 5.0


def test_no_orphans_when_the_body_raises(tmp_path: Path) -> None:
    async def body(_: Server) -> None:
        raise RuntimeError("the body")

    with pytest.raises(RuntimeError, match="the body"):
        with_server(tmp_path, body)


def test_no_orphans_when_the_body_is_cancelled(tmp_path: Path) -> None:
    async def body(_: Server) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(10)

    with pytest.raises(asyncio.CancelledError):
        with_server(tmp_path, body)


def test_a_second_interrupt_kills_without_the_grace(tmp_path: Path) -> None:
    async def body(_: Server) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.1, task.cancel)
        raise RuntimeError("first")

    with pytest.raises(asyncio.CancelledError):
        with_server(tmp_path, body, "stubborn")


def test_a_server_that_dies_in_the_middle_says_so(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        while (ended := server.poll()) is None:
            await asyncio.sleep(0.01)
        assert "was killed by SIGKILL" in ended
        assert "| hello world" in ended

    with_server(tmp_path, body)


def test_an_unhealthy_server_fails_with_its_log_and_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"not healthy within 4\.5 s") as caught:
        with_server(tmp_path, nothing, delay_s=60, timeout_s=4.5)
    assert "it answers 503" in str(caught.value)
    assert "| hello world" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([sys.executable, "-c", "print(*range(40), sep='\\n'); exit(7)"], "exit status 7"),
        (["/no/such/program"], "cannot run /no/such/program"),
    ],
)
def test_a_server_that_does_not_start(tmp_path: Path, argv: list[str], message: str) -> None:
    async def run() -> None:
        url, log = f"http://127.0.0.1:{free_port()}", tmp_path / "engine.log"
        async with (
            open_session() as session,
            launched(argv, {}, url, "/health", 5.0, log, session),
        ):
            raise AssertionError

    with pytest.raises(ServerFailed, match=message) as caught:
        asyncio.run(run())
    if "exit" in message:
        assert "| 39" in str(caught.value)
        assert "| 20" in str(caught.value)
        assert "| 19" not in str(caught.value)


def test_a_taken_port_is_refused_before_the_launch(tmp_path: Path) -> None:
    async def run(port: int) -> None:
        url, log = f"http://127.0.0.1:{port}", tmp_path / "engine.log"
        async with (
            open_session() as session,
            launched(["/no"], {}, url, "/health", 5.0, log, session),
        ):
            raise AssertionError

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerFailed, match=r"Address already in use.*attach to it"):
            asyncio.run(run(taken.getsockname()[1]))
    assert not (tmp_path / "engine.log").exists()


def test_attached_leaves_the_server_alone(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        async with open_session() as session, attached(session, server.url) as other:
            assert (other.pid, other.log_path, other.poll()) == (None, None, None)
        assert server.poll() is None

    with_server(tmp_path, body)


def test_attaching_to_nothing_fails() -> None:
    async def run() -> None:
        url = f"http://127.0.0.1:{free_port()}"
        async with open_session() as session, attached(session, url, timeout_s=0.2):
            raise AssertionError

    with pytest.raises(ServerFailed, match="ClientConnectorError"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.4.5.6", True),
        ("http://localhost:1/x", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.1:8000", False),
        ("http://localhost.example.org", False),
        ("nonsense", False),
    ],
)
def test_loopback(url: str, answer: bool) -> None:
    assert url_is_loopback(url) is answer
