"""From the paper's rate to the measured one in small steps, each with its error.

A rate is 1 / (w @ b): b the calibrated coefficients of step time, w what one request takes of them
(theory.md 2.5). The walk changes w: from the paper's way to count, by what the pool held under backlog,
to the requests that were served per step. Its last step is from the law's step time to the measured one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import normal_quantile, student_quantile
from analysis.schedulers.step_time import StepTimeFit
from analysis.theory.operating_point import (
    RECOMPUTE_ERROR,
    RECOMPUTE_ERROR_FIXED,
    forms_cohorts,
    paper_point,
)
from analysis.theory.waterfall import Counting, countings, steps_and_sums
from analysis.verdicts.evidence import Evidence, work_demand
from analysis.verdicts.identity import WASTED, Books, books
from analysis.verdicts.run_verdict import Capacity, independent_batches

Floats = NDArray[np.float64]

WASTED_ERROR = 0.1
"""Standard deviation of `identity.WASTED`."""
NO_EFFECT = 1e-9


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the backlogged windows, or over parts of them."""

    seconds: float
    work: float
    """KV demand served, token-steps in the convention of `work.kv_work`."""
    steps: float
    decode_steps: float
    """Steps from one token of a request to its next; fewer where prompts have steps of their own."""
    usage: float
    """Mean share of the pool in use."""
    set_aside: float
    completed: float


