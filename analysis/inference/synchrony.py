"""Do requests leave in waves that last? A word about one run, from what any engine shows.

Requests that were admitted together leave together where their outputs are nearly alike, and their room
is filled at once by others that will leave together (`analysis.theory.congestion`). Such a wave
comes back after a period, which is about a residence time: the rate of completions is then
correlated with itself a period later. Where lengths differ enough, hardly anything of a wave is
left after a residence.

The word is decided by that correlation alone. KV occupancy and preemptions are asked whether they follow
the same period; they do not decide, since greedy engines keep the pool full whatever the waves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from analysis.schedulers.frames import RunFrames

Floats = NDArray[np.float64]
Word = Literal["synchronised", "not synchronised", "cannot say"]

LOCKED = 0.45
"""A wave that keeps this much of itself over a period, by a correlation that chance does not reach."""
CALM = 0.30
"""Below it nothing outlasts a few residences."""
FEWEST_RESIDENCES = 12.0
FEWEST_PER_RESIDENCE = 4.0
"""Completions per residence: a handful of running requests makes no crowd."""
FEWEST_GAPS = 6.0
"""Token gaps per residence: shorter waves cannot be told from single steps."""
GRID_PER_RESIDENCE = 64
SMOOTHED = 1 / 24
"""Standard deviation of the smoothing in residences, at least one token gap: steps are no waves."""
SHORTEST, LONGEST = 0.75, 2.5
"""Where the period is looked for, in residences."""
ALIKE = 0.8
"""A crest of this much of the highest is the same wave, a period earlier."""
EVEN = 0.3
"""Completions that vary by less than this much of what chance makes are even: no waves."""
HARMONICS = 4


@dataclass(frozen=True, eq=False)
class Waves:
    """Rate of completions of a run on an even grid, and its correlation with itself later.

    ``rate``: smoothed over ``width`` grid points (standard deviation), per second, less its slow trend,
    shape (n,), at ``start_s`` + i ``interval_s``; ``correlation``: by lag in grid points, from 0 on,
    shape (k,).
    """

    start_s: float
    interval_s: float
    rate: Floats
    width: float
    correlation: Floats
    residence_s: float
    residences: float
    """Observed length in residences."""
    by_chance: float
    """Standard deviation of the correlation of completions that have nothing to do with each other."""
    swing: float
    """Standard deviation of the rate over its mean."""
    swing_by_chance: float
    """The same of completions at random, one by one."""

    @property
    def lags_s(self) -> Floats:
        """Of ``correlation``, shape (k,)."""
        return np.arange(len(self.correlation), dtype=float) * self.interval_s

    @property
    def period(self) -> int:
        """Lag of the highest correlation within the range of periods, in grid points.

        A wave comes back after two periods as well: of crests alike, the first.
        """
        low, high = (round(x * GRID_PER_RESIDENCE) for x in (SHORTEST, LONGEST))
        found = self.correlation[: high + 2]
        crests = np.flatnonzero((found[1:-1] >= found[:-2]) & (found[1:-1] >= found[2:])) + 1
        crests = crests[(crests >= low) & (crests <= high)]
        if not len(crests):
            return low + int(np.argmax(found[low : high + 1]))
        highest = float(found[crests].max())
        return int(crests[found[crests] >= min(ALIKE * highest, highest)][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Synchrony:
    """The word about a run, and what it rests on."""

    run: str
    load: float
    word: Word
    text: str
    """One clause with the figures that decided."""
    correlation: float | None
    """Of completions with those a period later; this and the next four: None for a run too small."""
    by_chance: float | None
    """Its standard deviation without waves."""
    period_s: float | None
    residence_s: float | None
    swing: float | None
    """Standard deviation of the rate of completions over its mean, smoothed over 1/24 residence."""
    kv_share: float | None
    """Share of the variance of KV occupancy at the period and its harmonics; None if it stood still."""
    preemptions: float | None
    """Correlation of preemptions with those a period later; None without any."""


def synchrony(frames: RunFrames, load: float = math.nan) -> Synchrony:
    """Are the completions of a run after its warm-up synchronised?

    *synchronised*: the correlation is `LOCKED` or more, and more than chance reaches; *not
    synchronised*: it is below `CALM`, or what varies is less than chance; else *cannot say*, with the
    reason.
    """
    seen = completion_waves(frames)
    if isinstance(seen, str):
        return _word(frames, load, "cannot say", seen, None)
    value, chance = float(seen.correlation[seen.period]), seen.by_chance
    period_s = seen.period * seen.interval_s
    text = (
        f"completions {period_s:.3g} s apart, {period_s / seen.residence_s:.2f} residences, are "
        f"correlated by {value:.2f} (chance: {chance:.2f}) over {seen.residences:.0f} residences"
    )
    if seen.swing < EVEN * seen.swing_by_chance:
        even = f"the rate of completions varies by {100 * seen.swing:.1f} %, less than by chance"
        return _word(frames, load, "not synchronised", even, seen)
    if value >= max(LOCKED, 5 * chance):
        return _word(frames, load, "synchronised", text, seen)
    if value + 2 * chance < LOCKED and value < max(CALM, 3 * chance):
        return _word(frames, load, "not synchronised", text, seen)
    return _word(frames, load, "cannot say", text, seen)


def completion_waves(frames: RunFrames) -> Waves | str:
    """The waves of completions after the warm-up; why they cannot be told where the run is too small."""
    first, last, tokens = (
        frames.per_request(column) for column in ("first_token_s", "last_token_s", "output_tokens")
    )
    start_s, end_s = frames.run.warmup_s, frames.end_s
    left = frames.completed & (last >= start_s) & (last <= end_s)
    if not left.any():
        return "no request completed after the warm-up"
    lived = (last - first)[left]
    residence_s = float(np.mean(lived))
    gap_s = float(lived.sum() / max((tokens[left] - 1).sum(), 1.0))
    if not residence_s >= FEWEST_GAPS * gap_s or residence_s <= 0:
        return f"outputs of fewer than {FEWEST_GAPS + 1:.0f} tokens: waves are as short as steps"
    residences = (end_s - start_s) / residence_s
    if residences < FEWEST_RESIDENCES:
        return f"{residences:.1f} residences after the warm-up, {FEWEST_RESIDENCES:.0f} are needed"
    each = float(left.sum()) / residences
    if each < FEWEST_PER_RESIDENCE:
        return f"{each:.1f} completions per residence, {FEWEST_PER_RESIDENCE:.0f} are needed"
    interval_s = residence_s / GRID_PER_RESIDENCE
    width = max(SMOOTHED * residence_s, gap_s) / interval_s
    count = int((end_s - start_s) / interval_s)
    edges = start_s + interval_s * np.arange(count + 1)
    counts = np.histogram(last[left], edges)[0] / interval_s
    rate = _without_trend(counts, width)
    each_point = float(counts.mean())
    longest = min(3 * round(LONGEST * GRID_PER_RESIDENCE), count // 2)
    return Waves(
        start_s=start_s + interval_s / 2,
        interval_s=interval_s,
        rate=rate,
        width=width,
        correlation=_autocorrelation(rate, longest),
        residence_s=residence_s,
        residences=residences,
        # Smoothing by a Gaussian leaves one independent number for 2 sqrt(pi) of its deviations.
        by_chance=math.sqrt(2 * math.sqrt(math.pi) * width / count),
        swing=float(rate.std()) / each_point,
        swing_by_chance=1 / math.sqrt(2 * math.sqrt(math.pi) * width * each_point * interval_s),
    )


def _without_trend(counts: Floats, width: float) -> Floats:
    """Smoothed, less what is slower than any period."""
    slow = gaussian_filter1d(counts, LONGEST * GRID_PER_RESIDENCE / 2, mode="reflect")
    return np.asarray(gaussian_filter1d(counts, width, mode="reflect") - slow)


def _autocorrelation(values: Floats, longest: int) -> Floats:
    """Of lags 0 to ``longest``, each over the pairs that it has."""
    centred = values - values.mean()
    padded = np.fft.rfft(centred, 2 ** math.ceil(math.log2(2 * len(values))))
    sums = np.fft.irfft(np.abs(padded) ** 2)[: longest + 1]
    pairs = len(values) - np.arange(longest + 1)
    result: Floats = (sums / pairs) / (sums[0] / len(values))
    return result


def _word(frames: RunFrames, load: float, word: Word, text: str, seen: Waves | None) -> Synchrony:
    period_s = None if seen is None else seen.period * seen.interval_s
    return Synchrony(
        run=frames.run.id,
        load=load,
        word=word,
        text=text,
        correlation=None if seen is None else float(seen.correlation[seen.period]),
        by_chance=None if seen is None else seen.by_chance,
        period_s=period_s,
        residence_s=None if seen is None else seen.residence_s,
        swing=None if seen is None else seen.swing,
        kv_share=None if period_s is None else _share_at(frames, period_s),
        preemptions=None if seen is None else _bursts(frames, seen),
    )


def _share_at(frames: RunFrames, period_s: float) -> float | None:
    """Share of the variance of KV occupancy within a quarter of 1/period of its first harmonics."""
    times, usage = frames.per_sample("t_s"), frames.per_sample("kv_usage")
    inside = (times >= frames.run.warmup_s) & (times <= frames.end_s)
    if inside.sum() < 16 or not np.isfinite(usage[inside]).all() or np.ptp(usage[inside]) == 0:
        return None
    even = np.linspace(times[inside][0], times[inside][-1], int(inside.sum()))
    values = np.interp(even, times[inside], usage[inside])
    power = np.abs(np.fft.rfft((values - values.mean()) * np.hanning(len(values)))) ** 2
    cycles = np.fft.rfftfreq(len(values), even[1] - even[0]) * period_s
    nearest = np.clip(np.round(cycles), 1, HARMONICS)
    total = power[1:].sum()
    return float(power[1:][np.abs(cycles - nearest)[1:] < 1 / 8].sum() / total)


def _bursts(frames: RunFrames, seen: Waves) -> float | None:
    """Correlation of the preemptions with those a period later."""
    edges = seen.start_s + seen.interval_s * (np.arange(len(seen.rate) + 1) - 0.5)
    counted = np.interp(edges, frames.per_sample("t_s"), frames.per_sample("preemptions"))
    if counted[-1] <= counted[0]:
        return None
    rate = _without_trend(np.diff(counted), seen.width)
    return float(_autocorrelation(rate, seen.period)[-1])
