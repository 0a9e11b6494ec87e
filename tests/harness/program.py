"""The program on a small mock, as a process of its own or in this one, for tests."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.cli import main

CONFIG = {
    "name": "small",
    "claim": "engine",
    "theta": 0.2,
    "server": {
        "mock": {
            "num_blocks": 128,
            "block_size": 16,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 1024,
            "max_model_len": 512,
            "step_time": {"b0_ms": 20, "b1_us_per_token": 20, "b2_ns_per_kv_token": 1000},
        }
    },
    "workload": {"uniform": {"prompt": [16, 80], "output": [16, 80]}},
    "load": {"rates": [0.8, 1.3], "horizon_s": 16, "extend": False, "seed": 3},
}


def config_file(folder: Path, **changes: object) -> Path:
    """`CONFIG` with these sections in place of its own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def critrate(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "harness.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def exit_status(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """That of the command in this process, which spares it two seconds of imports."""
    monkeypatch.setattr(sys, "argv", ["critrate", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaves:
        main()
    return leaves.value.code if isinstance(leaves.value.code, int) else 0


def mock_pids(folder: Path) -> list[int]:
    """Processes that were started on the experiment's mock.yaml."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(folder / "out" / "mock.yaml") in command:
                found.append(int(entry.name))
    return found
