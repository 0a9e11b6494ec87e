"""What is predicted before the first run, as a record that goes to disk and back unchanged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from analysis.numbers.estimate import Estimate

Claim = Literal["paper", "engine"]
Grade = Literal["P0", "P1", "P2", "P3"]
CeilingName = Literal["kv_cache", "output_reservation", "max_num_seqs", "max_num_batched_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Requests per step that one resource alone would allow; None if its size is unknown."""

    name: CeilingName
    requests_per_step: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The critical arrival rate of a server and the numbers that it rests on.

    Rates are of all replicas together; everything per step or about one engine is of one replica.
    Every estimate has the level 0.95 or is exact.
    """

    claim: Claim
    grade: Grade
    critical_rate: Estimate
    """req/s that the server can complete under sustained overload."""
    lower: float
    """req/s: the critical rate times (1 - delta), the sufficient condition of the paper."""
    delta: float
    """Largest total length over the KV cache, sup(s+o)/M."""
    binding: CeilingName
    ceilings: tuple[Ceiling, ...]
    kv_demand: Estimate
    """E[g], token-steps per request, in the convention of the claim."""
    step_time_s: Estimate
    """Mean duration of a step at saturation."""
    running: float
    """Mean number of running requests at saturation."""
    mean_residence_s: float
    """Mean time from admission to departure at saturation."""
    longest_residence_s: float
    settling_s: float
    """After an idle time the scheduler remembers it, or equal outputs stay in step, for so long."""
    recomputed_tokens: float
    """Tokens per request that are computed again after preemptions, at saturation."""
    under_fill: float
    """Requests per step over those of the lowest ceiling: at most 1."""
    onset_rate: Estimate | None
    """req/s at which the KV cache is full 5 % of the time; None if another ceiling comes first."""
    replicas: int
    workload: str
    inputs_digest: str
    """Hash of workload, limits and step-time law."""
    notes: tuple[str, ...]

    @property
    def bracket(self) -> tuple[float, float]:
        """[mu(1 - delta), mu], req/s: where the paper proves nothing."""
        return self.lower, self.critical_rate.value

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal prediction back."""
        data: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            data[name] = value.to_dict() if isinstance(value, Estimate) else value
        data["notes"] = list(self.notes)
        data["ceilings"] = [
            {
                "name": c.name,
                "requests_per_step": c.requests_per_step and c.requests_per_step.to_dict(),
            }
            for c in self.ceilings
        ]
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Prediction:
        fields = dict(data)
        for name in ("critical_rate", "kv_demand", "step_time_s"):
            fields[name] = Estimate.from_dict(fields[name])
        fields["onset_rate"] = _optional(fields["onset_rate"])
        fields["notes"] = tuple(fields["notes"])
        fields["ceilings"] = tuple(
            Ceiling(name=c["name"], requests_per_step=_optional(c["requests_per_step"]))
            for c in fields["ceilings"]
        )
        return Prediction(**fields)


def digest(prediction: Prediction) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal: each run carries it."""
    text = json.dumps(prediction.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _optional(data: dict[str, Any] | None) -> Estimate | None:
    return None if data is None else Estimate.from_dict(data)
