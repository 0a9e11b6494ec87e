"""Laws of lengths over long ranges, on a grid whose size is bounded: log-normal, and two marginals.

A range of lengths is cut into bins. Inside a bin at most four lengths stand for all of it, with its
probability, mean and second moment: what a bin loses begins with its third moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loadgen.workload import Workload, percent, stated

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BINS = 128
"""Bins of one length; a grid has at most (4 BINS)^2 points, fewer where bins hold few lengths."""
MOST_LENGTHS = 2_000_000
QUADRATURE_NODES = 24
LEAST_MASS = 1e-6
NEGLIGIBLE = 1e-12
ROUNDING = 1e-9
"""A mean that misses an integer by less is that integer: no length outside its bin gets a weight."""
LARGEST_CORRELATION_OF_LOGS = 0.99


@dataclass(frozen=True, slots=True, eq=False)
class Binned:
    """A law of one length in bins; ``values`` and ``within`` by point, ``bin`` says of which bin."""

    values: Ints
    within: Floats
    """Probability of each value given its bin."""
    bin: Ints
    probability: Floats
    """Of each bin."""
    first: Ints
    last: Ints
    """Shortest and longest length of each bin."""


def binned(values: Ints, probability: Floats, bins: int = BINS) -> Binned:
    """Lengths, shape (n,), increasing, and their probabilities in at most ``bins`` bins.

    Bins have equal shares of one half the probability and one half the second moment: those in the
    bulk stay narrow, and so do those in a heavy tail. Up to 4 ``bins`` lengths stay as they are.
    Total, mean and second moment are kept exactly.
    """
    if len(values) <= 4 * bins:
        own = np.arange(len(values))
        return Binned(values, np.ones(len(values)), own, probability, values, values)
    x = values.astype(float)
    share = probability / probability.sum() + probability * x**2 / (probability @ x**2)
    middle = (np.cumsum(share) - share / 2) / 2
    # Rounding must not put the last lengths in a bin of their own.
    place = np.minimum(np.floor(middle * bins).astype(np.int64), bins - 1)
    _, start, member = np.unique(place, return_index=True, return_inverse=True)
    total: Floats = np.bincount(member, probability).astype(float)
    first, last = values[start], values[np.append(start[1:], len(values)) - 1]
    # Rounding must not put the mean of a bin outside of it.
    mean = (np.bincount(member, probability * x) / total).clip(first, last)
    variance = np.bincount(member, probability * (x - mean[member]) ** 2) / total
    # Integers next to the mean have the least variance, the ends of the bin the greatest.
    below = np.floor(mean + ROUNDING)
    up = (mean - below).clip(0)
    least, width = up * (1 - up), (last - first).astype(float)
    greatest = (mean - first) * (last - mean)
    spread = np.divide(
        variance - least, greatest - least, out=np.zeros_like(mean), where=greatest > least
    ).clip(0, 1)
    right = np.divide(mean - first, width, out=np.zeros_like(mean), where=width > 0)
    points = np.stack([first, below, below + 1, last], axis=1).astype(np.int64)
    weights = np.stack(
        [spread * (1 - right), (1 - spread) * (1 - up), (1 - spread) * up, spread * right], axis=1
    )
    kept = weights > 0
    bin_of = np.broadcast_to(np.arange(len(total))[:, None], points.shape)
    return Binned(points[kept], weights[kept], bin_of[kept], total, first, last)


def marginals(
    prompt: tuple[Ints, Floats], output: tuple[Ints, Floats], *, name: str, source: str
) -> Workload:
    """The law of two given marginals with prompt and output taken as independent.

    Each marginal is (lengths, probabilities), both of shape (n,); probabilities are scaled to 1. More
    than 4 `BINS` lengths are binned, which keeps E[s], E[s^2], E[o], E[o^2] and E[s o] and so the mean
    demand in tokens; third moments move (the notes say by how much). The law is exact: what it says
    of the traffic that the marginals came from is another matter, and no interval knows it.

    Raises ValueError for lengths below 1, negative probabilities or a sum off 1 by more than 0.1 %.
    """
    notes = [f"{name}: prompt and output taken as independent; the marginals have no stated error"]
    axes = []
    for what, (lengths, probability) in (("prompt", prompt), ("output", output)):
        values, member = np.unique(np.asarray(lengths, dtype=np.int64), return_inverse=True)
        if not len(values) or values[0] < 1:
            raise ValueError(f"{name}: the law of {what} lengths needs lengths of at least 1")
        mass: Floats = np.bincount(member, probability).astype(float)
        if (np.asarray(probability) < 0).any():
            raise ValueError(f"{name}: a probability of the {what} lengths is negative")
        if abs(mass.sum() - 1) > 1e-3:
            raise ValueError(
                f"{name}: the probabilities of {what} lengths sum to {mass.sum():.6g}, not to 1"
            )
        values, mass = values[mass > 0], mass[mass > 0] / mass.sum()
        axis = binned(values, mass)
        axes.append(axis)
        if len(axis.values) < len(values):
            third = float(axis.probability[axis.bin] * axis.within @ axis.values.astype(float) ** 3)
            moved = third / float(mass @ values.astype(float) ** 3) - 1
            notes.append(
                f"{name}: {len(values)} {what} lengths in {len(axis.probability)} bins, which keep "
                f"mean and second moment; the third moves by {percent(moved, sign=True)}"
            )
    return _on_grid(
        axes[0],
        axes[1],
        np.outer(axes[0].probability, axes[1].probability),
        name=name,
        source=f"{source}; prompt and output taken as independent",
        notes=tuple(notes),
    )


def lognormal(
    prompt: tuple[float, float],
    output: tuple[float, float],
    correlation: float,
    prompt_bounds: tuple[int, int],
    output_bounds: tuple[int, int],
) -> Workload:
    """Log-normal lengths, each given as (mean, coefficient of variation), rounded and truncated.

    ``correlation`` is Pearson's, of the lengths themselves: E[s o] = E[s] E[o] (1 + r cv_s cv_o). The
    continuous pair is rounded to the nearest integers and conditioned on both bounds, which move
    its moments: the notes say what was cut and which means are left. The law is the grid that comes
    back. Against the rounded, truncated pair its E[s], E[o], E[s^2], E[o^2] and E[s o] are within 0.2 %
    and E[s o^2] within 0.5 %, for coefficients of variation up to 2.

    Raises ValueError for impossible parameters, such as a correlation that no log-normal pair of
    these spreads has.
    """
    bounds = (prompt_bounds, output_bounds)
    for what, (mean, cv), (low, high) in zip(
        ("prompt", "output"), (prompt, output), bounds, strict=True
    ):
        if not (mean > 0 and cv > 0):
            raise ValueError(f"log-normal {what}: mean {mean:g} and cv {cv:g} must be positive")
        if not 1 <= low <= high or high - low > MOST_LENGTHS:
            raise ValueError(
                f"log-normal {what}: bounds [{low}, {high}] must satisfy 1 <= low <= high and span at "
                f"most {MOST_LENGTHS} tokens"
            )
    (mu_s, sigma_s), (mu_o, sigma_o) = (_of_logs(*law) for law in (prompt, output))
    rho = _correlation_of_logs(correlation, prompt[1], output[1])
    name = f"log-normal {prompt[0]:g} (cv {prompt[1]:g}) / {output[0]:g} (cv {output[1]:g})"
    if correlation:
        name += f", correlation {correlation:g}"
    axes = [
        _rounded(f"log-normal {what}", mu, sigma, *within)
        for what, mu, sigma, within in (
            ("prompt", mu_s, sigma_s, prompt_bounds),
            ("output", mu_o, sigma_o, output_bounds),
        )
    ]
    joint = _joint(
        _edges(axes[0], mu_s, sigma_s), _edges(axes[1], mu_o, sigma_o), axes[0].probability, rho
    )
    if joint.sum() < LEAST_MASS:
        raise ValueError(f"{name}: less than one in a million lies within both bounds")
    cut = max(1.0 - float(joint.sum()), 0.0)
    law = _on_grid(axes[0], axes[1], joint / joint.sum(), name=name, source="stated law", notes=())
    ranges = " and ".join(f"[{low}, {high}]" for low, high in bounds)
    means = " / ".join(f"{law.mean(v):.4g}" for v in (law.prompt_tokens, law.output_tokens))
    note = f"{name}: bounds {ranges} cut {percent(cut)} of the law and leave means of {means}"
    return replace(law, notes=(note,))


def _of_logs(mean: float, cv: float) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm."""
    variance = math.log1p(cv**2)
    return math.log(mean) - variance / 2, math.sqrt(variance)


