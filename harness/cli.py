"""The command line: each command is a module around one stage, imported when it is asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from harness.exits import INTERRUPT_EXIT, USAGE_EXIT
from loadgen.mendable import Mendable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Predict the critical request rate of an LLM server, drive it there, and judge.",
)


@dataclass(frozen=True, slots=True)
class Command:
    """One command: the module that has it (its function is ``<name>_command``), and its help."""

    module: str
    line: str
    """What it does, in the list of the commands."""
    examples: tuple[str, ...]


COMMANDS = {
    "run": Command(
        "run_command",
        "Predict, drive, sample, fit and judge.",
        ("critrate run configs/mock.yaml", "critrate run configs/vllm_cpu.yaml --plan"),
    ),
    "predict": Command(
        "predict_command",
        "The critical rate from what a config states, without any server.",
        (
            "critrate predict configs/h100_llama3_8b_vllm.yaml",
            "critrate predict configs/a100_llama3_8b_vllm.yaml --json",
        ),
    ),
    "search": Command(
        "search_command",
        "Find the critical rate of an unknown server, in the least time.",
        ("critrate search configs/mock.yaml", "critrate search configs/mock.yaml --precision 0.01"),
    ),
    "calibrate": Command(
        "calibrate_command",
        "The pool and the step time of a server from small batches.",
        ("critrate calibrate configs/mock.yaml",),
    ),
    "analyse": Command(
        "analyse_command",
        "Judge a results folder again, from its files alone.",
        ("critrate analyse results/FOLDER", "critrate analyse results/FOLDER --claim paper"),
    ),
    "report": Command(
        "analyse_command",
        "Write report.html and report.md of a results folder again.",
        ("critrate report results/FOLDER",),
    ),
    "explain": Command(
        "explain_command",
        "Split measured over the paper's rate into its causes.",
        ("critrate explain results/FOLDER",),
    ),
    "slo": Command(
        "slo_command",
        "The largest share of the critical rate at which a target for the first token holds.",
        ("critrate slo results/FOLDER --ttft 0.5 --quantile 0.95",),
    ),
    "size": Command(
        "size_command",
        "How many replicas a demand needs, so that a target for the first token holds.",
        (
            "critrate size results/FOLDER --rate 120 --ttft 0.5 --price 2.5",
            "critrate size configs/h100_llama3_8b_vllm.yaml --rate 120 --what-if kv=fp8",
        ),
    ),
    "headroom": Command(
        "headroom_command",
        "How far a serving engine is from its critical rate, from its metrics alone.",
        ("critrate headroom http://127.0.0.1:8000 --minutes 10",),
    ),
    "history": Command(
        "history_command",
        "List, draw and compare finished experiments of a history file.",
        (
            "critrate history results/history.sqlite --plot rates.svg",
            "critrate history results/history.sqlite --add results/FOLDER",
            "critrate history results/history.sqlite --compare 3 7",
        ),
    ),
    "kv-cache": Command(
        "kv_cache_command",
        "Bytes of KV cache per token and request, and what memory holds.",
        ("critrate kv-cache", "critrate kv-cache config.json --memory 60GiB --tp 2"),
    ),
    "selftest": Command(
        "selftest_command",
        "Measure how many requests, tokens and streams this machine can take in.",
        ("critrate selftest",),
    ),
    "mock": Command(
        "mock_command",
        "A server that speaks the dialect of vLLM, or SGLang, without a GPU.",
        ("critrate mock configs/mock.yaml --port 8000",),
    ),
}


def command_of(name: str) -> Any:
    """The command itself, with all that it imports."""
    command = COMMANDS[name]
    module = import_module(f"harness.commands.{command.module}")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    examples = "\n\n".join(["Examples:", *(f"  {line}" for line in command.examples)])
    alone.command(name, epilog=examples)(getattr(module, f"{name.replace('-', '_')}_command"))
    return typer.main.get_command(alone)


class _Later(TyperCommand):
    """Stands in the list of commands for one that is not imported yet."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        return command_of(str(self.name)).make_context(info_name, args, parent, **extra)


def _nothing() -> None: ...


for _name, _command in COMMANDS.items():
    app.command(_name, cls=_Later, help=_command.line)(_nothing)


def main() -> None:
    """Entry point: errors that the user can mend are one line, without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPT_EXIT)
    except Mendable as error:
        console = Console(stderr=True)
        console.print("error ", style="red", end=" ")
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        sys.exit(USAGE_EXIT)


if __name__ == "__main__":
    main()
