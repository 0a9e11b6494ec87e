"""From a results folder to a verdict and a report: works again from the files alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import yaml

from analysis.calibration.pace import Pace
from analysis.inference.gpu_health import gpu_warnings
from analysis.numbers.estimate import Estimate
from analysis.reports.report import ReportContext, report_html, report_md
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import RunFrames, run_frames
from analysis.theory.prediction import Claim, Prediction
from analysis.theory.waterfall import Mechanism
from analysis.verdicts.evidence import Evidence, MeasuredRun
from analysis.verdicts.replica_verdict import verdict_of
from analysis.verdicts.replicas import records_of, replicated, thinned, whole_run
from analysis.verdicts.verdict import Verdict
from harness.configs.config import ExperimentConfig, load_config
from harness.configs.launch import PACE_LOG
from harness.experiments.change_line import to_raise_it
from harness.records.store import Store, StoredRun, StoreError, missing
from harness.records.streams import of_replica
from loadgen.fidelity import MAX_LAG_MS, fidelity
from loadgen.records import LoadFidelity

MOST_LAG_MS = 100.0
LAG_OVER_RESIDENCE = 0.05
"""Poisson arrivals that are displaced independently stay Poisson, and N(t) counts from the schedule;
what a stall of the client can do is bunch arrivals, here by a small part of the time over which the
engine averages them. The share is a judgement, not a measurement."""


def analyse(store: Store) -> Verdict:
    """Judge what the folder holds, and write verdict.json, report.html and report.md.

    Raises StoreError when the prediction is not the one that the runs were made under.
    """
    evidence = load_evidence(store)
    verdict = verdict_of(evidence)
    store.write_json("verdict.json", verdict.to_dict())
    write_report(store, evidence, verdict)
    return verdict


def write_report(store: Store, evidence: Evidence, verdict: Verdict) -> None:
    """report.html and report.md of an analysed folder."""
    context = _context(store, evidence)
    frames = [run.frames for run in evidence.runs]
    store.write_text("report.html", report_html(verdict, frames, context))
    store.write_text("report.md", report_md(verdict, context))


def load_evidence(store: Store, claim: Claim | None = None) -> Evidence:
    """Everything that a verdict rests on, read from the folder.

    ``claim`` asks the same records about another claim than the config's: its prediction was on disk
    before the first run as well.
    """
    config = load_config(store.path / "config.yaml")
    prediction = store.read_json("prediction.json")
    digest = store.digest("prediction.json")
    for name, made_from in prediction["made_from"].items():
        if store.digest(name) != made_from:
            raise StoreError(
                f"{store.path}: {name} is not the one that the prediction was made from: restore it, "
                "inputs and thresholds are fixed before the first run"
            )
    limits = EngineLimits.from_dict(store.read_json("limits.json")["used"])
    stored = [store.read_run(run_id) for run_id in store.whole_runs()]
    for run in stored:
        if run.prediction_digest != digest:
            raise StoreError(
                f"{store.path}: run {run.run.id} was made under another prediction.json: restore "
                "that file, a prediction changed after the fact decides nothing"
            )
    if not stored:
        raise StoreError(
            f"{store.path} holds no run that came to an end: " + "; ".join(missing(store.path))
        )
    simulated = prediction.get("simulated")
    group = prediction.get("replicas")
    count = 1 if config.server is None else config.server.count
    if (count if count > 1 else None) != (group and len(group["each"])):
        raise StoreError(
            f"{store.path}: config.yaml lists {count} servers, prediction.json is of another number"
        )
    parts = [_measured(store, config, run, count) for run in stored]
    whole = Evidence(
        name=config.name,
        mode=_mode(config),
        theta=config.theta,
        prediction=Prediction.from_dict(prediction[claim or "claim"]),
        paper=Prediction.from_dict(prediction["paper"]),
        engine=Prediction.from_dict(prediction["engine"]),
        mechanisms=tuple(Mechanism(**m) for m in prediction.get("mechanisms", ())),
        simulated=None if simulated is None else Estimate.from_dict(simulated),
        limits=limits,
        workload=config.law(),
        runs=tuple(
            whole_run(own, run.run) if count > 1 else own[0]
            for own, run in zip(parts, stored, strict=True)
        ),
    )
    if group is None:
        return whole
    each = [
        (
            Prediction.from_dict(one[claim or "claim"]),
            Prediction.from_dict(one["paper"]),
            Prediction.from_dict(one["engine"]),
        )
        for one in group["each"]
    ]
    runs = [[own[i] for own in parts] for i in range(count)]
    return replicated(whole, each, runs, Estimate.from_dict(group["balanced"]))


def _pace(
    store: Store, config: ExperimentConfig, run: StoredRun, index: int = 0, count: int = 1
) -> Pace | None:
    """How one of ``count`` servers kept the step time that was set; None where none was."""
    launch = None if config.server is None else config.server.launch
    if launch is None or launch.step_time is None:
        return None
    log = of_replica(PACE_LOG, index, count)
    if not store.has(log):
        raise StoreError(f"{store.path} has no {log}: the paced engine's own record; restore it")
    lines = [json.loads(line) for line in (store.path / log).read_text().splitlines()]
    inside = [line for line in lines if run.start_ns < line["t_ns"] <= run.end_ns]
    if not inside:
        raise StoreError(
            f"{store.path}/{log} shows no step of run {run.run.id}: was the engine paced?"
        )
    took_s, law_s, steps = (sum(x[name] for x in inside) for name in ("took_s", "law_s", "steps"))
    return Pace(took_s / steps, law_s / steps)


def _measured(
    store: Store, config: ExperimentConfig, run: StoredRun, count: int
) -> list[MeasuredRun]:
    """A run as each of ``count`` servers saw it. The load is that of all, and so are its warnings and
    the GPUs', which stand with the first."""
    assert run.end is not None
    frames = _frames(run, count)
    offered, late = _offered(run, frames[0])
    found = []
    for index, own in enumerate(frames):
        warnings = list(run.warnings) if index == 0 else []
        if index == 0 and run.end["reason"] != "horizon":
            warnings.append(f"it ended early: {run.end['reason']}")
        each = run.end.get("samplers")
        # A run that ended because one of several was gone has only what was seen of that one.
        stats = each[index] if each else run.end.get("sampler") if index == 0 else None
        if stats and stats["failures"]:
            where = f"replica {index}: " if each else ""
            warnings.append(
                f"{where}{stats['failures']} of {stats['ticks']} scrapes failed "
                f"({stats['last_failure']}); the longest gap is {stats['longest_gap_s']:.1f} s"
            )
        if index == 0:
            warnings += [*gpu_warnings(own.gpu, stats or {}, run.start_ns), *late]
        found.append(
            MeasuredRun(
                frames=own,
                fidelity=offered,
                overrun=_overrun(config, own),
                warnings=tuple(warnings),
                pace=_pace(store, config, run, index, count),
            )
        )
    return found