@dataclass(frozen=True, eq=False)
class Walk:
    """What one engine showed in its backlogged windows, and what its prediction was made with.

    ``binds`` is what refused requests (`analysis.verdicts.audit.binding_resource`), ``chunk`` that
    of the paper's form; ``recomputed_tokens`` per request is None where nothing counted them.
    """

    evidence: Evidence
    fit: StepTimeFit
    chunk: int
    measured: Estimate
    backlogged: Sequence[Capacity]
    binds: str
    recomputed_tokens: float | None = None

    @cached_property
    def countings(self) -> tuple[Counting, ...]:
        """From the paper's way to count KV to the engine's."""
        return countings(self.evidence.workload, self.evidence.limits)

    @cached_property
    def demand(self) -> float:
        """Mean work of a request of the offered law, token-steps in the convention of `Totals.work`."""
        return self.evidence.workload.mean(work_demand(self.evidence.workload))

    @cached_property
    def books(self) -> list[Books]:
        """Of each window, in parts of two residences or more as far as there are five."""
        found = []
        for c in self.backlogged:
            residences = c.saturated.window.duration_s / c.run.frames.mean_residence_s
            parts = independent_batches(residences)
            found.append(books(c.run.frames, c.saturated, parts, self._refill_s))
        return found

    @property
    def _refill_s(self) -> float:
        """What a poolful of prompts adds to a step, in seconds; 0 where steps are not so filled."""
        limits = self.evidence.limits
        if limits.sglang is not None or self.binds != "kv_cache":
            return 0.0
        return self.fit.law.b1_s_per_token * limits.pool_tokens

    @cached_property
    def parts(self) -> Floats:
        """Seconds, work, steps, decode steps, usage and room set aside times seconds, and completions of
        all parts of all windows, shape (7, parts)."""
        rows = []
        for c, b in zip(self.backlogged, self.books, strict=True):
            seconds = np.diff(b.edges_s)
            decode_steps = b.steps / c.saturated.steps_per_decode
            aside = c.saturated.set_aside * seconds
            usage = b.usage * seconds
            rows.append([seconds, b.work, b.steps, decode_steps, usage, aside, b.completed])
        return np.concatenate([np.array(r) for r in rows], axis=1)

    @cached_property
    def totals(self) -> Totals:
        """Of all windows."""
        return self._sum(np.ones(self.parts.shape[1], dtype=bool))

    def _sum(self, keep: NDArray[np.bool_]) -> Totals:
        sums = self.parts[:, keep].sum(axis=1)
        seconds, work, steps, decode, usage, aside, completed = sums.tolist()
        return Totals(seconds, work, steps, decode, usage / seconds, aside / seconds, completed)

    @cached_property
    def preemptions_per_request(self) -> float:
        """Preemptions over completions, both counted."""
        return sum(b.preempted for b in self.books) / max(self.totals.completed, 1.0)

    @cached_property
    def again(self) -> float:
        """Tokens computed again per request: as counted, or modelled.

        vLLM: by the engine model, as most preempted requests are so new that their context says little.
        SGLang retracts requests that have decoded: their number times prompt and half the output.
        """
        law = self.evidence.workload
        if self.recomputed_tokens is not None:
            return self.recomputed_tokens
        if not self.preemptions_per_request:
            return 0.0
        if self.evidence.limits.sglang is None:
            return self.evidence.engine.recomputed_tokens
        context = law.mean(law.prompt_tokens) + law.mean(law.output_tokens) / 2
        return self.preemptions_per_request * context

    @cached_property
    def most_wasted(self) -> float:
        """Largest share of memory-time that preemptions can have wasted."""
        rounding = self.countings[-1].kv / self.demand
        served = [float(b.work.sum()) * rounding for b in self.books]
        wasted = sum(b.most_wasted(s) * s for b, s in zip(self.books, served, strict=True))
        return wasted / sum(served)

    # -- the walk --------------------------------------------------------------------------------

    def factors(self) -> dict[str, Estimate]:
        """The factors by name, whose product is measured over the paper's rate; "unexplained" is last.

        Those without effect are left out. The 95 % intervals hold the error of the law of step time,
        that of what is modelled, and what leaving out the windows' parts one by one does (a jackknife),
        on the scale of logarithms.
        """
        count = self.parts.shape[1]
        names, logs = self._logs(self.totals)
        each = np.array([self._logs(self._sum(np.arange(count) != i))[1] for i in range(count)])
        by_chance = (count - 1) / count * ((each - each.mean(axis=0)) ** 2).sum(axis=0)
        wider = student_quantile(0.975, count - len(self.books)) / normal_quantile(0.975)
        error = np.sqrt(by_chance * wider**2 + (self._moves() ** 2).sum(axis=1))
        found = {
            name: Estimate.log_normal(math.exp(log), e if e > NO_EFFECT else 0.0, "", "")
            for name, log, e in zip(names, logs.tolist(), error.tolist(), strict=True)
            if abs(log) > NO_EFFECT or name in ("step time", "unexplained")
        }
        found["unexplained"] = found.pop("unexplained")
        return found

    def law_step_s(self) -> float:
        """Mean step by the law for the contents that were served, in seconds."""
        weights = self._stages(self.totals)[-1][1]
        return float(weights @ self.fit.law.coefficients() / weights[0])

    def served_per_request(self) -> Estimate:
        """KV demand served over completions, token-steps; the interval by a jackknife."""
        count = self.parts.shape[1]
        each = [self._sum(np.arange(count) != i) for i in range(count)]
        ratios = np.array([part.work / part.completed for part in each])
        error = math.sqrt((count - 1) / count * float(((ratios - ratios.mean()) ** 2).sum()))
        value = self.totals.work / self.totals.completed
        return Estimate.normal(value, error, "token-steps", "KV demand served per completion")

    def _logs(self, totals: Totals) -> tuple[list[str], Floats]:
        """Names and logarithms of the factors, shape (k,)."""
        stages = self._stages(totals)
        rates = self._log_rates(stages)
        paper = math.log(self.evidence.paper.critical_rate.value)
        served = math.log(totals.work / self.demand / totals.seconds)
        measured = math.log(self.measured.value)
        names = [*(name for name, _ in stages), "step time", "mix of lengths"]
        return names, np.diff([paper, *rates, served, measured])

    def _moves(self) -> Floats:
        """By how much independent errors of one sigma move the logarithms, shape (k, errors)."""
        stages = self._stages(self.totals)
        rates = self._log_rates(stages)
        by_law = [
            -self.fit.errors(w) * math.exp(r) for (_, w), r in zip(stages, rates, strict=True)
        ]
        others = (
            self._stages(self.totals, wasted=WASTED + WASTED_ERROR),
            self._stages(self.totals, again=1 + self._recompute_error()),
        )
        moved = [self._log_rates(other) - rates for other in others]
        errors = np.column_stack([np.array(by_law), *moved])
        # What is measured does not move; and the paper's rate moves as the first stage does.
        ends = np.zeros((1, errors.shape[1]))
        moves = np.diff(np.concatenate([errors[:1], errors, ends, ends]), axis=0)
        demand = self.evidence.paper.kv_demand
        sampled = np.zeros((len(moves), 1))
        sampled[0] = demand.standard_error / demand.value
        return np.concatenate([moves, sampled], axis=1)

    def _log_rates(self, stages: Sequence[tuple[str, Floats]]) -> Floats:
        return np.array([-math.log(w @ self.fit.law.coefficients()) for _, w in stages])

    def _recompute_error(self) -> float:
        if self.recomputed_tokens is not None:
            return 0.0
        cohorts = forms_cohorts(self.evidence.workload)
        return RECOMPUTE_ERROR_FIXED if cohorts else RECOMPUTE_ERROR

    def _stages(
        self, totals: Totals, wasted: float = WASTED, again: float = 1.0
    ) -> list[tuple[str, Floats]]:
        """What a request takes of b0..b3 after each step of the walk; each is named by what it adds."""
        pool = self.evidence.limits.pool_tokens
        found = [("lengths", self._paper)]
        found += [(way.name, way.sums) for way in self.countings]
        engine = self.countings[-1]
        x, stretch = pool / engine.kv, totals.steps / totals.decode_steps
        for name, share in self._filling(totals):
            x *= share
            found.append((name, _with_steps(engine.sums, 1 / x)))
        found.append(("prefill steps", _with_steps(engine.sums, stretch / x)))
        x *= 1 - wasted * self.most_wasted
        tokens = again * self.again
        found.append(("recompute", _with_steps(engine.sums, stretch / x, tokens)))
        served = totals.work / self.demand / totals.decode_steps
        found.append(("unexplained", _with_steps(engine.sums, stretch / served, tokens)))
        return found

    @cached_property
    def _paper(self) -> Floats:
        """What a request of the offered law takes of b0..b3 in the paper's way to count."""
        law = self.evidence.workload
        point = paper_point(law, self.evidence.limits, self.chunk)
        return steps_and_sums(law, point.demand, point.operation)

    def _filling(self, totals: Totals) -> list[tuple[str, float]]:
        """How full the pool was, by what kept it from being fuller; empty where nothing is known to."""
        taken = totals.usage + totals.set_aside
        if self.binds in ("kv_cache", "output_reservation"):
            return [("output reservation", totals.usage / taken), ("under-fill", taken)]
        return [] if self.binds == "unknown" else [(self.binds, totals.usage)]


def _with_steps(sums: Floats, steps: float, recomputed_tokens: float = 0.0) -> Floats:
    """The same sums of a request with other steps, and with tokens that are computed again."""
    return np.array([steps, sums[1] + recomputed_tokens, sums[2], sums[3]])
