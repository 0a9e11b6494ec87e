"""The closed list of premises, each with its numeric threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.audit import KV_BOUND_USAGE, STEADY_TOLERANCE, Saturation, binding_resource
from analysis.evidence import Evidence
from analysis.verdict import Check


def premises(
    evidence: Evidence, longest: Saturation | None, saturated: Sequence[Saturation]
) -> list[Check]:
    """Which premises held: tested on limits, counters and occupancy, never on the drift.

    ``saturated`` are all backlogged stretches, ``longest`` is the longest of them.
    """
    checks = [_kv_binds(evidence, longest)]
    if longest is not None:
        checks.append(_steady(saturated))
    for name, column, meaning in (
        ("no prefix hits", "prefix_hit_tokens", "prompt tokens served from the prefix cache"),
        ("no rejections", "rejected", "requests that the server refused"),
        ("exact lengths", "truncated", "requests that ended before the asked length"),
    ):
        seen = sum(
            float(run.frames.engine[column].iloc[-1] - run.frames.engine[column].iloc[0])
            for run in evidence.runs
            if len(run.frames.engine)
        )
        checks.append(
            Check(
                name=name, holds=seen == 0, observed=seen, threshold=0, text=f"{seen:.0f} {meaning}"
            )
        )
    return checks


def _kv_binds(evidence: Evidence, saturated: Saturation | None) -> Check:
    name = "KV cache binds"
    if saturated is None:
        text = "no run kept its queue non-empty long enough to see what binds"
        return Check(name=name, holds=None, observed=math.nan, threshold=math.nan, text=text)
    binds = binding_resource(saturated, evidence.limits)
    return Check(
        name=name,
        holds=binds == "kv_cache",
        observed=saturated.kv_usage,
        threshold=KV_BOUND_USAGE,
        text=f"{binds} binds: under backlog the KV cache was {100 * saturated.kv_usage:.1f} % full "
        f"with {saturated.running:.1f} requests running",
    )


def _steady(saturated: Sequence[Saturation]) -> Check:
    """Under backlog the batch is always as full, so that its mean step should not change."""
    halves = [step for s in saturated for step in s.step_halves_s]
    change = max(halves) / min(halves) - 1.0
    return Check(
        name="steady step time",
        holds=change <= STEADY_TOLERANCE,
        observed=change,
        threshold=STEADY_TOLERANCE,
        text=f"mean steps in the halves of {len(saturated)} backlogged runs: "
        f"{min(halves) * 1e3:.2f} to {max(halves) * 1e3:.2f} ms, {100 * change:.1f} % apart "
        f"(allowed {100 * STEADY_TOLERANCE:.0f} %)",
    )
