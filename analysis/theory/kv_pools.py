"""How many blocks and tokens vLLM and SGLang make of the memory for KV, and what requests fit.

vLLM's count is that of 0.32 (``v1/core/kv_cache_utils.py``, ``v1/kv_cache_interface.py``),
SGLang's that of 0.5.23 (``model_executor/pool_configurator.py``). All figures are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.theory.kv_cache import ImpossibleCache, KvCache
from analysis.theory.model_shape import LayerKind

# Of the model types that `analysis.theory.model_shape` reads; all others get one pool.
SGLANG_SPLIT_POOLS = ("gpt_oss", "llama4", "llama4_text")


@dataclass(frozen=True, slots=True)
class VllmPool:
    """vLLM's block pool, the same on every GPU of a replica.

    ``groups`` are the kinds of its layer groups: a request draws blocks for each of them. One of
    ``num_blocks`` is never given out.
    """

    block_tokens: int
    block_bytes: int
    num_blocks: int
    groups: tuple[LayerKind, ...]
    window_tokens: int | None

    @property
    def logged_tokens(self) -> int:
        """What 0.19 logs as "GPU KV cache size": as if every group kept every token."""
        return self.num_blocks // len(self.groups) * self.block_tokens

    def request_blocks(self, tokens: int, in_flight_tokens: int = 1) -> int:
        """Most blocks that a request of ``tokens`` holds with so many scheduled per step.

        1 is a request that decodes; in a chunk of prefill it is the chunk. Source:
        ``max_admission_blocks_per_request``, kept to the blocks of the request itself; chunked layers
        need chunks of whole blocks.
        """
        whole = -(-tokens // self.block_tokens)
        return sum(min(whole, self._kept(kind, tokens, in_flight_tokens)) for kind in self.groups)

    def requests(self, tokens: int, in_flight_tokens: int = 1) -> int:
        """Requests of ``tokens`` that fit at once."""
        return (self.num_blocks - 1) // self.request_blocks(tokens, in_flight_tokens)

    def capacity_tokens(self, tokens: int, in_flight_tokens: int = 1) -> int:
        """Tokens held by a pool full of requests of ``tokens``, the last one in part."""
        return (self.num_blocks - 1) * tokens // self.request_blocks(tokens, in_flight_tokens)

    def logged_concurrency(self, max_model_len_tokens: int, in_flight_tokens: int) -> float:
        """What vLLM logs as "Maximum concurrency for ... tokens per request".

        ``in_flight_tokens`` is max_num_batched_tokens in 0.19; 0.32 takes it once for each batch
        in flight (two with asynchronous scheduling) and logs this times the length as the size.
        """
        blocks = sum(
            self._kept(kind, max_model_len_tokens, in_flight_tokens) for kind in self.groups
        )
        return self.num_blocks / blocks

    def _kept(self, kind: LayerKind, tokens: int, in_flight_tokens: int) -> int:
        if kind == "full" or self.window_tokens is None:
            return -(-tokens // self.block_tokens)
        if kind == "chunked":
            return -(-min(self.window_tokens + in_flight_tokens, tokens) // self.block_tokens)
        kept = min(self.window_tokens - 1 + in_flight_tokens, tokens)
        return -(-kept // self.block_tokens) + 1  # a window may begin inside a block


def vllm_pool(
    cache: KvCache, kv_bytes: int, block_tokens: int = 16, hybrid: bool = True
) -> VllmPool:
    """The pool that ``kv_bytes`` per GPU give; the stage with the largest block bounds it.

    With two kinds of layers the hybrid manager makes groups of equal size, one block table each;
    ``hybrid=False`` (--disable-hybrid-kv-cache-manager) keeps every token in every layer. Raises
    ImpossibleCache where not even two blocks fit.
    """
    groups = _vllm_groups(cache.shape.layers, hybrid)
    bounds = _bounds(_vllm_stages(len(cache.shape.layers), cache.pipeline_parallel))
    widest = max(
        sum(first <= layer < last for layer in layers)
        for first, last in bounds
        for _, layers in groups
    )
    block_bytes = widest * cache.rank_layer_bytes * block_tokens
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 2:
        raise ImpossibleCache(f"{kv_bytes} bytes hold no two blocks of {block_bytes} bytes")
    return VllmPool(
        block_tokens,
        block_bytes,
        num_blocks,
        tuple(kind for kind, _ in groups),
        cache.shape.window_tokens,
    )


def _vllm_groups(
    layers: Sequence[LayerKind], hybrid: bool
) -> list[tuple[LayerKind, tuple[int, ...]]]:
    """Kind and layer numbers of each group (``_get_kv_cache_groups_uniform_page_size``)."""
    numbers: dict[LayerKind, tuple[int, ...]] = {
        kind: tuple(number for number, one in enumerate(layers) if one == kind)
        for kind in dict.fromkeys(layers)
    }
    if len(numbers) == 1:
        return list(numbers.items())
    if not hybrid:
        return [("full", tuple(range(len(layers))))]
    fewest, most = sorted(map(len, numbers.values()))
    size = most if most < 1.5 * fewest else fewest
    groups = []
    for kind, found in numbers.items():
        count = -(-len(found) // size)
        groups += [(kind, found[first::count]) for first in range(count)]
    return groups


@dataclass(frozen=True, slots=True)
class SglangPool:
    """SGLang's token pool per GPU; ``window_pool_tokens`` is the second pool where it makes one."""

    page_tokens: int
    full_pool_tokens: int
    window_pool_tokens: int | None
    window_tokens: int | None

    def capacity_tokens(self, tokens: int) -> int:
        """Tokens held when full of requests of ``tokens``; the pool that fills first bounds."""
        if self.window_pool_tokens is None or self.window_tokens is None:
            return self.full_pool_tokens
        kept = min(tokens, self.window_tokens)
        return min(self.full_pool_tokens, self.window_pool_tokens * tokens // kept)


def sglang_pool(
    cache: KvCache, kv_bytes: int, page_tokens: int = 1, swa_full_tokens_ratio: float = 0.8
) -> SglangPool:
    """The pool that ``kv_bytes`` per GPU give; the stage with the dearest token bounds it.

    Only the model types of ``SGLANG_SPLIT_POOLS`` get a second pool for their window layers, of
    ``swa_full_tokens_ratio`` times the tokens of the first; in all others every layer keeps every
    token. Raises ImpossibleCache where a pool would hold no request.
    """
    if not 0 < swa_full_tokens_ratio <= 1:
        raise ImpossibleCache(f"swa_full_tokens_ratio {swa_full_tokens_ratio} is not in (0, 1]")
    layers, window = cache.shape.layers, cache.shape.window_tokens
    split = window is not None and cache.shape.model_type in SGLANG_SPLIT_POOLS
    weight = swa_full_tokens_ratio if split else 1
    bounds = _bounds(_sglang_stages(len(layers), cache.pipeline_parallel))
    stages = [layers[first:last] for first, last in bounds]
    if split and any("full" not in stage for stage in stages):
        raise ImpossibleCache("a stage without a full layer has no split pool: fewer stages")
    cell_bytes = max(
        stage.count("full") * cache.rank_layer_bytes
        + weight * ((len(stage) - stage.count("full")) * cache.rank_layer_bytes)
        for stage in stages
    )
    tokens = _aligned(int(kv_bytes // cell_bytes), page_tokens)
    second = _aligned(int(tokens * swa_full_tokens_ratio), page_tokens) if split else None
    if not tokens or (second is not None and window is not None and window + page_tokens >= second):
        raise ImpossibleCache(f"{kv_bytes} bytes hold no request: SGLang would not start")
    return SglangPool(page_tokens, tokens, second, window)


def _aligned(tokens: int, page_tokens: int) -> int:
    return tokens // page_tokens * page_tokens


def _vllm_stages(layers: int, stages: int) -> list[int]:
    """Layers per stage: the remainder goes to the last stages but the very last."""
    sizes = [layers // stages] * stages
    for extra in range(layers % stages):
        sizes[-2 - extra] += 1
    return sizes


def _sglang_stages(layers: int, stages: int) -> list[int]:
    """Layers per stage: the remainder goes to the last stages."""
    return [layers // stages + (stages - stage <= layers % stages) for stage in range(stages)]


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(len(sizes))]
