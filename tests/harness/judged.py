"""A results folder as a paced engine would leave it, its records from the scheduler model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import Simulation, simulate
from analysis.schedulers.step_time import exact_step_time
from analysis.verdicts.judge import judge
from harness.configs.config import ExperimentConfig, load_config
from harness.experiments.analyse import load_evidence
from harness.experiments.predict import predictions
from harness.records.store import INPUTS, Store
from loadgen.arrivals import run_arrivals
from loadgen.records import Run

LOADS = (0.85, 1.25)
HORIZON_S = 30.0
BLOCK_SIZE = 32


def judged_folder(path: Path, pool_tokens: int = 4096, **law_terms: float) -> Store:
    """The experiment is named as its folder; ``law_terms`` as in a config, 20 ms without any.

    Predictions know the law. The pace is kept, and its record tells the tokens of each second.
    """
    store = Store.create(path)
    limits = EngineLimits(
        num_blocks=pool_tokens // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_num_seqs=256,
        max_num_batched_tokens=512,
    )
    launch = {
        "environment": "vllm-cpu",
        "pool_tokens": pool_tokens,
        "block_size": BLOCK_SIZE,
        "step_time": law_terms or {"b0_ms": 20.0},
    }
    config = {
        "name": path.name,
        "server": {"launch": launch},
        "workload": {"uniform": {"prompt": [32, 96], "output": [32, 96]}},
    }
    store.write_text("config.yaml", yaml.safe_dump(config))
    settings = load_config(path / "config.yaml")
    store.write_json("limits.json", {"used": asdict(limits)})
    store.write_json("environment.json", {})
    assert settings.server is not None and settings.server.launch is not None
    assert settings.server.launch.step_time is not None
    law = settings.server.launch.step_time.law()
    fit = exact_step_time(law)
    store.write_json("calibration.json", {"fit": asdict(fit)})
    found = predictions(settings, settings.law(), limits, fit, "P1", False)
    found["made_from"] = {name: store.digest(name) for name in INPUTS}
    store.write_json("prediction.json", found)
    rate = found["engine"]["critical_rate"]["value"]
    runs = [
        Run(id=f"{i:02d}", arrival_rate=load * rate, horizon_s=HORIZON_S, warmup_s=6.0, seed=i)
        for i, load in enumerate(LOADS)
    ]
    store.write_json("plan.json", {"runs": [asdict(run) for run in runs]})
    lines = []
    for index, run in enumerate(runs):
        seen = simulated(settings, limits, run)
        start_ns = round((1 + index * 2 * HORIZON_S) * 1e9)
        store.begin_run(run, start_ns, "", store.digest("prediction.json"))
        with store.stream(run.id, "requests") as stream:
            for record in seen.records:
                moved = {
                    name: None if at is None else at + start_ns
                    for name in ("scheduled_ns", "sent_ns", "first_token_ns", "last_token_ns")
                    for at in (getattr(record, name),)
                }
                stream.write(replace(record, **moved))
        with store.stream(run.id, "engine") as stream:
            for sample in seen.samples:
                at_ns = start_ns + sample.t_ns
                stream.write(replace(sample, t_ns=at_ns, read_ns=at_ns))
        end_ns = start_ns + round(HORIZON_S * 1e9)
        store.end_run(run.id, end_ns, "horizon")
        lines += [
            {"t_ns": start_ns - 1, "steps": 50, "law_s": 1.0, "took_s": 1.0, "own_s": 0.3},
            *_paced(seen.steps.start_s, seen.steps.duration_s, start_ns),
            {"t_ns": end_ns + 1, "steps": 50, "law_s": 1.0, "took_s": 1.0, "own_s": 0.3},
        ]
    store.write_text("pace.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    store.write_json("verdict.json", judge(load_evidence(store)).to_dict())
    return store


def simulated(settings: ExperimentConfig, limits: EngineLimits, run: Run) -> Simulation:
    """What the scheduler model makes of a run, under the law that is set."""
    assert settings.server is not None and settings.server.launch is not None
    assert settings.server.launch.step_time is not None
    arrival_s = run_arrivals(run)
    lengths = settings.law().sample(np.random.default_rng([run.seed, 1]), len(arrival_s))
    law = settings.server.launch.step_time.law()
    return simulate(limits, law, arrival_s, lengths, run.horizon_s)


def _paced(
    start_s: NDArray[np.float64], duration_s: NDArray[np.float64], start_ns: int
) -> list[dict[str, float]]:
    """The record of a pace that was kept: a line for every 50 steps."""
    lines = []
    for i in range(0, len(start_s) - 49, 50):
        law_s, end_s = float(duration_s[i : i + 50].sum()), start_s[i + 49] + duration_s[i + 49]
        t_ns = start_ns + round(1e9 * end_s)
        lines.append({"t_ns": t_ns, "steps": 50, "law_s": law_s, "took_s": law_s, "own_s": 0.3})
    return lines
