from __future__ import annotations

import json
from datetime import datetime

import pytest

from harness.machine.environment import environment, redacted


def test_environment_is_json_and_tells_what_ran() -> None:
    record = environment(["critrate", "run", "x.yaml", "--api-key", "abc"])
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == ["critrate", "run", "x.yaml", "--api-key", "***"]
    assert record["cpu"]["count"] >= 1
    assert len(record["cpu"]["load_average"]) == 3
    assert record["packages"]["numpy"].count(".") == 2
    assert datetime.fromisoformat(record["wall_time"]).tzinfo is not None
    assert set(record["gpu"]) in ({"none"}, {"driver", "gpus", "unsupported"})
    commit = record["critrate"].get("commit")
    assert commit is None or len(commit) == 40


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("--api-key=abc", "--api-key=***"),
        ("--api_key=abc", "--api_key=***"),
        ("--hf-token=abc", "--hf-token=***"),
        ("--password=a b", "--password=***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("OPENAI_API_KEY=abc", "OPENAI_API_KEY=***"),
        ("Authorization: Bearer abc", "Authorization: ***"),
        ("X-API-Key: abc", "X-API-Key: ***"),
        ("--header=Authorization: Bearer abc", "--header=Authorization: ***"),
        ("bearer abc", "bearer ***"),
        ("http://user:abc@host:1/v1", "http://***@host:1/v1"),
        ("sk-abcdefgh1234", "***"),
        ("--model=hf_abcdefgh1234", "--model=***"),
        ("--max-num-batched-tokens=5", "--max-num-batched-tokens=5"),
        ("--tokenizer=abc", "--tokenizer=abc"),
        ("--ssl-keyfile=abc", "--ssl-keyfile=abc"),
        ("http://host:1/v1", "http://host:1/v1"),
        ("task-abcdefghij", "task-abcdefghij"),
    ],
)
def test_secrets_are_not_recorded(argument: str, shown: str) -> None:
    assert redacted(["x", argument, "y"]) == ["x", shown, "y"]


@pytest.mark.parametrize("option", ["--api-key", "--token", "--hf_token", "--password", "-token"])
def test_the_value_after_a_secret_option_is_hidden(option: str) -> None:
    assert redacted([option, "abc", "y"]) == [option, "***", "y"]


def test_other_values_stay() -> None:
    argv = ["--max-tokens", "5", "--tokenizer", "x", "--seed", "1"]
    assert redacted(argv) == argv