def _correlation_of_logs(correlation: float, cv_s: float, cv_o: float) -> float:
    """rho of the normal logs, from 1 + r cv_s cv_o = exp(rho sigma_s sigma_o)."""
    sigmas = math.sqrt(math.log1p(cv_s**2) * math.log1p(cv_o**2))
    least, most = (
        math.expm1(rho * sigmas) / (cv_s * cv_o)
        for rho in (-LARGEST_CORRELATION_OF_LOGS, LARGEST_CORRELATION_OF_LOGS)
    )
    if not least <= correlation <= most:
        raise ValueError(
            f"log-normal lengths with coefficients of variation {cv_s:g} and {cv_o:g} have a "
            f"correlation between {least:.3f} and {most:.3f}, not {correlation:g}"
        )
    return math.log1p(correlation * cv_s * cv_o) / sigmas


def _normal_distribution(z: Floats) -> Floats:
    # Not at the top: a client that draws no lengths would wait for it.
    from scipy.special import ndtr

    return np.asarray(ndtr(z))


def _rounded(what: str, mu: float, sigma: float, low: int, high: int) -> Binned:
    """The law of the nearest integer within bounds, in bins; probabilities do not sum to 1."""
    values = np.arange(low, high + 1, dtype=np.int64)
    z = (np.log(np.arange(low, high + 2) - 0.5) - mu) / sigma
    # Differences on the side of the smaller tail keep their digits.
    upper, lower = _normal_distribution(-z), _normal_distribution(z)
    probability = np.where(z[:-1] > 0, upper[:-1] - upper[1:], lower[1:] - lower[:-1])
    kept = probability > NEGLIGIBLE * probability.max()
    if probability.sum() < LEAST_MASS:
        raise ValueError(f"{what}: less than one in a million lies within [{low}, {high}]")
    return binned(values[kept], probability[kept])


