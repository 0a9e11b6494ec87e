"""What a window of a production server's metrics says of its steps and of the lengths that it serves.

Counters give what was done between two samples, gauges what was held meanwhile. Together: the areas
that steps took out of each ceiling, and the moments of the law of lengths that these areas name. The
law itself is not known; `assumed_law` is one with the same moments, for the small terms that need one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.step_time import StepObservation, StepTimeFit, fit_step_time
from loadgen.workload import Workload, declared, stated

Floats = NDArray[np.float64]

LEAST_SAMPLES = 40
LEAST_REQUESTS = 50
FIT_BINS = 600
"""A window is cut into so many stretches, or fewer, to see how its steps vary."""
FIT_STEPS = 20
"""A stretch holds so many steps or more: the step under way at its ends belongs to neither side."""
LAW_POINTS = 24
"""Lengths of each kind in the assumed law."""
MOST_CV = 3.0
STARTS = 30
"""Requests in a stretch over which the prompt counter is compared with their number."""
COUNTERS = (
    *(
        "steps",
        "step_tokens",
        "prompt_tokens",
        "generation_tokens",
        "finished",
        "prefix_hit_tokens",
    ),
)


class CannotSay(Exception):
    """The metrics of this window cannot answer; the message says why and what to do."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ServingWindow:
    """Samples of one window, as increments between neighbours; arrays of shape (intervals,).

    ``running`` and ``kv_tokens`` are means of the gauges at the two ends of an interval: what is held
    between two steps, whole blocks, when those that finished have left.
    """

    limits: EngineLimits
    start_s: Floats
    """Begin of each interval, from the first sample on."""
    duration_s: Floats
    busy: Floats
    """Share of the interval in which something ran."""
    steps: Floats
    step_tokens: Floats
    """Tokens that the engine says it computed and sampled."""
    prompt_tokens: Floats
    """Prefix hits left out."""
    generation_tokens: Floats
    finished: Floats
    running: Floats
    grew: Floats
    """By how many more ran at its end."""
    kv_tokens: Floats
    arrivals: float
    """Requests that came: those that finished, and those by which the number in the system grew."""
    queued: float
    """Share of the samples that show somebody waiting."""
    preemptions: int
    hit_share: float
    """Prompt tokens that the prefix cache spared, as a share."""

    @property
    def seconds(self) -> float:
        """Its length."""
        return float(self.duration_s.sum())

    @property
    def rate(self) -> float:
        """Requests per second that came."""
        return self.arrivals / self.seconds

    @property
    def mean_prompt(self) -> float:
        """Prompt tokens per request that started."""
        return float(self.prompt_tokens.sum()) / max(float(self.started.sum()), 1.0)

    @property
    def mean_output(self) -> float:
        """Output tokens per request."""
        return float(self.generation_tokens.sum()) / max(float(self.started.sum()), 1.0)

    @property
    def started(self) -> Floats:
        """Requests whose prompt was computed: those that finished, and by how many running grew."""
        return self.finished + self.grew

    @property
    def decoded(self) -> Floats:
        """Output tokens but the first of each request: one for each running request and decode step."""
        return np.maximum(self.generation_tokens - self.started, 0.0)

    @property
    def tokens(self) -> Floats:
        """Tokens scheduled: of the step that ends a prompt the engine counts the sampled one as well."""
        return np.maximum(self.step_tokens - self.started, self.decoded)

    @property
    def residence_s(self) -> float:
        """Mean time in service, by Little's law."""
        held = float(self.running @ self.duration_s) / self.seconds
        return held / max(float(self.finished.sum()) / self.seconds, 1e-9)

    def decoding_kv(self) -> Floats:
        """Token-steps of KV held between two steps, over decode steps: context per request x tokens."""
        context = np.divide(
            self.kv_tokens, self.running, out=np.zeros_like(self.running), where=self.running > 0
        )
        return context * self.decoded


def serving_window(samples: Sequence[EngineSample], limits: EngineLimits) -> ServingWindow:
    """The window that these samples cover, in order of time.

    Raises CannotSay when they are too few, when a counter went back (a restart), or when too little was
    served in between.
    """
    if len(samples) < LEAST_SAMPLES:
        raise CannotSay(
            f"{len(samples)} samples are too few, {LEAST_SAMPLES} are needed: watch longer or oftener"
        )
    t_s = np.array([s.t_ns for s in samples], dtype=float) / 1e9
    duration_s = np.diff(t_s)
    if not (duration_s > 0).all():
        raise CannotSay("the samples are not in order of time: give them as they were recorded")
    counted = {}
    for name in COUNTERS:
        counted[name] = np.diff(np.array([getattr(s, name) for s in samples], dtype=float))
        if (counted[name] < 0).any():
            raise CannotSay(
                f"the counter {name} went back: the server was restarted; watch it again"
            )
    if counted["finished"].sum() < LEAST_REQUESTS:
        raise CannotSay(
            f"{counted['finished'].sum():.0f} requests finished in the window, {LEAST_REQUESTS} are "
            "needed: watch longer (--minutes)"
        )
    running = np.array([s.running for s in samples], dtype=float)
    waiting = np.array([s.waiting for s in samples], dtype=float)
    idle = (running + waiting == 0).astype(float)
    kv = np.array([s.kv_usage for s in samples]) * limits.pool_tokens
    in_system = running + waiting
    hits = counted["prefix_hit_tokens"]
    prompts = float(counted["prompt_tokens"].sum())
    return ServingWindow(
        limits=limits,
        start_s=t_s[:-1] - t_s[0],
        duration_s=duration_s,
        busy=1.0 - (idle[1:] + idle[:-1]) / 2,
        steps=counted["steps"],
        step_tokens=counted["step_tokens"],
        prompt_tokens=np.maximum(counted["prompt_tokens"] - hits, 0.0),
        generation_tokens=counted["generation_tokens"],
        finished=counted["finished"],
        running=(running[1:] + running[:-1]) / 2,
        grew=np.diff(running),
        kv_tokens=(kv[1:] + kv[:-1]) / 2,
        arrivals=float(counted["finished"].sum() + in_system[-1] - in_system[0]),
        queued=float((waiting > 0).mean()),
        preemptions=samples[-1].preemptions - samples[0].preemptions,
        hit_share=float(hits.sum()) / max(prompts, 1.0),
    )


