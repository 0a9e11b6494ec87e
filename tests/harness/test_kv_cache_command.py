"""The command kv-cache, the table of known models against what others publish, and the docs."""

import json
import sys
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.commands.kv_cache_command import size_bytes
from harness.configs.config import ConfigError
from harness.exits import USAGE_EXIT
from harness.servers.kv_models import (
    KnownModel,
    KnownPool,
    known_models,
    known_pools,
    markdown,
    models_table,
    pools_table,
    published_bytes,
)

DOCS = Path(__file__).resolve().parent.parent.parent / "docs/kv_cache.md"
DATA: dict[str, Any] = json.loads((files("harness.servers") / "data/kv_models.json").read_text())
GIB = 2**30


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model.name)
def test_published_bytes_per_token(model: KnownModel) -> None:
    """Our figure rounds to each published one; 0.3052 GiB per 1 000 tokens is 327 652 to 327 760."""
    for figure in model.published:
        low, high = published_bytes(figure)
        assert low <= model.cache.token_bytes() <= high, figure["name"]
        assert high / low < Decimal("1.022"), "a figure of one digit says nothing"
    assert model.config_source["url"].startswith("https://")


def test_own_calculations_are_told_from_published_ones() -> None:
    unpublished = {model.name for model in known_models() if not model.published}
    assert unpublished == {
        "Falcon 7B",
        "Mistral 7B v0.1",
        "Mistral 7B v0.3",
        "Mixtral 8x7B",
        "Gemma 2 9B",
    }


@pytest.mark.parametrize("pool", known_pools(), ids=lambda pool: f"{pool.model}-{pool.row['name']}")
def test_logged_pools(pool: KnownPool) -> None:
    """What the engine logged lies in what follows from the memory that it logged, as rounded."""
    assert pool.derived.keys() == pool.row["logged"].keys() != set()
    for name, text in pool.row["logged"].items():
        low, high = pool.derived[name]
        half = Decimal(1).scaleb(int(Decimal(text).as_tuple().exponent)) / 2
        slack = half if name == "concurrency" else 0
        assert low - slack <= Decimal(text) <= high + slack, name
        assert high / low < Decimal("1.01")


@pytest.mark.parametrize("table", [models_table(), pools_table()], ids=["models", "pools"])
def test_the_docs_show_the_table_that_is_derived(table: list[tuple[str, ...]]) -> None:
    assert markdown(table) in DOCS.read_text(), "print it with critrate kv-cache"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("60GiB", 60 * GIB),
        ("19.53 GiB", int(Decimal("19.53") * GIB)),
        ("24GB", 24 * 10**9),
        ("512MiB", 2**29),
        ("1024", 1024),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "60 gibibytes", "1e9", "6 0GiB"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        size_bytes(text)


def config_of(name: str, folder: Path) -> str:
    path = folder / "config.json"
    (row,) = [row for row in DATA["models"] if row["model"] == name]
    path.write_text(json.dumps(row["config"]))
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of ``critrate kv-cache`` with ``arguments``."""
    monkeypatch.setattr(sys, "argv", ["critrate", "kv-cache", *arguments])
    with pytest.raises(SystemExit) as leaves:
        main()
    return leaves.value.code if isinstance(leaves.value.code, int) else 0


def test_the_pool_of_gemma_3_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of("Gemma 3 27B", tmp_path)
    options = ("--memory", "19.53GiB", "--request-tokens", "8192", "--json")
    assert run(monkeypatch, path, *options) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["layers"] == {"full": 10, "sliding": 52} and answer["window_tokens"] == 1024
    assert answer["bytes_per_token_of"] == {"full": 81_920, "sliding": 425_984}
    assert answer["request_bytes"] == 81_920 * 8192 + 425_984 * 1024
    assert answer["kv_bytes"] == sum(term["bytes"] for term in answer["memory"])
    assert answer["vllm"]["num_blocks"] == answer["kv_bytes"] // (10 * 16 * 8192)
    assert answer["vllm"]["request_blocks"] == 512 + 6 * 65
    assert any("gemma3_text without layer_types" in line for line in answer["rests_on"])


def test_the_example_in_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of("Gemma 3 27B", tmp_path)
    assert run(monkeypatch, path, "--memory", "19.53GiB", "--request-tokens", "8192") == 0
    assert capsys.readouterr().out in DOCS.read_text()


@pytest.mark.parametrize(
    "model, options, expected",
    [
        ("Llama 3.1 8B", (), ["per token   131 072 bytes = 131 072 full"]),
        ("Llama 3.1 8B", ("--tp", "16", "--memory", "1GiB"), ["1 of them, each kept on 2 ranks"]),
        (
            "DeepSeek V3",
            ("--tp", "8", "--dtype", "fp8", "--memory", "20GiB"),
            ["one latent x 576", "per token   35 136 bytes", "each kept on 8 ranks"],
        ),
        (
            "gpt-oss 20B",
            ("--dtype", "bf16", "--memory", "12GiB", "--engine", "sglang"),
            ["SGLang      291 271 tokens, window layers 233 016"],
        ),
        (
            "Llama 3.1 8B",
            (
                *("--gpu-memory", "79.19GiB", "--utilisation", "0.95", "--parameters"),
                *("8030261248", "--other", "2.14GiB"),
            ),
            ["assumed: 8030261248 parameters x 2 bytes", "bytes left for KV per GPU"],
        ),
    ],
)
def test_the_answer_in_words(
    model: str,
    options: tuple[str, ...],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, config_of(model, tmp_path), *options) == 0
    said = capsys.readouterr().out
    for part in expected:
        assert part in said


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("gpt-oss 20B", (), "dtype open"),
        ("Llama 3.1 8B", ("--tp", "3"), "neither divides the other"),
        ("Llama 3.1 8B", ("--memory", "much"), "no amount of memory"),
        ("Llama 3.1 8B", ("--memory", "1GiB", "--gpu-memory", "2GiB"), "give one"),
        ("Llama 3.1 8B", ("--gpu-memory", "24GiB"), "--gpu-memory needs"),
        ("Llama 3.1 8B", ("--memory", "1MiB"), "no two blocks"),
        ("Llama 3.1 8B", ("--engine", "tgi"), "tgi"),
        (
            "gpt-oss 20B",
            (
                *("--dtype", "bf16", "--gpu-memory", "80GiB", "--utilisation", "0.9"),
                *("--parameters", "20000000000", "--other", "2GiB"),
            ),
            "give --weights",
        ),
    ],
)
def test_usage_errors(
    model: str,
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, config_of(model, tmp_path), *options) == USAGE_EXIT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_types": 5}, "layer_types must be a list, got 5"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, got 'fp8'"),
    ],
)
def test_values_of_a_wrong_type(
    change: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(config_of("Llama 3.1 8B", tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert run(monkeypatch, str(path)) == USAGE_EXIT
    assert capsys.readouterr().err == f"error  {message}\n"


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_files_that_are_no_config(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert run(monkeypatch, str(path)) == USAGE_EXIT
    assert run(monkeypatch, str(tmp_path / "none.json")) == USAGE_EXIT


def test_without_a_config_the_known_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    assert markdown(models_table()) in capsys.readouterr().out
    assert run(monkeypatch, "--memory", "1GiB") == USAGE_EXIT
