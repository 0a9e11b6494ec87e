"""From runs to a verdict: stable or not for one run, confirmed or refuted for the experiment."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from analysis.calibration.pace import Pace
from analysis.inference.imbalance import Imbalance
from analysis.inference.synchrony import Synchrony
from analysis.numbers.estimate import Estimate
from analysis.verdicts.settling import Settling
from loadgen.records import LoadFidelity, Start

Outcome = Literal["confirmed", "refuted", "inconclusive", "premise_violated", "invalid"]
EXIT_CODES: dict[str, int] = {
    "confirmed": 0,
    "refuted": 10,
    "inconclusive": 11,
    "premise_violated": 12,
    "invalid": 13,
}
RunVerdict = Literal["stable", "unstable", "inconclusive", "invalid"]


def agreement(share: Estimate, theta: float) -> Literal["inside", "outside", "open"]:
    """Measured over predicted against the band [1 - theta, 1 + theta].

    "inside": the 90 % interval lies in it, an equivalence test at 5 %; "outside": the 95 % interval
    does not touch it.
    """
    inner, outer = share.at_level(0.90), share.at_level(0.95)
    if inner.low >= 1 - theta and inner.high <= 1 + theta:
        return "inside"
    return "outside" if outer.low > 1 + theta or outer.high < 1 - theta else "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunJudgement:
    """What one run says. ``drift`` is in requests per second over [warmup_s, end_s)."""

    id: str
    arrival_rate: float
    load: float
    """Offered rate over the predicted critical rate."""
    warmup_s: float
    end_s: float
    verdict: RunVerdict
    text: str
    """One clause, such as "stable (< 3.1 req/s over 40 s)" or "grows"."""
    realised_rate: float
    drift: Estimate
    stable_below: float
    """X: a run is stable when the upper 95 % bound of its drift is below this."""
    fidelity: LoadFidelity
    requests: int
    completed: int
    unfinished: int
    preemptions: int
    kv_usage: float
    running: float
    waiting: float
    backlogged: float
    """Share of the time in which the waiting queue was not empty."""
    step_time_s: Estimate | None
    pace: Pace | None
    """How a set step time was kept; None where none was set."""
    ttft_p50_s: float
    ttft_p95_s: float
    warnings: tuple[str, ...] = ()
    drift_checks: tuple[NamedEstimate, ...] = ()
    """The drift with its error by other estimators: none of them decides."""
    start: Start = "empty"
    """Before the Poisson arrivals a full start sends a burst, see `Run`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedEstimate:
    """One of several answers to the same question, with what it assumes."""

    name: str
    estimate: Estimate
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A premise or an audit: ``holds`` is None when the data cannot say."""

    name: str
    holds: bool | None
    observed: float
    threshold: float
    text: str
    """One sentence: what was compared with what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRate:
    """One of several servers behind one list of URLs: what it was predicted to serve, and served."""

    replica: int
    predicted: Estimate
    measured: Estimate | None
    """None where its queue was never non-empty for long enough."""
    bounds: bool
    """Is it among those that bound the whole under round-robin?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedObserved:
    """A row of the table that sets what the prediction assumed beside what the run showed."""

    quantity: str
    assumed: str
    observed: str
    agrees: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer of an experiment; see design "Claims, measurements, verdicts" for each outcome."""

    name: str
    mode: str
    """What kind of server answered: a real engine, an emulation, a mock."""
    claim: str
    grade: str
    theta: float
    outcome: Outcome
    headline: str
    """What follows the outcome on its line, such as "within 10 %"."""
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    predicted: Estimate
    binding: str
    """Ceiling that the prediction says binds: kv_cache, max_num_seqs or max_num_batched_tokens."""
    binding_observed: str | None
    predictions: tuple[NamedEstimate, ...]
    """Every other predictor, beside the claim."""
    measured: Estimate | None
    measurements: tuple[NamedEstimate, ...]
    """The same rate by other estimators: counting, regression, hinge."""
    ratio: Estimate | None
    gap: float | None
    """|predicted - measured| / measured."""
    runs: tuple[RunJudgement, ...]
    premises: tuple[Check, ...]
    audit: tuple[Check, ...]
    from_paper: tuple[NamedEstimate, ...]
    """Factors from the paper's rate to the measured one: those predicted, then what they leave."""
    identity: tuple[NamedEstimate, ...]
    """The three factors of measured/predicted: occupancy, step time, work not wasted."""
    table: tuple[AssumedObserved, ...]
    near_critical: tuple[Settling, ...] = ()
    """How the queue of each run within 5 % of the measured critical rate grows; empty without any."""
    warnings: tuple[str, ...] = ()
    replicas: tuple[ReplicaRate, ...] = ()
    """Each server behind one list of URLs; empty where there is one."""
    imbalance: tuple[Imbalance, ...] = ()
    """What round-robin makes of their queues, run by run."""

    synchrony: tuple[Synchrony, ...] = ()
    """Does each valid run serve in waves that last?"""
    waves: tuple[str, ...] = ()
    """What that means for the measured rate, and what mends it; empty where it means nothing."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        if not self.replicas:
            del data["replicas"], data["imbalance"]
        return {"schema": 1, "exit_code": self.exit_code, **data}