# -- the step-time line of the window itself ---------------------------------------------------------


def observations(window: ServingWindow) -> list[StepObservation]:
    """Stretches of the window with what their steps held; those that were partly idle are left out."""
    each = max(
        math.ceil(FIT_STEPS * len(window.steps) / max(float(window.steps.sum()), 1.0)),
        math.ceil(len(window.steps) / FIT_BINS),
    )
    kv, found = scheduled_kv(window), []
    tokens = window.tokens
    for first in range(0, len(window.steps) - each + 1, each):
        part = slice(first, first + each)
        steps = float(window.steps[part].sum())
        if steps < FIT_STEPS / 2 or (window.busy[part] < 1).any():
            continue
        found.append(
            StepObservation(
                duration_s=float(window.duration_s[part].sum()),
                steps=steps,
                tokens=float(tokens[part].sum()),
                kv_tokens=float(kv[part].sum()),
                running=float(window.generation_tokens[part].sum()),
            )
        )
    return found


def scheduled_kv(window: ServingWindow) -> Floats:
    """Token-steps of KV that steps read: what the decoding ones hold, and each prompt once."""
    waste = (window.limits.block_size - 1) / 2
    decoding = np.maximum(window.decoding_kv() + (1 - waste) * window.decoded, 0.0)
    return decoding + window.tokens - window.decoded


def passive_fit(window: ServingWindow) -> StepTimeFit:
    """The step-time line of the window's own variation. Raises CannotSay where that is too little."""
    seen = observations(window)
    try:
        return fit_step_time(seen)
    except ValueError as error:
        raise CannotSay(
            f"the window does not vary enough to tell what of a step is fixed ({error}): watch longer, "
            "or give a calibration (--calibration)"
        ) from error


# -- a law of lengths with the window's moments ------------------------------------------------------


def assumed_law(window: ServingWindow, max_tokens: int | None = None) -> Workload:
    """Independent gamma lengths with the moments of the window; their shape is an assumption.

    The second moment of the prompts is that of the scatter of their counter (`_prompt_cv`); that of the
    outputs is what the held KV asks for: E[held] = E[s] E[o] + E[o (o - 1)] / 2, for prompt and output
    lengths that are not correlated. ``max_tokens`` is what every request declares, its output length if
    None.
    """
    s, o = max(window.mean_prompt, 1.0), max(window.mean_output, 1.0)
    cv_s = _prompt_cv(window, s)
    requests = max(float(window.started.sum()), 1.0)
    held = float(scheduled_kv(window).sum()) / requests
    square = 2.0 * (held - s * o) + o
    cv_o = math.sqrt(max(square / o**2 - 1.0, 0.0))
    longest = window.limits.pool_tokens // 4
    prompts, outputs = (
        _gamma(s, min(cv_s, MOST_CV), longest),
        _gamma(o, min(cv_o, MOST_CV), longest),
    )
    if max_tokens is not None:
        outputs = np.minimum(outputs, max_tokens)
    law = stated(
        np.repeat(prompts, len(outputs)),
        np.tile(outputs, len(prompts)),
        np.full(len(prompts) * len(outputs), 1.0 / (len(prompts) * len(outputs))),
        name=f"gamma {s:.0f} (cv {cv_s:.2f})/{o:.0f} (cv {cv_o:.2f})",
        source="moments of the metrics",
    )
    return law if max_tokens is None else declared(law, max_tokens=max_tokens)


def _prompt_cv(window: ServingWindow, mean: float) -> float:
    """Coefficient of variation of the prompts, from how the prompt counter scatters.

    About the requests that started meanwhile it scatters by the lengths alone, but for those under way
    at the ends; for Poisson arrivals, E[s^2] / E[s] is also its variance over its mean. Both are too
    large where their premise fails: the smaller is taken.
    """
    tokens, started = window.prompt_tokens, window.started
    arrivals = float(np.var(tokens, ddof=1)) / max(float(tokens.mean()), 1e-9) / mean - 1.0
    each = math.ceil(STARTS * len(tokens) / max(float(started.sum()), 1.0))
    count = len(tokens) // each
    if count < 2:
        return math.sqrt(max(arrivals, 0.0))
    binned = [x[: count * each].reshape(count, each).sum(axis=1) for x in (tokens, started)]
    rest = binned[0] - mean * binned[1]
    lengths = float(rest @ rest) / max(float(binned[1].sum()), 1.0) / mean**2
    return math.sqrt(max(min(arrivals, lengths), 0.0))


def _gamma(mean: float, cv: float, longest: int) -> NDArray[np.int64]:
    """Equally likely lengths with this mean and about this coefficient of variation."""
    if cv < 1e-3:
        return np.array([max(round(mean), 1)], dtype=np.int64)
    at = (np.arange(LAW_POINTS) + 0.5) / LAW_POINTS
    values = gammaincinv(1 / cv**2, at)
    values = 1 + (values / values.mean() - 1) * cv / (values.std() / values.mean())
    lengths: NDArray[np.int64] = np.clip(np.rint(mean * values), 1, longest).astype(np.int64)
    return lengths
