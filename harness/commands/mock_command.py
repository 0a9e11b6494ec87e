"""The command ``mock``: a server without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.configs.config import load_mock_config
from harness.mock.mock_http import run_mock


def mock_command(
    config: Annotated[Path, typer.Argument(help="YAML with the mock server's parameters")],
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
    step_log: Annotated[Path | None, typer.Option(help="write every step here")] = None,
) -> None:
    """A server that speaks the dialect of vLLM, or SGLang, around a model of its scheduler."""
    run_mock(load_mock_config(config).server(port, step_log))
