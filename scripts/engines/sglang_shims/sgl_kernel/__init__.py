"""Stands in for SGLang's compiled kernels, whose release is built for CUDA.

With SGLANG_USE_CPU_ENGINE=1 SGLang imports names from here and calls none of them where attention is
torch_native and sampling is pytorch. Every name exists, so that the imports go through, and raises
when it is called, so that nothing is ever computed by a stand-in.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is not there on this CPU: choose torch_native"
        )

    return missing
