"""The command ``explain``: what lies between the paper's formula and the measured rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from analysis.numbers.formatting import grouped
from analysis.reports.explain_text import explanation_text
from analysis.reports.figures_of_explain import explanation_png, explanation_svg
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.explain import Explanation
from harness.evidence.evidence_rows import read_row
from harness.exits import CANNOT_SAY_EXIT
from harness.records.store import Store
from harness.records.streams import finite

FIGURES = ("explain.png", "explain.svg")
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


def explain_command(
    folder: Annotated[Path, typer.Argument(help="a results folder")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only, no figure")] = False,
) -> None:
    """Split measured over the paper's rate into its causes, in words and as explain.png and explain.svg.
    Exit status: 0, 11 cannot say, 2 usage."""
    store = Store.open(folder)
    found, about = explained(store)
    if as_json:
        plain = json.loads(json.dumps({"about": about, **found.to_dict()}))
        print(json.dumps(finite(plain), indent=2))
    else:
        console = Console()
        console.print(explanation_text(found, about), highlight=False, soft_wrap=True)
        if found.unexplained is not None:
            (store.path / FIGURES[0]).write_bytes(explanation_png(found, about))
            store.write_text(FIGURES[1], explanation_svg(found, about))
            console.print(f"figure      {store.path / FIGURES[0]}", highlight=False, soft_wrap=True)
    raise typer.Exit(CANNOT_SAY_EXIT if found.cannot_say else 0)


def explained(store: Store) -> tuple[Explanation, tuple[str, ...]]:
    """The explanation of a results folder, and lines that say what was measured there.

    Raises StoreError where a file is missing or is not the one that the prediction was made from.
    """
    row = read_row(store.path)
    about = _about(store.read_json("limits.json")["shown"], row.evidence)
    if row.servers > 1:
        about = (*about, f"rates and causes are of replica {row.server}, one of {row.servers}")
    return row.explanation, about


def _about(shown: dict[str, Any], evidence: Evidence) -> tuple[str, ...]:
    """Engine, model and pool; lengths and rates offered; what kind of server it was."""
    limits, law = evidence.limits, evidence.workload
    engine = f"{ENGINES.get(shown['engine'], shown['engine'])} {shown.get('version') or ''}".strip()
    pool = f"KV cache of {grouped(limits.pool_tokens)} tokens"
    if limits.block_size > 1:
        pool += f" in blocks of {limits.block_size}"
    rates = sorted({run.frames.run.arrival_rate for run in evidence.runs})
    offered = ", ".join(f"{rate:.3g}" for rate in rates)
    return (
        f"{engine}, model {shown['model_id']}, {pool}",
        f"lengths {law.name}; Poisson arrivals at {offered} req/s",
        evidence.mode,
    )
