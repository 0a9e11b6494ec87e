"""The first minutes on a GPU node: what was measured of the card, what that predicts, one short run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text
from analysis.theory.roofline import Rates
from harness.configs.config import ConfigError, ExperimentConfig
from harness.configs.hardware import measured_rates
from harness.configs.launch import ENGINE_SIDE, LaunchConfig, place
from harness.configs.offline import stated
from harness.experiments.predict import claimed, stated_limits, stated_step_time
from harness.live.readiness import Check, State, first_run

PROBE_TIMEOUT_S = 120.0
GRACE_S = 90.0
"""For the best verdict so far, and the end of the engine."""
LAST_LINES = 8


def probe(launch: LaunchConfig, file: Path, timeout_s: float = PROBE_TIMEOUT_S) -> Check:
    """Bandwidth and arithmetic of the first GPU as the engine's own torch sees it, into ``file``."""
    python = place(launch, 0, Path("pace")).python
    mend = "the engine's torch and the driver must fit: nvidia-smi shows the newest CUDA it can run"
    try:
        done = subprocess.run(
            [python, ENGINE_SIDE / "bandwidth_probe.py"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Check("bandwidth", "missing", f"torch did not answer in {timeout_s:g} s", mend)
    if done.returncode:
        return Check("bandwidth", "missing", _last(done.stderr, 1), mend)
    file.write_text(done.stdout)
    try:
        rates = measured_rates(file)
    except ConfigError as error:
        return Check("bandwidth", "missing", str(error), mend)
    return Check("bandwidth", "ok", f"{rates_text(rates)}, in {file}")


def rates_text(rates: Rates) -> str:
    """Bandwidth and arithmetic in the units of data sheets."""
    return (
        f"{rates.bandwidth_bytes_per_s / 1e12:.2f} TB/s, "
        f"{rates.arithmetic_flop_per_s / 1e12:.0f} TFLOP/s in bfloat16 ({rates.source})"
    )


def p0_text(config: ExperimentConfig, measured: Rates | None = None) -> str:
    """The claim's rate at grade P0, with its step time at saturation. Raises ConfigError."""
    without = stated(config)
    workload, limits = without.estimated_law(), stated_limits(without)
    fit = stated_step_time(without, measured)
    found = claimed(without, workload, limits, fit, "P0")
    return (
        f"{estimate_text(found.critical_rate)}, bound by {found.binding}, steps of "
        f"{estimate_text(found.step_time_s)}: {fit.method}"
    )


def run_first(config: ExperimentConfig, folder: Path, seconds: float) -> Check:
    """`critrate run` on the short form of a config, in ``folder``, ended after so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(first_run(config), sort_keys=False))
    results = folder / "results"
    command = [sys.executable, "-m", "harness.cli", "run", str(file), "--out", str(results)]
    said = bounded(command, seconds, folder / "output.txt")
    return first_verdict(results, said, folder)


def bounded(
    command: Sequence[str], seconds: float, output: Path, grace_s: float = GRACE_S
) -> str | None:
    """Run to the end, or ask it to end after so many seconds; None, or how it had to be ended.

    What it prints goes to ``output``. SIGTERM gives a run the time for a verdict of what it has and for
    stopping its engine; unlike an interrupt it is heard in a background job too.
    """
    with output.open("w") as file:
        process = subprocess.Popen(list(command), stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(seconds, 0.0))
            return None
        except subprocess.TimeoutExpired:
            process.terminate()
        except KeyboardInterrupt:
            # It was sent to the whole foreground group.
            process.wait(grace_s)
            raise
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "killed: look for an engine that was left behind (nvidia-smi)"
    return f"ended after {seconds:.0f} s"


def first_verdict(results: Path, ended: str | None, folder: Path) -> Check:
    """What the short run says of the node: its verdict is not that of the config's experiment."""
    suffix = "" if ended is None else f" ({ended})"
    file = results / "verdict.json"
    if not file.exists():
        output = folder / "output.txt"
        said = _last(output.read_text(), LAST_LINES) if output.exists() else "nothing"
        return Check(
            "first run", "missing", f"no verdict{suffix}: {said}", f"see {results / 'engine.log'}"
        )
    verdict: dict[str, Any] = json.loads(file.read_text())
    found = f"{verdict['outcome']}{suffix}"
    for name in ("predicted", "measured"):
        if verdict.get(name) is not None:
            found += f", {name} {estimate_text(Estimate.from_dict(verdict[name]))}"
    if verdict["outcome"] == "invalid":
        reasons = "; ".join(map(str, verdict.get("reasons", [])))
        return Check("first run", "missing", f"{found}: {reasons}", f"see {results / 'report.md'}")
    state: State = "warning" if verdict["outcome"] in ("refuted", "premise_violated") else "ok"
    return Check("first run", state, found, f"see {results / 'report.md'}")


def _last(text: str, lines: int) -> str:
    kept = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " | ".join(kept[-lines:]) or "nothing was printed"


def seconds_left(begin_s: float, budget_s: float) -> float:
    """Of a budget that began at ``begin_s`` on the monotonic clock."""
    return budget_s - (time.monotonic() - begin_s)
