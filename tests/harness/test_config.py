"""Configs: what is wrong is named in one line, with its key."""

from pathlib import Path

import pytest
import yaml

from harness.configs.config import ConfigError, load_config, load_mock_config

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "name": "x",
    "server": {"url": "http://127.0.0.1:8000"},
    "workload": {"fixed": {"prompt": 10, "output": 10}},
}


MOCK = {"num_blocks": 10, "step_time": {"b0_ms": 1}}
SGLANG = MOCK | {"sglang": {}}
UNCUT = MOCK | {"max_num_batched_tokens": None}


def load(tmp_path: Path, data: object):
    path = tmp_path / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_config(path)


OTHERS = ("theory", "schedulers")
EXPERIMENTS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in OTHERS)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.name)
def test_every_config_of_the_project_loads(path: Path) -> None:
    config = load_config(path)
    if config.workload is not None:
        assert config.law().mean(config.law().prompt_tokens) > 0


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"clam": "engine"}, "clam: unknown key"),
        ({"claim": "both"}, "claim:"),
        ({"theta": 0.9}, "theta:"),
        ({"server": {}}, "server: give one of url"),
        ({"server": {"url": "localhost:8000"}}, "server: url must start with"),
        ({"server": {"url": "http://x", "port": 70000}}, "server.port:"),
        ({"server": {"mock": SGLANG | {"watermark": 0.1}}}, "mock: watermark is vLLM's"),
        ({"server": {"mock": SGLANG, "engine": "vllm"}}, "the mock is sglang"),
        ({"server": {"mock": UNCUT}}, "mock: max_num_batched_tokens: null needs sglang"),
        ({"server": {"mock": SGLANG | {"sglang": {"clip": 1}}}}, "mock.sglang.clip: unknown key"),
        (
            {"limits": {"sglang": {}, "watermark": 0.01}},
            "limits: watermark is vLLM's: leave it out beside sglang",
        ),
        ({"load": {"rates": [0.85, 0]}}, "load.rates.1:"),
        ({"load": {"rates": []}}, "load: rates: give at least one"),
        ({"workload": {}}, "workload: give exactly one of"),
        ({"workload": {"fixed": {"prompt": 0, "output": 5}}}, "workload.fixed.prompt:"),
        ({"workload": {"uniform": {"prompt": [9, 3], "output": [1, 2]}}}, "first bound 9 exceeds"),
        ({"workload": {"trace": {"file": "no.csv", "format": "azure"}}}, "there is no file"),
        ({"step_time": {"b0_ms": -1}}, "step_time.b0_ms:"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, change: dict, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, {**GOOD, **change})
    assert key in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [("- 1\n- 2\n", "mapping of keys"), ("a: [", "not valid YAML")]
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_relative_trace_files_start_at_the_config(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,5,7\n1,6,8\n")
    config = load(
        tmp_path, {**GOOD, "workload": {"trace": {"file": "t.csv", "format": "sharegpt"}}}
    )
    assert config.law().output_tokens.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("version", "whole"), [("0.5.21", False), ("0.5.22", True), ("0.5.23.post1", True)]
)
def test_an_sglang_mock_has_the_rules_of_its_version(
    tmp_path: Path, version: str, whole: bool
) -> None:
    mock = SGLANG | {"sglang": {"version": version}, "max_num_batched_tokens": None}
    server = load(tmp_path, GOOD | {"server": {"mock": mock}}).server
    limits = server.mock.limits()
    assert (limits.block_size, limits.max_num_batched_tokens) == (1, None)
    assert limits.sglang.whole_output_of_ignore_eos == whole
    assert server.mock.server(0, None).sglang.version == version


def test_a_mock_reads_back_what_its_process_is_given(tmp_path: Path) -> None:
    for mock in (MOCK, SGLANG, SGLANG | {"max_num_batched_tokens": None}):
        given = load(tmp_path, GOOD | {"server": {"mock": mock}}).server.mock
        path = tmp_path / "mock.yaml"
        path.write_text(yaml.safe_dump(given.model_dump(mode="json")))
        assert load_mock_config(path) == given
