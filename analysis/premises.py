"""The closed list of premises, each with its numeric threshold."""

from __future__ import annotations

import math

from analysis.audit import KV_BOUND_USAGE, STEADY_TOLERANCE, Saturation, binding_resource
from analysis.evidence import Evidence
from analysis.verdict import Check


def premises(evidence: Evidence, saturated: Saturation | None) -> list[Check]:
    """Which premises held: tested on limits, counters and occupancy, never on the drift."""
    checks: list[Check] = []
    limits = evidence.limits
    if saturated is None:
        checks.append(
            Check(
                name="KV cache binds",
                holds=None,
                observed=math.nan,
                threshold=math.nan,
                text="no run kept its queue non-empty long enough to see what binds",
            )
        )
    else:
        binds = binding_resource(saturated, limits)
        checks.append(
            Check(
                name="KV cache binds",
                holds=binds == "kv_cache",
                observed=saturated.kv_usage,
                threshold=KV_BOUND_USAGE,
                text=f"{binds} binds: under backlog the KV cache was {saturated.kv_usage:.1%} full "
                f"with {saturated.running:.1f} requests running",
            )
        )
        checks.append(
            Check(
                name="steady step time",
                holds=abs(saturated.step_time_change) <= STEADY_TOLERANCE,
                observed=saturated.step_time_change,
                threshold=STEADY_TOLERANCE,
                text=f"mean step of the second half over the first: "
                f"{saturated.step_time_change:+.1%} (allowed {STEADY_TOLERANCE:.0%})",
            )
        )
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
