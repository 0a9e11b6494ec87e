"""The one session through which everything talks to the server under test."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import aiohttp

from harness.configs.config import ConfigError, ServerConfig
from loadgen.client import open_session


def connect(server: ServerConfig) -> aiohttp.ClientSession:
    """A session with the headers, the key and the certificates of the config.

    To be used as an async context manager. Raises ConfigError when the key is not in the environment
    or the certificates cannot be read; the key itself is in no message.
    """
    return open_session(_headers(server), _trusted(server.tls_ca))


def _headers(server: ServerConfig) -> dict[str, str]:
    headers = dict(server.headers)
    if server.api_key_env is not None:
        headers["Authorization"] = f"Bearer {_key(server.api_key_env)}"
    return headers


def _key(variable: str) -> str:
    # The name is in no message either: it may be the key, put where its name belongs.
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            "server.api_key_env: no environment variable of this name is set: export it with the key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "server.api_key_env: the variable's value has characters that no key has: export it anew"
        )
    return key


def _trusted(authorities: Path | None) -> ssl.SSLContext | None:
    """Trust in the certificates of a file alone; None is the trust that this machine has."""
    if authorities is None:
        return None
    try:
        return ssl.create_default_context(cafile=authorities)
    except ssl.SSLError as error:
        raise ConfigError(f"server.tls_ca: {authorities} holds no certificate (PEM)") from error
    except OSError as error:
        raise ConfigError(
            f"server.tls_ca: {authorities} cannot be read: {error.strerror}"
        ) from error
