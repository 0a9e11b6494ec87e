"""Bytes of KV cache per token and per request of a model, and the memory left for them on a GPU.

All figures are exact integers that follow from the config, the layout and what is stated. How many
blocks and tokens an engine makes of the memory is in `analysis.theory.kv_pools`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.theory.model_shape import LayerKind, ModelShape
from loadgen.mendable import Mendable

VALUE_BYTES = {
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "float16": 2,
    "fp16": 2,
    "half": 2,
    "bfloat16": 2,
    "bf16": 2,
    "float32": 4,
}


class ImpossibleCache(Mendable):
    """A layout or a budget that no engine would start with."""


@dataclass(frozen=True, slots=True)
class KvCache:
    """A model's KV cache in one number format, spread over tensor and pipeline ranks."""

    shape: ModelShape
    dtype: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer keeps per token, over all ranks, each value counted once."""
        return self.shape.kv_heads * self.shape.values_per_head * VALUE_BYTES[self.dtype]

    @property
    def rank_heads(self) -> int:
        """KV heads on one rank: at least one, so that fewer heads than ranks are copied."""
        return max(1, self.shape.kv_heads // self.tensor_parallel)

    @property
    def rank_layer_bytes(self) -> int:
        """Bytes that one layer keeps per token on the GPU of one tensor-parallel rank."""
        return self.rank_heads * self.shape.values_per_head * VALUE_BYTES[self.dtype]

    @property
    def copies(self) -> int:
        """Tensor-parallel ranks that keep the same values."""
        return self.tensor_parallel * self.rank_heads // self.shape.kv_heads

    def token_bytes(self, kind: LayerKind | None = None) -> int:
        """Bytes per token of the layers of one kind, or of all, each value counted once."""
        count = len(self.shape.layers) if kind is None else self.shape.layers.count(kind)
        return count * self.layer_bytes

    def request_bytes(self, tokens: int, in_flight_tokens: int = 0) -> int:
        """Bytes that a request of ``tokens`` needs: the window's layers keep no more than it.

        An engine that frees after a step keeps ``in_flight_tokens`` beyond the window. Chunked
        layers are counted at their fullest, at the end of a chunk.
        """
        kept = tokens
        if self.shape.window_tokens is not None:
            kept = min(tokens, self.shape.window_tokens + in_flight_tokens)
        full = self.shape.layers.count("full")
        return self.layer_bytes * (full * tokens + (len(self.shape.layers) - full) * kept)


def kv_cache(
    shape: ModelShape, dtype: str = "auto", tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> KvCache:
    """The cache of ``shape``; "auto" is the model's own dtype, as in both engines.

    Raises ImpossibleCache for a dtype that is open or unknown, for KV heads that the ranks do not
    share evenly, and for more stages than layers.
    """
    resolved = shape.dtype if dtype == "auto" else dtype
    if resolved is None:
        raise ImpossibleCache(
            "the config leaves the KV cache's dtype open (no torch_dtype, or the checkpoint "
            "quantises the cache): name it"
        )
    if resolved not in VALUE_BYTES or (dtype == "auto" and VALUE_BYTES[resolved] == 4):
        raise ImpossibleCache(f"KV cache dtype {resolved}: name one of {', '.join(VALUE_BYTES)}")
    if tensor_parallel < 1 or not 1 <= pipeline_parallel <= len(shape.layers):
        raise ImpossibleCache(
            f"{tensor_parallel} tensor ranks and {pipeline_parallel} stages do not fit a model "
            f"of {len(shape.layers)} layers"
        )
    if shape.kv_heads % tensor_parallel and tensor_parallel % shape.kv_heads:
        raise ImpossibleCache(
            f"{shape.kv_heads} KV heads and {tensor_parallel} tensor ranks: neither divides the "
            "other, which both engines refuse"
        )
    return KvCache(shape, resolved, tensor_parallel, pipeline_parallel)


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One amount of memory on one GPU, and what it rests on."""

    name: str
    bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class KvBudget:
    """Bytes for KV on one GPU: the terms' sum, each with its sign."""

    terms: tuple[MemoryTerm, ...]

    @property
    def kv_bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


def kv_budget(
    gpu_bytes: int, utilisation: float, weights: MemoryTerm, other: MemoryTerm
) -> KvBudget:
    """vLLM's account: GPU memory times gpu_memory_utilization, less weights and all the rest.

    ``other`` is the peak of activations, CUDA graphs and what lies outside of torch: it depends on
    the engine and is to be read in its start-up log. Raises ImpossibleCache where nothing is left.
    """
    if not 0 < utilisation <= 1:
        raise ImpossibleCache(f"utilisation must lie in (0, 1], got {utilisation}")
    asked = MemoryTerm(
        "asked for", math.ceil(gpu_bytes * utilisation), f"{gpu_bytes} bytes x {utilisation}"
    )
    taken = [MemoryTerm(term.name, -term.bytes, term.source) for term in (weights, other)]
    budget = KvBudget((asked, *taken))
    if budget.kv_bytes <= 0:
        raise ImpossibleCache(
            f"weights and the rest take {-taken[0].bytes - taken[1].bytes} bytes of the "
            f"{asked.bytes} asked for: nothing is left for KV"
        )
    return budget


def even_weights(parameters: int, value_bytes: int, ranks: int) -> MemoryTerm:
    """Weights per GPU if ``parameters`` spread evenly: an assumption, embeddings often do not."""
    return MemoryTerm(
        "weights",
        -(-parameters * value_bytes // ranks),
        f"assumed: {parameters} parameters x {value_bytes} bytes, evenly over {ranks} GPU(s)",
    )