def _edges(axis: Binned, mu: float, sigma: float) -> Floats:
    """Bounds of the bins in standard normal units, shape (bins + 1,)."""
    ends = np.append(axis.first - 0.5, axis.last[-1] + 0.5)
    return np.asarray((np.log(ends) - mu) / sigma)


def _joint(z_s: Floats, z_o: Floats, probability: Floats, rho: float) -> Floats:
    """Probability of each pair of bins, shape (bins of s, bins of o).

    Gauss-Legendre over each bin of s of the normal law of the log output given the log prompt; the
    weights in a bin are scaled to its own probability.
    """
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    width = np.diff(z_s)[:, None] / 2
    z = z_s[:-1, None] + width * (1 + nodes)
    density = weights * np.exp(-(z**2) / 2)
    density *= probability[:, None] / density.sum(axis=1, keepdims=True)
    scale = math.sqrt(1 - rho**2)
    joint = np.zeros((len(probability), len(z_o) - 1))
    for node in range(QUADRATURE_NODES):
        below = _normal_distribution((z_o[None, :] - rho * z[:, node, None]) / scale)
        joint += density[:, node, None] * np.diff(below, axis=1)
    return joint


def _on_grid(
    s: Binned, o: Binned, joint: Floats, *, name: str, source: str, notes: tuple[str, ...]
) -> Workload:
    """The law with these bins: independent inside a pair of bins."""
    weight = joint[np.ix_(s.bin, o.bin)] * np.outer(s.within, o.within)
    prompt, output = np.broadcast_arrays(s.values[:, None], o.values[None, :])
    kept = weight > 0
    return stated(prompt[kept], output[kept], weight[kept], name=name, source=source, notes=notes)