def _frames(run: StoredRun, count: int) -> list[RunFrames]:
    """The records of each server; the GPUs' stand with the first.

    Raises StoreError where samples lack.
    """
    if count == 1:
        return [run_frames(run.run, run.start_ns, run.end_ns, run.records, run.samples, run.gpu)]
    if len(run.by_replica) != count:
        raise StoreError(
            f"run {run.run.id} has samples of {len(run.by_replica)} servers, config.yaml lists {count}: "
            "restore its engine-<i> streams"
        )
    return [
        run_frames(
            thinned(run.run, index, count),
            run.start_ns,
            run.end_ns,
            records_of(run.records, index, count),
            samples,
            run.gpu if index == 0 else (),
        )
        for index, samples in enumerate(run.by_replica)
    ]


def _overrun(config: ExperimentConfig, frames: RunFrames) -> float | None:
    """Share of a mock server's steps that ran late."""
    if config.server is None or config.server.mock is None or len(frames.engine) < 2:
        return None
    counted = frames.engine[["overrun_steps", "steps"]].iloc[[0, -1]].diff().iloc[-1]
    return float(counted["overrun_steps"] / max(counted["steps"], 1.0))


def _offered(run: StoredRun, frames: RunFrames) -> tuple[LoadFidelity, list[str]]:
    """Was the load what it claims, and a warning where it was late; ``frames`` tell a residence."""
    requests = frames.requests
    residence_s = float((requests["last_token_s"] - requests["first_token_s"]).median())
    share_ms = min(LAG_OVER_RESIDENCE * residence_s * 1e3, MOST_LAG_MS)
    max_lag_ms = max(MAX_LAG_MS, share_ms)
    offered = fidelity(run.run, run.records, frames.end_s, run.start_ns, max_lag_ms)
    if offered.lag_p99_ms <= MAX_LAG_MS:
        return offered, []
    return offered, [
        f"1 % of the requests were sent more than {offered.lag_p99_ms:.0f} ms "
        f"late (worst {offered.lag_max_ms:.0f} ms, allowed {max_lag_ms:.0f} ms, 5 % of a "
        "residence): give the client cores of its own"
    ]


def _context(store: Store, evidence: Evidence) -> ReportContext:
    config = load_config(store.path / "config.yaml")
    calibration = store.read_json("calibration.json") if store.has("calibration.json") else None
    return ReportContext(
        title=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=store.read_json("environment.json"),
        limits=store.read_json("limits.json"),
        calibration=calibration,
        config=yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False),
        missing=tuple(m for m in missing(store.path) if "verdict" not in m),
        workload=_workload(evidence),
        to_raise=to_raise_it(store),
    )


def _mode(config: ExperimentConfig) -> str:
    if config.server is not None and config.server.mock is not None:
        return "mock server: the scheduler is the model's, the step time is set"
    if config.server is not None and config.server.launch is not None:
        if not config.server.emulated:
            return "a real engine, started for the run"
        return "emulation: the scheduler is real, the time is set"
    return "a running server, driven over HTTP"


def _workload(evidence: Evidence) -> dict[str, Any]:
    law = evidence.workload
    more = f"{law.mean(law.max_tokens):.2f} tokens, more than the output"
    return {
        "name": law.name,
        "source": law.source,
        "mean prompt": f"{law.mean(law.prompt_tokens):.2f} tokens",
        "mean output": f"{law.mean(law.output_tokens):.2f} tokens",
        "largest prompt + output": f"{int((law.prompt_tokens + law.output_tokens).max())} tokens",
        "mean declared max_tokens": more if law.declares_more else "the output length",
        "ignore_eos": law.ignore_eos,
        "notes": "; ".join(law.notes) or "none",
    }
