"""Changes a class of SGLang's when its module is imported, without importing it before its time."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

WRITTEN_FOR = "0.5.23"
SCHEDULER = "sglang.srt.managers.scheduler"


class WhenImported:
    """Runs once, when the module of the scheduler is imported; finds no module itself."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != SCHEDULER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def and_change(module: Any) -> None:
            execute(module)
            self.change(module.Scheduler)

        spec.loader.exec_module = and_change
        return spec


def change_scheduler(change: Callable[[Any], None], variable: str) -> None:
    """Call ``change`` with SGLang's Scheduler before it is used. ``variable`` is what asked for it.

    Changes that come later wrap the earlier ones. Raises RuntimeError with another version of SGLang.
    """

    def checked(scheduler: Any) -> None:
        if version("sglang") != WRITTEN_FOR:
            raise RuntimeError(
                f"written for SGLang {WRITTEN_FOR}, whose scheduler's interface is not public: use that "
                f"version, or leave out what sets {variable}"
            )
        change(scheduler)

    sys.meta_path.insert(0, WhenImported(checked))
