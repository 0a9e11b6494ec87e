"""A server under test: launched here and stopped again by pid, or attached to where it runs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from loadgen.mendable import Mendable

POLL_S = 0.05
SILENT = "it did not answer"
WANTS_KEY = (401, 403)
GRACE_S = 10.0
LOG_TAIL_LINES = 20


class ServerFailed(Mendable):
    """The server could not be started or reached; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """A server that answers at ``url``. ``pid`` and ``log_path`` are None when it is not ours."""

    url: str
    pid: int | None = None
    log_path: Path | None = None
    _process: subprocess.Popen[bytes] | None = None

    def poll(self) -> str | None:
        """One sentence when a server of ours has ended; None while it runs, or if not ours."""
        if self._process is None or self._process.poll() is None:
            return None
        return f"the server {how_it_ended(self._process.returncode)}{log_tail(self.log_path)}"


@contextlib.asynccontextmanager
async def launched(
    argv: Sequence[str],
    env: Mapping[str, str],
    url: str,
    health: str,
    timeout_s: float,
    log_path: Path,
    session: aiohttp.ClientSession,
    grace_s: float = GRACE_S,
) -> AsyncIterator[Server]:
    """Start ``argv`` in a session of its own, wait until it is healthy, stop it at the end.

    ``env`` is added to this process's environment; ``session`` asks for its health. Output goes to
    the end of ``log_path``. The whole process group is stopped however the body ends: SIGTERM, up to
    ``grace_s``, SIGKILL.
    Raises ServerFailed when the port is taken, the program cannot be run, ends early or is not
    healthy after ``timeout_s``.
    """
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ServerFailed(f"{url} names no host and port to launch a server on")
    require_free(parts.port, parts.hostname)
    with log_path.open("ab") as log:
        try:
            process = subprocess.Popen(
                list(argv),
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerFailed(f"cannot run {argv[0]}: {error.strerror}") from error
    server = Server(url, process.pid, log_path, process)
    try:
        await _until_healthy(server, session, health, timeout_s)
        yield server
    finally:
        await _stop(process, grace_s)


@contextlib.asynccontextmanager
async def attached(
    session: aiohttp.ClientSession, url: str, health: str = "/health", timeout_s: float = 5.0
) -> AsyncIterator[Server]:
    """A server that somebody else started; it is left running.

    Raises ServerFailed when it is unhealthy, wants a key, or has a certificate that ``session`` does
    not trust.
    """
    server = Server(url)
    await _until_healthy(server, session, health, timeout_s)
    yield server


def answered(status: int) -> str:
    """A status as the end of a sentence, with what to do where the server wants a key."""
    return f"answers {status}" + (": check server.api_key_env" if status in WANTS_KEY else "")


async def _until_healthy(
    server: Server, session: aiohttp.ClientSession, health: str, timeout_s: float
) -> None:
    deadline_s = time.monotonic() + timeout_s
    answer = SILENT
    while True:
        ended = server.poll()
        if ended is not None:
            raise ServerFailed(f"while starting, {ended}")
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise ServerFailed(
                f"{server.url}{health} was not healthy within {timeout_s:g} s ({answer})"
                f"{log_tail(server.log_path)}"
            )
        try:
            timeout = aiohttp.ClientTimeout(total=min(left_s, 5.0))
            async with session.get(server.url + health, timeout=timeout) as response:
                if response.status == 200:
                    return
                answer = f"it {answered(response.status)}"
                if response.status in WANTS_KEY:
                    raise ServerFailed(
                        f"{server.url}{health}: the server {answered(response.status)}"
                    )
        except aiohttp.ClientConnectorCertificateError as error:
            why = error.certificate_error
            raise ServerFailed(
                f"{server.url}: its certificate is not trusted "
                f"({getattr(why, 'verify_message', why)}): give the certificate of the authority that "
                "signed it as server.tls_ca, and use a name that stands in it"
            ) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            # The last try is cut short: it says less than an answer that came before.
            if deadline_s > time.monotonic() or answer == SILENT:
                answer = f"{type(error).__name__}: {error}".rstrip(": ")
        await asyncio.sleep(POLL_S)


async def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the process group. A second interrupt in here skips the grace, not the killing."""
    try:
        _signal_group(process.pid, signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while time.monotonic() < deadline_s:
            # Reap the leader first: a zombie keeps its group alive.
            if process.poll() is not None and not _signal_group(process.pid, 0):
                return
            await asyncio.sleep(POLL_S)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False when nothing of it is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def how_it_ended(returncode: int) -> str:
    """How a process ended, as the end of a sentence."""
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit status {returncode}"


def log_tail(path: Path | None, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log as an indented block under a heading; empty when there is no log."""
    if path is None or not path.exists():
        return ""
    with path.open(errors="replace") as file:
        tail = deque(file, maxlen=lines)
    if not tail:
        return f"\n  (it wrote nothing to {path})"
    block = "\n".join(f"  | {line.rstrip()}" for line in tail)
    return f"\n  last lines of {path}:\n{block}"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def require_free(port: int, host: str = "127.0.0.1") -> None:
    """Raise ServerFailed when a server could not listen on this port of this machine."""
    with socket.socket(_family(host)) as probe:
        # As servers do, so that connections that are only closing do not count as use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerFailed(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what runs there, choose "
                f"another port, or attach to it"
            ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def url_is_loopback(url: str) -> bool:
    """Does the URL lead to this machine without a network in between?"""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
