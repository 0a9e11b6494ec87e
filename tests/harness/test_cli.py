"""The command line as a shell sees it: help, completion, and what an import costs."""

import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from harness.cli import COMMANDS, app, command_of

HEAVY = ("scipy", "pandas", "matplotlib", "aiohttp", "pydantic")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_tells_its_use_with_examples_that_it_takes(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0 and "Examples:" in shown.output
    for example in COMMANDS[name].examples:
        assert example in shown.output
        program, command, *arguments = example.split()
        assert (program, command) == ("critrate", name)
        # Parsed as the shell would hand it over; a wrong option or value raises.
        command_of(name).make_context(name, arguments)


def test_help_lists_every_command_and_imports_none() -> None:
    lines = (
        "import sys; sys.argv = ['critrate', '--help']",
        "from harness.cli import main",
        "try: main()",
        "except SystemExit: pass",
        f"assert not set({HEAVY}) & set(sys.modules), sorted(set({HEAVY}) & set(sys.modules))",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("bash", {"COMP_WORDS": "critrate se", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "critrate se"}),
        (
            "fish",
            {
                "_TYPER_COMPLETE_ARGS": "critrate se",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            },
        ),
    ],
)
def test_shells_complete_commands(shell: str, asked: dict[str, str]) -> None:
    shown = CliRunner().invoke(
        app, [], prog_name="critrate", env={"_CRITRATE_COMPLETE": f"complete_{shell}", **asked}
    )
    for name in ("search", "selftest"):
        assert name in shown.output
    assert "predict" not in shown.output


def test_every_module_of_a_command_has_it() -> None:
    for name, command in COMMANDS.items():
        module = import_module(f"harness.commands.{command.module}")
        assert callable(getattr(module, f"{name.replace('-', '_')}_command"))
