"""Lets SGLang be imported where torch is a CPU build and torchvision is not.

The operators of such a torchvision cannot be loaded, and its import stops at the first one that it
looks up. Declaring two of them, without code, is enough. SGLang itself is untouched, and neither its
server with a text model nor its benchmark client calls an operator of torchvision.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from typing import Any


class DeclareOperators:
    """Runs once, before torchvision is imported; finds no module itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            if not version("torchvision").endswith("+cpu"):
                self.declare()
        return None

    def declare(self) -> None:
        import torch

        self.library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            self.library.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


finder = DeclareOperators()  # a name of its own: what it declares goes when it goes
sys.meta_path.insert(0, finder)

# The recorder comes last: it sees the steps as they were held.
if "CRITRATE_STEP_TIME" in os.environ:
    import critrate_paced  # noqa: F401
if "CRITRATE_STEP_LOG" in os.environ:
    import critrate_recorded  # noqa: F401
