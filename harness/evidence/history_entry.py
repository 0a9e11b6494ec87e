"""A finished experiment's folder as one row of the history."""

from __future__ import annotations

import hashlib
import json
import statistics
from typing import Any

from analysis.numbers.estimate import Estimate
from harness.configs.config import ExperimentConfig, load_config
from harness.evidence.history import LEVEL, Entry
from harness.records.store import Store
from harness.records.streams import read_lines
from harness.servers.server import url_is_loopback


def entry_of(store: Store) -> Entry:
    """The row of a folder. Raises StoreError where the experiment is not finished."""
    verdict = store.read_json("verdict.json")
    where = store.read_json("environment.json")
    limits = store.read_json("limits.json")
    law = store.read_json("calibration.json")["fit"]["law"]
    config = load_config(store.path / "config.yaml")
    predicted = Estimate.from_dict(verdict["predicted"]).at_level(LEVEL)
    measured = verdict["measured"] and Estimate.from_dict(verdict["measured"]).at_level(LEVEL)
    shown, used = limits["shown"], limits["used"]
    device, driver = _device(config, where)
    commit = where["critrate"].get("commit", "")[:12]
    return Entry(
        experiment=store.digest("environment.json"),
        began=where["wall_time"],
        name=config.name,
        config_digest=config_digest(config),
        engine=shown["engine"],
        engine_version=shown["version"],
        driver=driver,
        device=device,
        host=where["platform"],
        critrate=f"{where['critrate']['version']} {commit}".strip(),
        predicted=predicted.value,
        predicted_low=predicted.low,
        predicted_high=predicted.high,
        measured=measured.value if measured else None,
        measured_low=measured.low if measured else None,
        measured_high=measured.high if measured else None,
        b0_s=law["b0_s"],
        b1_s_per_token=law["b1_s_per_token"],
        b2_s_per_kv_token=law["b2_s_per_kv_token"],
        b3_s_per_request=law["b3_s_per_request"],
        step_s=_step_s(verdict["runs"]),
        sm_clock_mhz=_sm_clock_mhz(store),
        pool_tokens=used["num_blocks"] * used["block_size"],
        binding=verdict["binding"],
        binding_observed=verdict["binding_observed"],
        limits=json.dumps(used, sort_keys=True),
        outcome=verdict["outcome"],
        folder=str(store.path),
    )


def config_digest(config: ExperimentConfig) -> str:
    """SHA-256 of what the config states beyond the defaults, without the seed of the load.

    Comments, order and defaults that a later version adds do not change it.
    """
    stated = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    if isinstance(stated.get("load"), dict):
        stated["load"].pop("seed", None)
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _device(config: ExperimentConfig, where: dict[str, Any]) -> tuple[str, str | None]:
    """The GPUs that the engine uses with their driver, or the processor where it uses none."""
    server, gpus = config.server, where["gpu"]
    urls = [] if server is None else [server.url, *(server.urls or ())]
    if not all(url_is_loopback(url) for url in urls if url is not None):
        return "of another machine", None
    # Folders from before the choice of GPUs was recorded have those of the machine.
    chosen = where.get("engine_gpus", {"none": ""} if "none" in gpus else {"sampled": None})
    if "none" in chosen:
        cpu = where["cpu"]
        return f"{cpu['model'] or 'processor'}, {cpu['usable'] or cpu['count']} cores", None
    rows = [row for row in gpus["gpus"] if "name" in row and _is_among(row, chosen["sampled"])]
    return ", ".join(row["name"] for row in rows), gpus["driver"]


def _is_among(row: dict[str, Any], labels: list[str] | None) -> bool:
    # A label is "GPU 0" or "GPU 0 MIG instance 1".
    return labels is None or f"GPU {row['index']}" in [x.partition(" MIG")[0] for x in labels]


def _step_s(runs: list[dict[str, Any]]) -> float | None:
    timed = [run for run in runs if run["step_time_s"] is not None and run["load"] is not None]
    if not timed:
        return None
    value: float = max(timed, key=lambda run: float(run["load"]))["step_time_s"]["value"]
    return value


def _sm_clock_mhz(store: Store) -> float | None:
    clocks: list[float] = []
    for run_id in store.run_ids():
        samples, _ = read_lines(store.path / "runs" / run_id / "gpu.jsonl", dict)
        clocks += [s["sm_clock_mhz"] for s in samples if s.get("sm_clock_mhz") is not None]
    return float(statistics.median(clocks)) if clocks else None
