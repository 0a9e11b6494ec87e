"""The closed list of premises, each with its numeric threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping

from analysis.theory.set_aside import RESERVED_SHARE
from analysis.verdicts.audit import Saturation, binding_resource
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.steadiness import steady
from analysis.verdicts.verdict import Check

PREFIX_HIT_SHARE = 0.02
"""Share of prompt tokens from the cache that moves the critical rate by no more."""


def premises(
    evidence: Evidence, longest: Saturation | None, saturated: Mapping[str, Saturation]
) -> list[Check]:
    """Which premises held: tested on limits, counters and occupancy, never on the drift.

    ``saturated`` are all backlogged stretches by their runs' ids, ``longest`` is the longest of them.
    """
    checks = [_kv_binds(evidence, longest), _no_reservation(evidence, longest)]
    if saturated:
        frames = {run.frames.run.id: run.frames for run in evidence.runs}
        checks.append(steady(saturated, frames, evidence.theta))
    checks.append(_no_prefix_hits(evidence))
    for name, seen, meaning in (
        ("no rejections", _counted(evidence, "rejected"), "requests that the server refused"),
        (
            "exact lengths",
            _inexact(evidence),
            "requests that ended at another than the asked length",
        ),
    ):
        checks.append(
            Check(
                name=name, holds=seen == 0, observed=seen, threshold=0, text=f"{seen:.0f} {meaning}"
            )
        )
    return checks


def _no_prefix_hits(evidence: Evidence) -> Check:
    """Two random prompts may begin alike: a token of each prompt is no shared prefix."""
    hits, prompts = _counted(evidence, "prefix_hit_tokens"), _counted(evidence, "prompt_tokens")
    share = hits / max(prompts, 1.0)
    return Check(
        name="no prefix hits",
        holds=share <= PREFIX_HIT_SHARE,
        observed=share,
        threshold=PREFIX_HIT_SHARE,
        text=f"{hits:.0f} of {prompts:.0f} prompt tokens came from the cache, {100 * share:.2g} % "
        f"(allowed {100 * PREFIX_HIT_SHARE:.0f} %)",
    )


def _counted(evidence: Evidence, column: str) -> float:
    """By how much a counter of the engine rose over all runs."""
    return sum(
        float(run.frames.per_sample(column)[-1] - run.frames.per_sample(column)[0])
        for run in evidence.runs
        if len(run.frames.engine)
    )


def _inexact(evidence: Evidence) -> float:
    """Completed requests of another length than the designed one, by what the client received."""
    seen = 0
    for run in evidence.runs:
        got, designed = (
            run.frames.per_request(column) for column in ("output_tokens", "output_tokens_designed")
        )
        seen += int((got != designed)[run.frames.completed].sum())
    return float(seen)


def _kv_binds(evidence: Evidence, saturated: Saturation | None) -> Check:
    name = "KV cache binds"
    if saturated is None:
        text = "no run kept its queue non-empty long enough to see what binds"
        return Check(name=name, holds=None, observed=math.nan, threshold=math.nan, text=text)
    binds = binding_resource(saturated, evidence.limits)
    return Check(
        name=name,
        holds=binds in ("kv_cache", "output_reservation"),
        observed=saturated.kv_usage,
        threshold=saturated.full_at,
        text=f"{binds} binds: under backlog the KV cache was {100 * saturated.kv_usage:.1f} % full "
        f"with {saturated.running:.1f} requests running",
    )


def _no_reservation(evidence: Evidence, saturated: Saturation | None) -> Check:
    name = "no output reservation"
    if evidence.limits.sglang is None:
        text = "the engine sets no room aside for outputs"
        return Check(name=name, holds=True, observed=0.0, threshold=RESERVED_SHARE, text=text)
    if saturated is None:
        text = "no run kept its queue non-empty long enough to see what is set aside"
        return Check(name=name, holds=None, observed=math.nan, threshold=RESERVED_SHARE, text=text)
    return Check(
        name=name,
        holds=saturated.set_aside <= RESERVED_SHARE,
        observed=saturated.set_aside,
        threshold=RESERVED_SHARE,
        text=f"under backlog {100 * saturated.set_aside:.1f} % of the pool was set aside for "
        f"outputs to come (allowed {100 * RESERVED_SHARE:.0f} %), beside the "
        f"{100 * saturated.kv_usage:.1f} % in use",
    )
