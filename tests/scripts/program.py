"""Scripts as modules: their functions and tables, without a process of their own."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(path: str) -> ModuleType:
    """The script at a path below scripts/, which stands in sys.modules, as a sweep's workers need it."""
    loader = importlib.machinery.SourceFileLoader(
        "script_" + path.replace("/", "_"), str(SCRIPTS / path)
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
