"""How long one engine step takes, from what is in its batch, and how that law is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from analysis.numbers.lack_of_fit import Bend, LackOfFit, bends, lack_of_fit
from analysis.numbers.quantiles import normal_quantile, student_quantile

TERMS = ("b0", "b1", "b2", "b3")
MAX_CONDITION = 1e6
WEIGHT_FLOOR_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """b = b0 + b1*tokens + b2*KV + b3*running, in seconds (theory.md 2.5).

    ``tokens`` are the tokens scheduled in the step, ``KV`` the resident KV tokens of the scheduled
    requests, ``running`` their number.
    """

    b0_s: float
    b1_s_per_token: float = 0.0
    b2_s_per_kv_token: float = 0.0
    b3_s_per_request: float = 0.0

    def __call__(self, tokens: float, kv_tokens: float, running: float) -> float:
        return (
            self.b0_s
            + self.b1_s_per_token * tokens
            + self.b2_s_per_kv_token * kv_tokens
            + self.b3_s_per_request * running
        )

    def coefficients(self) -> NDArray[np.float64]:
        """b0, b1, b2, b3, shape (4,)."""
        return np.array(
            [self.b0_s, self.b1_s_per_token, self.b2_s_per_kv_token, self.b3_s_per_request]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepObservation:
    """One measured stretch: its duration, and what its steps held, summed over the steps.

    ``overheads`` is how many times the constant cost of one request outside the engine (network,
    parsing) lies inside the duration: 1 for a time to first token, 0 between tokens.
    ``standard_error_s`` is the known error of the duration itself, on top of the relative scatter
    that the fit finds.
    """

    duration_s: float
    steps: float
    tokens: float
    kv_tokens: float
    running: float
    overheads: float = 0.0
    probe: str = ""
    """Which design it belongs to; observations of one design repeat the same point."""
    standard_error_s: float = 0.0
    begin_ns: int = 0
    end_ns: int = 0
    """On the client's clock, where it was measured there."""
    joined_prompt_tokens: int = 0
    """Prompt tokens of requests that came in between."""
    left_out_steps: float = 0.0
    left_out_s: float = 0.0
    """From its end to the last token of the request that was observed."""
    disturbed: bool = False
    """Far off the repeats of its design: left out of the law."""

    def __post_init__(self) -> None:
        if not self.duration_s > 0 or not self.steps > 0:
            raise ValueError(
                "a step-time observation needs a positive duration and at least one step, "
                f"got {self.duration_s} s and {self.steps} steps"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class StepTimeFit:
    """A step-time law with the covariance of its coefficients b0..b3, shape (4, 4).

    ``residual_relative`` is the scatter of one observation around the law, a standard deviation as
    a fraction. ``condition_number`` is that of the scaled design: how well the observations tell
    the terms apart. ``overhead_s`` is the constant cost per request outside the engine, 0 where
    none was observed. ``covariance`` is that of normal intervals: it holds the widening by Student's
    t for ``interval_dof`` degrees of freedom (0: stated, not measured).
    """

    law: StepTime
    covariance: NDArray[np.float64]
    residual_relative: float
    condition_number: float
    num_observations: int
    method: str
    overhead_s: float = 0.0
    lack_of_fit: LackOfFit | None = None
    """None where designs were not named or not repeated."""
    interval_dof: int = 0
    bends: tuple[Bend, ...] = ()
    """Where the law is not straight beyond chance."""
    disturbed_share: float = 0.0
    """Of the probes' time, what disturbances took: they may come again, so it is one more error of any
    step time, as a fraction."""

    @property
    def widening(self) -> float:
        """Student's t over the normal quantile, for the few degrees of freedom of the error."""
        if not self.interval_dof:
            return 1.0
        return student_quantile(0.975, self.interval_dof) / normal_quantile(0.975)

    def standard_errors(self) -> NDArray[np.float64]:
        """Of b0..b3, shape (4,), without the widening."""
        variances: NDArray[np.float64] = np.diag(self.covariance).clip(min=0.0)
        return np.asarray(np.sqrt(variances) / self.widening)

    def combination(self, weights: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
        """Value and standard error of ``weights @ (b0, b1, b2, b3)``, in seconds.

        The error holds that of the coefficients, where the law bends how far it leaves the line at a
        step of these weights, and the share of disturbances.
        """
        w = np.asarray(weights, dtype=np.float64)
        if w.shape != (4,):
            raise ValueError(f"a combination needs the four weights of b0..b3, got shape {w.shape}")
        return float(w @ self.law.coefficients()), float(np.linalg.norm(self.errors(w)))

    def errors(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much independent errors of one sigma each move ``weights @ b``, in seconds.

        Shape (5 + bends,). What two combinations have in common stands in the same places of both.
        """
        variances, axes = np.linalg.eigh(self.covariance)
        linear = weights @ axes * np.sqrt(variances.clip(min=0.0))
        off = [b.off_s(weights) * self.widening if weights[0] > 0 else 0.0 for b in self.bends]
        stalls = self.disturbed_share * float(weights @ self.law.coefficients())
        return np.concatenate([linear, off, [stalls]])

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StepTimeFit:
        """The inverse of `dataclasses.asdict`, also after a passage through JSON."""
        fields = dict(data)
        fields["law"] = StepTime(**fields["law"])
        fields["covariance"] = np.array(fields["covariance"], dtype=np.float64)
        linear = fields.get("lack_of_fit")
        fields["lack_of_fit"] = None if linear is None else LackOfFit(**linear)
        fields["bends"] = tuple(
            Bend(term=b["term"], size=b["size"], line=tuple(b["line"]))
            for b in fields.get("bends", ())
        )
        return StepTimeFit(**fields)


def exact_step_time(law: StepTime) -> StepTimeFit:
    """A law that is stated, not measured: no uncertainty."""
    return StepTimeFit(
        law=law,
        covariance=np.zeros((4, 4)),
        residual_relative=0.0,
        condition_number=1.0,
        num_observations=0,
        method="stated",
    )


def fit_step_time(
    observations: Sequence[StepObservation], terms: Sequence[str] = TERMS
) -> StepTimeFit:
    """Weighted least squares for the named terms, none of them negative; the others are zero.

    The standard deviation of an observation is taken proportional to its fitted duration, plus a
    floor of one millisecond, which only weighs. The point is the weighted least-squares point under
    b >= 0 (active set). The covariance is that of the fit without the constraint: in its own metric
    the projection onto a convex set that holds the truth never moves an estimate away from it, so
    a term at zero keeps the uncertainty that the data leave it. Its variance is that of the residuals
    or, where that is larger, the mean square of the lack of fit, which repeating the designs does not
    make smaller; it is widened by the quantile of Student's t with the degrees of freedom of that
    one, so that a normal interval of 95 % is right for few observations.

    Raises ValueError when there are too few observations for the terms or when they cannot tell
    the terms apart.
    """
    names = _checked(terms)
    design, duration, error = _arrays(observations, names)
    count, width = design.shape
    if count < width + 1:
        raise ValueError(
            f"{count} observations cannot fit {width} coefficients: at least {width + 1} are needed"
        )
    fitted = duration
    for _ in range(3):
        # Weights from the fitted durations: weights from the measured ones favour the short ones.
        scale = fitted + WEIGHT_FLOOR_S
        weight = 1.0 / np.hypot(scale, error / _relative(duration, fitted, error))
        a, y = design * weight[:, None], duration * weight
        norms = np.linalg.norm(a, axis=0)
        _refuse_unidentified(a, norms, names)
        solution, _ = nnls(a / norms, y)
        beta = solution / norms
        fitted = design @ beta
    free = np.linalg.lstsq(a / norms, y, rcond=None)[0] / norms
    residual = y - a @ free
    variance, dof = float(np.sum(residual**2)) / (count - width), count - width
    linear = lack_of_fit([o.probe for o in observations], residual, width)
    if linear is not None and linear.mean_square > variance:
        # So many designs say it, however often each is repeated.
        variance, dof = linear.mean_square, linear.designs_dof
    wider = student_quantile(0.975, dof) / normal_quantile(0.975)
    scaled = a / norms
    covariance = np.linalg.inv(scaled.T @ scaled) / np.outer(norms, norms) * variance * wider**2
    fit = _result(
        observations, names, beta, covariance, design, duration, float(np.linalg.cond(scaled))
    )
    if linear is None:
        return replace(fit, interval_dof=dof)
    columns = _sums(observations)[:, :4] * weight[:, None]
    index = [TERMS.index(name) for name in names if name in TERMS]
    found = bends(columns, a, index, residual, linear.error_mean_square)
    return replace(fit, lack_of_fit=linear, interval_dof=dof, bends=found)


def _result(
    observations: Sequence[StepObservation],
    names: list[str],
    beta: NDArray[np.float64],
    covariance: NDArray[np.float64],
    design: NDArray[np.float64],
    duration: NDArray[np.float64],
    condition: float,
) -> StepTimeFit:
    coefficients, full = np.zeros(5), np.zeros((5, 5))
    index = [(*TERMS, "overhead").index(name) for name in names]
    coefficients[index] = beta
    full[np.ix_(index, index)] = covariance
    relative = duration / (design @ beta) - 1.0
    at_zero = [name for name, value in zip(names, beta, strict=True) if value == 0.0]
    method = f"weighted least squares of {len(observations)} observations, terms {', '.join(names)}"
    if at_zero:
        method += f"; held at zero: {', '.join(at_zero)}"
    b0, b1, b2, b3, overhead = coefficients.tolist()
    return StepTimeFit(
        law=StepTime(b0_s=b0, b1_s_per_token=b1, b2_s_per_kv_token=b2, b3_s_per_request=b3),
        covariance=full[:4, :4],
        residual_relative=float(np.sqrt(np.sum(relative**2) / (len(duration) - len(names)))),
        condition_number=condition,
        num_observations=len(observations),
        method=method,
        overhead_s=overhead,
    )


def _checked(terms: Sequence[str]) -> list[str]:
    unknown = [name for name in terms if name not in TERMS]
    if unknown or not terms or len(set(terms)) != len(terms):
        raise ValueError(f"terms must be some of {', '.join(TERMS)}, each once; got {list(terms)}")
    return list(terms)


def _arrays(
    observations: Sequence[StepObservation], names: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Design (n, terms), durations (n,), known errors (n,); ``overhead`` is named if seen."""
    sums = _sums(observations)
    if (sums[:, 4] > 0).any():
        names.append("overhead")
    design = sums[:, [(*TERMS, "overhead").index(name) for name in names]]
    duration = np.array([o.duration_s for o in observations])
    return design, duration, np.array([o.standard_error_s for o in observations])


def _sums(observations: Sequence[StepObservation]) -> NDArray[np.float64]:
    """Steps, tokens, KV tokens, requests and overheads, shape (n, 5)."""
    return np.array(
        [[o.steps, o.tokens, o.kv_tokens, o.running, o.overheads] for o in observations]
    ).reshape(-1, 5)


def _relative(
    duration: NDArray[np.float64], fitted: NDArray[np.float64], error: NDArray[np.float64]
) -> float:
    """Relative scatter around the fit, what the known errors explain taken out; at least 0.1 %."""
    excess = float(np.mean((duration / fitted - 1.0) ** 2 - (error / fitted) ** 2))
    return float(np.sqrt(max(excess, 1e-6)))


def _refuse_unidentified(
    a: NDArray[np.float64], norms: NDArray[np.float64], names: list[str]
) -> None:
    silent = [name for name, size in zip(names, norms, strict=True) if size == 0.0]
    if silent:
        raise ValueError(f"no observation has anything of {', '.join(silent)}: leave the term out")
    if float(np.linalg.cond(a / norms)) > MAX_CONDITION:
        raise ValueError(
            f"the observations cannot tell {', '.join(names)} apart: vary tokens, KV and requests "
            "independently, or leave a term out"
        )
