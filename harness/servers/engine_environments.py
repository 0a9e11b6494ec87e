"""The engines' own environments: which there are, and where. Needs nothing but Python itself, so that
they can be made before, or beside, the project's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Engine = Literal["vllm", "sglang"]
Device = Literal["cpu", "gpu"]


class NoEnvironment(RuntimeError):
    """There is no such environment; the message says what makes it."""


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """An environment that `scripts/engine-env` makes."""

    name: str
    engine: Engine
    version: str
    device: Device

    @property
    def folder(self) -> Path:
        return engines_folder() / f"{self.name}-{self.version}"

    @property
    def variable(self) -> str:
        """Environment variable that names the Python of one's own to use instead."""
        return f"CRITRATE_ENGINE_{self.name.upper().replace('-', '_')}"

    def python(self) -> Path:
        """Its Python. Raises NoEnvironment with the command that makes it."""
        if given := os.environ.get(self.variable):
            if not Path(given).is_file():
                raise NoEnvironment(f"{self.variable}={given} is not a file: give a Python")
            return Path(given).absolute()
        if not (self.folder / ".complete").exists():
            raise NoEnvironment(
                f"server.launch: there is no environment {self.name} in {self.folder}: make it with "
                f"scripts/engine-env {self.name}"
            )
        return self.folder / "bin" / "python"


ENVIRONMENTS: Mapping[str, EngineEnvironment] = {
    e.name: e
    for e in (
        EngineEnvironment("vllm-cpu", "vllm", "0.32.0", "cpu"),
        EngineEnvironment("sglang-cpu", "sglang", "0.5.23", "cpu"),
        EngineEnvironment("vllm", "vllm", "0.32.0", "gpu"),
        EngineEnvironment("sglang", "sglang", "0.5.23", "gpu"),
    )
}


def engines_folder() -> Path:
    """Where the engines' environments and the tiny models are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "critrate" / "engines"
