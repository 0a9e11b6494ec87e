"""What waves do to a measured rate, and what would mend them, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.inference.synchrony import Synchrony, synchrony
from analysis.numbers.formatting import load_label
from analysis.theory.congestion import tabled_critical_cv
from analysis.theory.kv_demand import kv_demand_blocks
from analysis.verdicts.audit import binding_resource
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.run_verdict import Capacity


def words_about_runs(evidence: Evidence) -> tuple[Synchrony, ...]:
    """Is each valid run synchronised? In their order."""
    predicted = evidence.prediction.critical_rate.value
    return tuple(
        synchrony(run.frames, run.frames.run.arrival_rate / predicted)
        for run in evidence.runs
        if run.valid
    )


def wave_warnings(
    found: Sequence[Synchrony], capacities: Sequence[Capacity], evidence: Evidence
) -> tuple[str, ...]:
    """What to know of a rate measured in ``capacities``, where any of these runs is synchronised."""
    used = {c.run.frames.run.id: c for c in capacities}
    locked = [f for f in found if f.word == "synchronised" and f.run in used]
    if not locked:
        return ()
    loads = ", ".join(load_label(f.load) for f in locked)
    first = locked[0]
    period = first.period_s or 0.0
    return (
        f"synchronised at {loads}: requests leave in waves, one each {period:.3g} s, that may outlast a "
        "run. The interval of the measured rate holds for the waves of these runs; after another start "
        "they may be others, and the rate another",
        f"to mend the waves: {mend(evidence, used[first.run])}",
    )


def mend(evidence: Evidence, seen: Capacity) -> str:
    """Output lengths that differ, or admissions at the eviction-free rate x*, each with its number."""
    law, limits = evidence.workload, evidence.limits
    outputs, prompts = law.output_tokens.astype(float), law.prompt_tokens.astype(float)
    mean = law.mean(outputs)
    spread = law.mean((outputs - mean) ** 2) ** 0.5 / mean
    binds = binding_resource(seen.saturated, limits)
    if binds != "kv_cache":
        return f"output lengths that differ (their CV is {spread:.2f})"
    enough = tabled_critical_cv(law.mean(prompts), mean)
    blocks = np.asarray(
        kv_demand_blocks(
            law.prompt_tokens,
            law.output_tokens,
            int(prompts.max()),
            limits.block_size,
            limits.async_scheduling,
        ),
        dtype=float,
    )
    per_step = limits.pool_tokens / law.mean(blocks)
    per_second = per_step / seen.saturated.step_time.value
    return (
        f"output lengths with a CV above {enough:.2f} (it is {spread:.2f}), or at most {per_step:.3g} "
        f"admissions a step, {per_second:.3g} req/s evenly spaced (x* = pool / E[KV demand])"
    )
