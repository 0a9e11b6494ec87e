"""The part of a Hugging Face ``config.json`` that decides what a token costs in the KV cache.

What a key means and what its absence means is taken from the configuration classes of transformers
4.57 and from vLLM 0.32 (``model_arch_config_convertor.py``, ``model_executor/models``). A key that
changes the cache in a way that is not counted here is refused, never passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Literal, TypeVar

from loadgen.mendable import Mendable

LayerKind = Literal["full", "sliding", "chunked"]

NESTED = ("text_config", "llm_config", "language_config")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_head")
HIDDEN = ("hidden_size", "n_embd")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
OTHER_NAME_OF_KV_HEADS = re.compile(
    "(kv|key_value).*head|head.*(kv|key_value)|(query|attention)_group"
)
MOST, MOST_LAYERS = 10**9, 10_000

# Without the key these classes fill in a number of their own, so that an absent one says nothing.
OWN_KV_HEADS = {
    *("mistral", "mixtral", "ministral", "gemma", "gemma2", "gemma3", "gemma3_text", "qwen2_moe"),
    *("qwen3_moe", "gpt_oss", "llama4_text", "phimoe", "starcoder2", "smollm3", "glm", "glm4"),
}
OWN_HEAD_DIM = {
    *("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3", "gpt_oss", "llama4_text", "glm", "glm4")
}
LATENT = {"deepseek_v2", "deepseek_v3", "kimi_k2", "pangu_ultra_moe", "glm4_moe_lite", "axk1"}
KV_QUANTISED = ("kv_cache_scheme", "kv_cache_quant_algo")
ALL_SLIDE = {"mistral", "mixtral", "phi3", "phimoe", "starcoder2"}
FULL_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "olmo3": 4}
OWN_WINDOW = {"mistral", "ministral", *FULL_EVERY}
KINDS: dict[str, LayerKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}

STATE = "layers that keep a state of fixed size per request"
UNMODELLED = {
    STATE: (
        *("full_attention_interval", "linear_attn_config", "attn_layer_period", "mamba_d_state"),
        *("attn_layer_indices", "attn_type_list", "layers_block_type", "block_types", "ssm_cfg"),
        *("full_attn_idxs", "layer_group_size", "hybrid_override_pattern", "mamba_d_ssm"),
    ),
    "layers that share one KV cache": ("num_kv_shared_layers", "use_cla"),
    "layers whose KV heads differ in number or size": (
        *("global_head_dim", "num_global_key_value_heads", "swa_num_key_value_heads"),
        *("swa_head_dim", "block_configs", "attention_other_setting"),
        "num_key_value_heads_per_layer",
    ),
    "an indexer with a cache of its own": ("index_topk",),
    "a compressed KV cache": ("compress_ratios",),
    "cross-attention beside self-attention": (
        *("is_encoder_decoder", "cross_attention_layers", "add_cross_attention"),
    ),
}
UNMODELLED_TYPES = {
    "a family of encoders": re.compile("bert|electra|mpnet|longformer|big_?bird|layoutlm|^esm"),
    STATE: re.compile("rwkv|mamba|retnet|xlstm"),
}
JSON_TYPES = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
JsonT = TypeVar("JsonT", bool, str, list[Any], dict[str, Any])


class UnknownShape(Mendable):
    """A config whose KV cache is not told by its keys, or not counted here."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's attention as its KV cache sees it.

    ``values_per_head`` are the key and value elements that one KV head of one layer keeps per
    token. A ``latent`` (MLA) is one such head, kept whole on every tensor-parallel rank.
    ``window_tokens`` belongs to the layers that are not full. ``read`` says what was concluded
    from a key's absence or from the model's type.
    """

    model_type: str
    layers: tuple[LayerKind, ...]
    window_tokens: int | None
    kv_heads: int
    values_per_head: int
    latent: bool
    dtype: str | None
    read: tuple[str, ...]

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layer that occur, full ones first."""
        return tuple(kind for kind in KINDS.values() if kind in self.layers)


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a ``config.json`` states; that of its text model where it nests one.

    Raises UnknownShape with the key that is missing, of a wrong type, or not counted here.
    """
    text = _text_config(config)
    model_type = _typed(text, "model_type", str) or _typed(config, "model_type", str) or ""
    for holder in (config, text):
        _refuse_unmodelled(holder)
    _refuse_types(text, model_type)
    read: list[str] = []
    count = _whole(text, LAYERS, most=MOST_LAYERS)
    layers, window_tokens = _layer_kinds(text, model_type, count, read)
    if text.get("kv_lora_rank") is not None:
        if model_type not in LATENT:
            raise UnknownShape(
                f"kv_lora_rank in a model of type {model_type!r}: whether an engine keeps its "
                f"latent or the keys and values made of it is known for {sorted(LATENT)} only"
            )
        rank, rope = _whole(text, ("kv_lora_rank",)), _whole(text, ("qk_rope_head_dim",))
        kv_heads, values = 1, rank + rope
    else:
        heads = _whole(text, HEADS)
        kv_heads = _kv_heads(text, model_type, heads, read)
        values = 2 * _head_dim(text, model_type, heads, read)
    return ModelShape(
        model_type,
        layers,
        window_tokens,
        kv_heads,
        values,
        text.get("kv_lora_rank") is not None,
        _dtype(config, text),
        tuple(read),
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in NESTED:
        nested = _typed(config, key, dict)
        if nested:
            return nested
    return config


def _refuse_unmodelled(text: Mapping[str, Any]) -> None:
    for what, keys in UNMODELLED.items():
        for key in keys:
            value = text.get(key)
            attention_only = isinstance(value, list) and all(one == 1 for one in value)
            if value and not (key == "attn_type_list" and attention_only):
                raise UnknownShape(f"{key} in the config means {what}: not counted here")
    apart = text.get("v_head_dim") not in (None, text.get("head_dim"))
    if apart and text.get("kv_lora_rank") is None:
        raise UnknownShape("v_head_dim differs from head_dim: not counted here")


def _refuse_types(text: Mapping[str, Any], model_type: str) -> None:
    for what, types in UNMODELLED_TYPES.items():
        if types.search(model_type):
            raise UnknownShape(f"model_type {model_type!r} means {what}: not counted here")
    for name in _texts(text, "architectures") or []:
        if name.endswith("ForMaskedLM"):
            raise UnknownShape(f"architectures names {name!r}, an encoder: not counted here")


def _kv_heads(text: Mapping[str, Any], model_type: str, heads: int, read: list[str]) -> int:
    grouped_falcon = _typed(text, "new_decoder_architecture", bool) is True
    if _typed(text, "multi_query", bool) and not grouped_falcon:
        read.append("multi_query: one KV head")
        return 1
    if any(text.get(key) is not None for key in KV_HEADS):
        found = _whole(text, KV_HEADS)
        if heads % found:
            raise UnknownShape(f"{heads} attention heads do not share {found} KV heads evenly")
        return found
    if model_type in OWN_KV_HEADS or grouped_falcon:
        raise UnknownShape(
            f"num_key_value_heads is missing, and {model_type} does not mean {heads} by that"
        )
    others = [key for key in text.keys() - KV_HEADS if OTHER_NAME_OF_KV_HEADS.search(key)]
    if others:
        raise UnknownShape(f"num_key_value_heads is missing, and {others[0]} is not read here")
    read.append(f"no num_key_value_heads: {heads}, as many as attention heads")
    return heads


def _head_dim(text: Mapping[str, Any], model_type: str, heads: int, read: list[str]) -> int:
    if text.get("head_dim") is not None:
        return _whole(text, ("head_dim",))
    if model_type in OWN_HEAD_DIM:
        raise UnknownShape(f"head_dim is missing, and {model_type} has one of its own")
    hidden = _whole(text, HIDDEN)
    if hidden % heads:
        raise UnknownShape(
            f"head_dim is missing, and {heads} attention heads do not divide {hidden}"
        )
    read.append(f"no head_dim: {hidden // heads} = {hidden} / {heads}")
    return hidden // heads


def _layer_kinds(
    text: Mapping[str, Any], model_type: str, count: int, read: list[str]
) -> tuple[tuple[LayerKind, ...], int | None]:
    """The kind of each layer, and the window of those that are not full (None without any)."""
    listed = _listed(text, count)
    chunk = _whole_or_none(text, "attention_chunk_size")
    if model_type.startswith("llama4") and chunk:
        return _checked(listed or _llama4(text, count, read), chunk)
    window = _whole_or_none(text, "sliding_window")
    use_window = _typed(text, "use_sliding_window", bool)
    if listed is not None and not ({"sliding", "chunked"} & set(listed)):
        return _all_full(count), None
    if listed is None and "sliding_window" not in text and model_type in OWN_WINDOW:
        raise UnknownShape(f"sliding_window is missing, and {model_type} has one of its own")
    if use_window is False or (listed is None and not window):
        return _all_full(count), None
    window = _whole(text, ("sliding_window",))
    if model_type == "cohere2":
        window += 1  # its layers see their own position beside sliding_window others
    return _checked(listed or _patterned(text, model_type, count, read), window)


def _all_full(count: int) -> tuple[LayerKind, ...]:
    return _either("full", range(count))


def _checked(kinds: tuple[LayerKind, ...], window: int) -> tuple[tuple[LayerKind, ...], int | None]:
    if {"sliding", "chunked"} <= set(kinds):
        raise UnknownShape("layer_types mixes sliding and chunked layers: not counted here")
    return kinds, window if set(kinds) != {"full"} else None


def _listed(text: Mapping[str, Any], count: int) -> tuple[LayerKind, ...] | None:
    """The kinds that ``layer_types`` states; None without it."""
    types = _texts(text, "layer_types")
    if types is None:
        return None
    if len(types) != count:
        raise UnknownShape(f"layer_types names {len(types)} layers, num_hidden_layers says {count}")
    others = [kind for kind in types if kind not in KINDS]
    if others:
        raise UnknownShape(
            f"{len(others)} of {count} layers are {others[0]!r} and keep something else than KV per "
            "token (linear attention and Mamba a state of fixed size): not counted here"
        )
    return tuple(KINDS[kind] for kind in types)


def _patterned(
    text: Mapping[str, Any], model_type: str, count: int, read: list[str]
) -> tuple[LayerKind, ...]:
    """The kinds where a window is set and ``layer_types`` is absent."""
    if text.get("use_sliding_window") is True:
        first = _whole(text, ("max_window_layers",), least=0)
        read.append(f"use_sliding_window: layers from {first} on slide")
        return _either("sliding", (layer >= first for layer in range(count)))
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if text.get(key) is not None:
            period = _whole(text, (key,))
            break
    else:
        if model_type in ALL_SLIDE:
            read.append(f"{model_type}: sliding_window holds for every layer")
            return _either("sliding", [True] * count)
        if model_type not in FULL_EVERY:
            raise UnknownShape(
                "sliding_window is set, and nothing says which layers use it: add layer_types"
            )
        period = FULL_EVERY[model_type]
        read.append(
            f"{model_type} without layer_types: every layer whose number is a multiple of "
            f"{period} is full, the others slide"
        )
    return _either("sliding", ((layer + 1) % period for layer in range(count)))


def _either(kind: LayerKind, windowed: Iterable[int]) -> tuple[LayerKind, ...]:
    """``kind`` where the flag is set, else full."""
    kinds: list[LayerKind] = [kind if flag else "full" for flag in windowed]
    return tuple(kinds)


def _llama4(text: Mapping[str, Any], count: int, read: list[str]) -> tuple[LayerKind, ...]:
    rotary = _typed(text, "no_rope_layers", list)
    if not rotary:
        period = _whole_or_none(text, "no_rope_layer_interval", least=1) or 4
        rotary = [(layer + 1) % period > 0 for layer in range(count)]
        read.append(f"no no_rope_layers: every {period}th layer is full, the others chunked")
    if len(rotary) != count:
        raise UnknownShape(f"no_rope_layers names {len(rotary)} layers, not {count}")
    if any(flag not in (0, 1) for flag in rotary):
        raise UnknownShape(f"no_rope_layers must hold 0 and 1 alone, got {short(rotary)}")
    return _either("chunked", rotary)


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    """The model's own type of number; None where the weights or the quantisation decide."""
    quantisation = _typed(config, "quantization_config", dict)
    quantisation = quantisation or _typed(text, "quantization_config", dict) or {}
    inner = _typed(quantisation, "quantization", dict, "quantization_config.") or {}
    if any(part.get(key) for part in (quantisation, inner) for key in KV_QUANTISED):
        return None
    for holder in (text, config):
        for key in ("dtype", "torch_dtype"):
            dtype = _typed(holder, key, str)
            if dtype is not None:
                return dtype.removeprefix("torch.")
    return None


def _typed(holder: Mapping[str, Any], key: str, kind: type[JsonT], where: str = "") -> JsonT | None:
    """The value of ``key``; None where it is absent or null."""
    value = holder.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise UnknownShape(f"{where}{key} must be {JSON_TYPES[kind]}, got {short(value)}")


def _texts(holder: Mapping[str, Any], key: str) -> list[str] | None:
    values = _typed(holder, key, list)
    if not all(isinstance(value, str) for value in values or []):
        raise UnknownShape(f"{key} must be a list of texts, got {short(values)}")
    return values


def _whole_or_none(text: Mapping[str, Any], key: str, least: int = 0) -> int | None:
    return None if text.get(key) is None else _whole(text, (key,), least)


def _whole(
    text: Mapping[str, Any], names: tuple[str, ...], least: int = 1, most: int = MOST
) -> int:
    for name in names:
        value = text.get(name)
        if value is not None:
            if type(value) is not int or not least <= value <= most:
                raise UnknownShape(
                    f"{name} must be one whole number from {least} to {most}, got {short(value)}"
                )
            return value
    raise UnknownShape(f"{names[0]} is missing in the config")
