"""Laws of arrivals: what each one is, and what statistics have to know of it. Nothing is drawn here.

A law has the shape of the arrivals alone; the mean rate belongs to the run. Each starts in its
stationary law (those whose rate follows the clock at their phase 0), so that the expected number of
arrivals is rate times horizon from the first second on, for a rate that varies after whole periods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent exponential gaps."""

    kind: Literal["poisson"] = "poisson"

    @property
    def text(self) -> str:
        return "Poisson"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """Independent gamma gaps of coefficient of variation ``cv``: above 1 bursty, below 1 regular."""

    kind: Literal["gamma"] = "gamma"
    cv: float

    def __post_init__(self) -> None:
        if not 0.05 <= self.cv <= 4.0:
            raise ValueError(
                f"cv of gamma gaps must be between 0.05 and 4, not {self.cv}: beyond that no clock "
                "tells most of them from 0; Weibull gaps go further"
            )

    @property
    def text(self) -> str:
        return f"gamma gaps of CV {self.cv:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weibull:
    """Independent Weibull gaps of coefficient of variation ``cv``."""

    kind: Literal["weibull"] = "weibull"
    cv: float

    def __post_init__(self) -> None:
        if not 0.05 <= self.cv <= 10.0:
            raise ValueError(f"cv of Weibull gaps must be between 0.05 and 10, not {self.cv}")

    @property
    def text(self) -> str:
        return f"Weibull gaps of CV {self.cv:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnOff:
    """A Markov-modulated Poisson process of two states: bursts of mean length ``on_s``, pauses of
    ``off_s``, both exponential, and a rate in pauses of ``off_over_on`` times that in bursts."""

    kind: Literal["on_off"] = "on_off"
    on_s: float
    off_s: float
    off_over_on: float = 0.0

    def __post_init__(self) -> None:
        for name in ("on_s", "off_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0.0 <= self.off_over_on < 1.0:
            raise ValueError(f"off_over_on must be in [0, 1), not {self.off_over_on}")

    @property
    def text(self) -> str:
        rest = f" at {self.off_over_on:g} of their rate" if self.off_over_on else ""
        return f"bursts of {self.on_s:g} s, pauses of {self.off_s:g} s{rest} (MMPP)"

    def rates(self, mean_rate: float) -> tuple[float, float]:
        """Arrivals per second in a burst and in a pause, for this mean over both."""
        on = mean_rate * (self.on_s + self.off_s) / (self.on_s + self.off_over_on * self.off_s)
        return on, self.off_over_on * on


@dataclass(frozen=True, slots=True, kw_only=True)
class Piecewise:
    """Poisson arrivals of a rate that steps: ``pieces`` are (seconds, relative rate), begun anew after
    the last one. Only the ratios of the relative rates count: the mean over a period is the run's."""

    kind: Literal["piecewise"] = "piecewise"
    pieces: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.pieces) < 2:
            raise ValueError("pieces: give at least two pairs of seconds and relative rate")
        if not all(0 < length < math.inf and 0 <= rate < math.inf for length, rate in self.pieces):
            raise ValueError("pieces: seconds must be positive and no relative rate negative")
        if not any(rate > 0 for _, rate in self.pieces):
            raise ValueError("pieces: one relative rate at least must be positive")

    @property
    def text(self) -> str:
        return (
            f"Poisson arrivals whose rate steps through {len(self.pieces)} pieces in "
            f"{self.period_s:g} s"
        )

    @property
    def period_s(self) -> float:
        return math.fsum(length for length, _ in self.pieces)

    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ends of the pieces in one period from 0 on, and the share of its arrivals until each."""
        lengths, rates = np.array(self.pieces).T
        until = np.cumsum(lengths * rates)
        return np.append(0.0, np.cumsum(lengths)), np.append(0.0, until / until[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinusoidal:
    """Poisson arrivals of rate mean (1 + amplitude sin(2 pi (t / period_s + phase)))."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    period_s: float
    amplitude: float
    phase: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.period_s < math.inf:
            raise ValueError(f"period_s must be positive, not {self.period_s}")
        if not 0.0 < self.amplitude <= 1.0:
            raise ValueError(f"amplitude must be in (0, 1], not {self.amplitude}")
        if not 0.0 <= self.phase < 1.0:
            raise ValueError(f"phase is in periods, in [0, 1), not {self.phase}")

    @property
    def text(self) -> str:
        return (
            f"Poisson arrivals whose rate swings by {100 * self.amplitude:g} % with a period of "
            f"{self.period_s:g} s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The instants of a recorded trace with the lengths that belong to them, in its own order.

    ``own_rate`` is the mean rate of what is replayed, all of the file from ``from_s`` on; at another
    rate of the run the trace's clock runs faster or slower. ``sha256`` is the digest of the file.
    """

    kind: Literal["replay"] = "replay"
    file: str
    format: str
    sha256: str
    own_rate: float
    duration_s: float
    """On the trace's own clock."""
    from_s: float = 0.0
    max_total_tokens: int | None = None

    @property
    def text(self) -> str:
        return f"replay of {self.file.rpartition('/')[2]}"


Varying = Piecewise | Sinusoidal
Process = Poisson | Gamma | Weibull | OnOff | Piecewise | Sinusoidal | Replay
POISSON = Poisson()


def process_from_dict(data: Mapping[str, Any]) -> Process:
    """A law as it was written to a results folder. Raises ValueError for an unknown kind."""
    fields = {key: value for key, value in data.items() if key != "kind"}
    kind = data.get("kind")
    if kind == "piecewise":
        fields["pieces"] = tuple((float(s), float(r)) for s, r in fields["pieces"])
    for law in (Poisson, Gamma, Weibull, OnOff, Piecewise, Sinusoidal, Replay):
        if kind == law.__dataclass_fields__["kind"].default:
            made: Process = law(**fields)
            return made
    raise ValueError(f"no arrivals of kind {kind!r} are known: use the version that wrote them")


def dispersion(process: Process, rate: float) -> float:
    """ca2 of theory.md 6.1: variance over mean of the counts in ever longer windows.

    CV^2 for independent gaps (Cox, Renewal Theory, 1962); for `OnOff` see `dispersion_over`. A rate that
    follows the clock adds nothing to the scatter over whole periods: 1. NaN for a replay, whose one
    path has no law.
    """
    match process:
        case Gamma(cv=cv) | Weibull(cv=cv):
            return cv**2
        case OnOff():
            return 1.0 + _excess(process, rate)
        case Replay():
            return math.nan
    return 1.0


def dispersion_over(
    process: OnOff, rate: float, window_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Variance over mean of the counts of a two-state MMPP in windows of each length.

    With s the sum of the rates at which the states are left, and the two rates of arrivals l1 and l2 met
    with probabilities p1 and p2: 1 + 2 p1 p2 (l1 - l2)^2 / (l s) (1 - (1 - exp(-s t)) / (s t)); Heffes
    and Lucantoni, IEEE J. Sel. Areas Commun. 4 (1986), equation 5; Fischer and Meier-Hellstern, Perform.
    Eval. 18 (1993).
    """
    x = _switching(process) * window_s
    return np.asarray(1.0 + _excess(process, rate) * (1.0 + np.expm1(-x) / x))


def _switching(process: OnOff) -> float:
    return 1.0 / process.on_s + 1.0 / process.off_s


def _excess(process: OnOff, rate: float) -> float:
    on, off = process.rates(rate)
    total = process.on_s + process.off_s
    both = process.on_s * process.off_s / total**2
    return 2.0 * both * (on - off) ** 2 / (rate * _switching(process))


def period_s(process: Process) -> float | None:
    """Seconds after which the rate is the same again; None where it does not follow the clock."""
    return process.period_s if isinstance(process, Piecewise | Sinusoidal) else None


def stationary(process: Process) -> bool:
    """Is its law the same at all times, so that it has one rate?"""
    return not isinstance(process, Piecewise | Sinusoidal | Replay)


def swing(process: Process, rate: float) -> float:
    """By how many requests the expected arrivals run ahead of an even stream within a period, at most.

    From the lowest to the highest point, since a queue is kept from following downwards; 0 where the
    rate does not follow the clock.
    """
    period = period_s(process)
    if period is None:
        return 0.0
    at_s = np.linspace(0.0, period, 4097)
    if isinstance(process, Piecewise):
        at_s = process.edges()[0]
    ahead = expected_arrivals(process, rate, at_s) - rate * at_s
    return float(ahead.max() - ahead.min())


def expected_arrivals(
    process: Process, rate: float, at_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean number of arrivals in [0, t) for each t, shape of ``at_s``: the integral of the rate.

    Stationary laws and replays give rate times t.
    """
    match process:
        case Piecewise():
            ends, shares = process.edges()
            whole, rest = np.divmod(at_s, process.period_s)
            done = whole + np.interp(rest, ends, shares)
            return np.asarray(rate * process.period_s * done)
        case Sinusoidal(period_s=period, amplitude=amplitude, phase=phase):
            turn = 2.0 * math.pi
            wave = math.cos(turn * phase) - np.cos(turn * (at_s / period + phase))
            return np.asarray(rate * (at_s + amplitude * period / turn * wave))
    return rate * at_s


def instants_of(process: Varying, rate: float, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Instants at which so many arrivals are expected: inverse of `expected_arrivals`, to rounding."""
    if isinstance(process, Piecewise):
        ends, shares = process.edges()
        whole, rest = np.divmod(counts / (rate * process.period_s), 1.0)
        return np.asarray(process.period_s * whole + np.interp(rest, shares, ends))
    reach = process.amplitude * process.period_s / math.pi
    low, high = np.maximum(counts / rate - reach, 0.0), counts / rate + reach
    while True:
        middle = (low + high) / 2.0
        if not ((low < middle) & (middle < high)).any():
            return np.asarray(np.maximum.accumulate(middle))
        below = expected_arrivals(process, rate, middle) < counts
        low, high = np.where(below, middle, low), np.where(below, high, middle)
