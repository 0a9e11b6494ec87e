"""Simulated runs of which theory says whether waves last, for the error rates of the detector."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from analysis.inference.synchrony import Synchrony, synchrony
from analysis.schedulers.step_time import exact_step_time
from analysis.theory.congestion import bell
from analysis.theory.critical_rate import predict
from analysis.theory.spectrum import Root, largest_root, survival_weights
from harness.rehearsals.error_rates import LAW, SETTINGS, Setting
from harness.rehearsals.rehearsal import SimulatedServer, offered
from loadgen.records import Run
from loadgen.workload import fixed, stated, uniform

REQUESTS = 1500
"""Arrivals after the warm-up: at three loads, what an experiment offers."""
WARM_UP_RESIDENCES = 3.0
FIRST_SEED = 700_000_000
"""Far from the seeds of other benches."""


def _alike() -> tuple[Setting, ...]:
    """Settings whose outputs are all alike."""
    vllm, sglang = SETTINGS["wide"].server.limits, SETTINGS["SGLang"].server.limits
    slots = SETTINGS["sequence-bound"].server.limits
    wide_prompts = uniform((16, 112), (64, 64))
    return (
        SETTINGS["fixed"],
        Setting("fixed, long outputs", fixed(20, 200), SimulatedServer(vllm, LAW)),
        Setting("fixed outputs alone", wide_prompts, SimulatedServer(vllm, LAW)),
        Setting("fixed, noisy steps", fixed(64, 64), SimulatedServer(vllm, LAW, noise=0.1)),
        Setting("fixed, sequence-bound", fixed(64, 64), SimulatedServer(slots, LAW)),
        Setting("SGLang, fixed", fixed(64, 64), SimulatedServer(sglang, LAW)),
        Setting("SGLang, long outputs", fixed(20, 200), SimulatedServer(sglang, LAW)),
        Setting(
            "SGLang, large pool",
            fixed(64, 64),
            SimulatedServer(replace(sglang, num_blocks=16_384), LAW),
        ),
    )


SPREAD = "output CV "
ALIKE = {setting.name: setting for setting in _alike()}
"""Theory: no wave dies out once the server is saturated."""
EDGE = {"long outputs": SETTINGS["long outputs"]}
"""Theory: waves just grow; nothing that the detector says of so small a pool is wrong."""
WIDE = {name: s for name, s in SETTINGS.items() if name not in ALIKE and name not in EDGE}
"""Theory: every wave dies out."""


@dataclass(frozen=True)
class Job:
    """``count`` runs of a setting at a load in predicted critical rates, seeds from ``first_seed``."""

    setting: str
    load: float
    first_seed: int
    count: int
    requests: int = REQUESTS


def spread_name(cv: float) -> str:
    """Name of the setting with bell-shaped outputs of this CV."""
    return f"{SPREAD}{cv:g}"


@cache
def setting_named(name: str) -> Setting:
    """One of `ALIKE`, `EDGE` or `WIDE`, or what `spread_name` names.

    The latter: outputs of mean 64 beside prompts of 64.
    """
    if not name.startswith(SPREAD):
        return (ALIKE | EDGE | WIDE)[name]
    outputs, shares = bell(64, float(name.removeprefix(SPREAD)))
    law = stated(np.full(len(outputs), 64), outputs, shares, name=name)
    return Setting(name, law, SETTINGS["wide"].server)


def words(job: Job) -> list[Synchrony]:
    """The detector's word about each run."""
    setting = setting_named(job.setting)
    return [one_word(setting, job.load, job.first_seed + i, job.requests) for i in range(job.count)]


def one_word(setting: Setting, load: float, seed: int, requests: int = REQUESTS) -> Synchrony:
    """The detector's word about a run at ``load`` of the predicted critical rate."""
    rate, residence_s = _predicted(setting.name)
    warmup_s = WARM_UP_RESIDENCES * residence_s
    run = Run(
        id=f"{load:.2f}",
        arrival_rate=load * rate,
        horizon_s=warmup_s + requests / rate,
        warmup_s=warmup_s,
        seed=FIRST_SEED + seed,
    )
    measured = offered(setting.server, setting.workload, run, test_load=False)
    return synchrony(measured.frames, load)


@cache
def _predicted(name: str) -> tuple[float, float]:
    """Critical rate, req/s, and longest residence, seconds, by the closed form."""
    setting = setting_named(name)
    law = exact_step_time(setting.server.law)
    found = predict(setting.workload, setting.server.limits, law, "engine", "P0")
    return found.critical_rate.value, found.longest_residence_s


def root_of(setting: Setting) -> tuple[Root, float]:
    """Largest root of the spectrum of a saturated server, and what is left of its wave after a mean
    residence.

    Of what binds: KV tokens; slots (`max_num_seqs`, a reservation of the whole output); the
    token budget, of which a request takes its prompt and then one token in each step.
    """
    law, limits = setting.workload, setting.server.limits
    prompts = np.asarray(law.prompt_tokens, dtype=float)
    outputs = np.asarray(law.output_tokens)
    shares = np.asarray(law.weight, dtype=float)
    binds = predict(law, limits, exact_step_time(setting.server.law), "engine", "P0").binding
    if binds == "kv_cache":
        weights = survival_weights(prompts, outputs, shares, first=0)
    elif binds == "output_reservation":
        weights = survival_weights(prompts, outputs, shares, reserved_tokens=outputs.astype(float))
    else:
        weights = survival_weights(1.0, outputs, shares, reserved_tokens=np.zeros(len(outputs)))
    if binds == "max_num_batched_tokens":
        weights[0] = law.mean(prompts)
    root = largest_root(weights)
    return root, root.modulus ** law.mean(law.output_tokens)
