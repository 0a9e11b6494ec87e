"""The engine's own word on its steps beside what a client saw: ratios per design, with their scatter.

Every source counts or times the same stretch of a probe as its observation does, so that engine over
client is 1 where both are right. Designs are kept apart: one that differs is named, whatever the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.calibration.probe_readings import ProbeResult
from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, interval_text, percent, seconds, value_text
from analysis.numbers.quantiles import student_quantile
from analysis.schedulers.step_time import StepObservation, StepTimeFit

TOLERANCE = 0.01
"""Engine and client agree where the interval of their ratio comes this close to 1: a client sees a
token after the network, and a log rounds."""

Pair = tuple[ProbeResult, StepObservation]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossCheck:
    """Engine over client for one quantity.

    ``ratio`` is the mean over all probes, ``designs`` holds each design's own; the error is that of
    repeated probes. ``agrees`` is None where the source is not shown or does not claim the same.
    """

    source: str
    quantity: str
    ratio: Estimate | None
    designs: dict[str, Estimate]
    agrees: bool | None
    text: str


def cross_checks(pairs: Sequence[Pair], fit: StepTimeFit) -> tuple[CrossCheck, ...]:
    """Every source that engines are known to show, in a fixed order; absent ones say so."""
    return (
        _compared("step counter", "steps while the client waits for tokens", pairs, _counted_steps),
        *_iteration_log(pairs),
        *_loads(pairs, fit),
    )


# -- one comparison --------------------------------------------------------------------------------


def _compared(
    source: str,
    quantity: str,
    pairs: Sequence[Pair],
    engine_over_client: Callable[[Pair], float | None],
) -> CrossCheck:
    ratios: dict[str, list[float]] = {}
    for pair in pairs:
        value = engine_over_client(pair)
        if value is not None:
            ratios.setdefault(pair[0].probe.name, []).append(value)
    if not ratios:
        return CrossCheck(
            source=source,
            quantity=quantity,
            ratio=None,
            designs={},
            agrees=None,
            text="not shown by this server",
        )
    designs, spread = _by_design(ratios)
    everything = np.concatenate(list(ratios.values()))
    mean = _interval(float(everything.mean()), everything, len(everything) - 1, spread=None)
    differing = [name for name, ratio in designs.items() if not _agrees(ratio)]
    agrees = _agrees(mean) and not differing
    text = f"engine / client {estimate_text(mean)}, one probe scatters by {percent(spread)}"
    if not agrees:
        text += ": THEY DISAGREE"
        named = [f"{n} {value_text(designs[n])} {interval_text(designs[n])}" for n in differing]
        text += f" in {', '.join(named)}" if named else " on average"
    return CrossCheck(
        source=source, quantity=quantity, ratio=mean, designs=designs, agrees=agrees, text=text
    )


def _by_design(ratios: dict[str, list[float]]) -> tuple[dict[str, Estimate], float]:
    """Each design's mean with the error that the repeats of all designs tell; their scatter."""
    count = sum(len(v) for v in ratios.values())
    dof = count - len(ratios)
    squares = sum(float(np.sum((np.array(v) - np.mean(v)) ** 2)) for v in ratios.values())
    spread = float(np.sqrt(squares / dof)) if dof else float("nan")
    designs = {
        name: _interval(float(np.mean(v)), np.array(v), dof, spread, tests=len(ratios))
        for name, v in ratios.items()
    }
    return designs, spread


def _interval(
    value: float, values: np.ndarray, dof: int, spread: float | None, tests: int = 1
) -> Estimate:
    """A mean with its 95 % interval; of several ``tests`` together (Bonferroni)."""
    if dof < 1:
        return Estimate(value, -np.inf, np.inf, 0.95, "", "a single probe: no scatter known")
    each = float(values.std(ddof=1)) if spread is None else spread
    half = student_quantile(1 - 0.025 / tests, dof) * each / np.sqrt(len(values))
    return Estimate(value, value - half, value + half, 0.95, "", f"mean of {len(values)} probes")


def _agrees(ratio: Estimate) -> bool:
    return bool(ratio.low <= 1 + TOLERANCE and ratio.high >= 1 - TOLERANCE)


# -- any engine: its counter of steps --------------------------------------------------------------


def _counted_steps(pair: Pair) -> float | None:
    """Steps that the counter gained between two of its readings, over the client's in that time.

    The readings are the first and the last of the time that was observed.
    """
    result, seen = pair
    inside = [x for x in result.samples if x.read_ns >= seen.begin_ns and x.t_ns <= seen.end_ns]
    if len(inside) < 3:
        return None
    first, last = inside[0], inside[-1]
    between_s = (last.read_ns + last.t_ns - first.read_ns - first.t_ns) / 2e9
    return (last.steps - first.steps) / (between_s * seen.steps / seen.duration_s)


# -- vLLM: its iteration log -----------------------------------------------------------------------


def _iteration_log(pairs: Sequence[Pair]) -> list[CrossCheck]:
    source = "iteration log of vLLM"
    checks = [
        _compared(source, "tokens of the same steps", pairs, _logged_tokens),
        _compared(source, "time of the same steps", pairs, _logged_time),
    ]
    timed = checks[1]
    if timed.ratio is not None and timed.ratio.high < 1 - TOLERANCE:
        outside = [
            (1 - ratio) * seen.duration_s / seen.steps
            for result, seen in pairs
            if (ratio := _logged_time((result, seen))) is not None
        ]
        text = (
            f"{timed.text}. The log times the wait for the forward pass: "
            f"{seconds(float(np.mean(outside)))} of a step, on average, lie outside of it (scheduling, "
            "bookkeeping, a step time that is set, and the pass itself where the engine's own process "
            "computes it)"
        )
        checks[1] = CrossCheck(
            source=source,
            quantity=timed.quantity,
            ratio=timed.ratio,
            designs=timed.designs,
            agrees=False,
            text=text,
        )
    return checks


def _own_iterations(pair: Pair) -> list[tuple[float, float]] | None:
    """Tokens and seconds of the steps that were observed.

    The request is the last to finish among those that decode: its steps are the last ones that decode.
    """
    result, seen = pair
    lines = result.told.iterations
    if not lines:
        return None
    decoding = [i for i in lines if i.generation_requests > 0]
    end = len(decoding) - round(seen.left_out_steps)
    begin = end - round(seen.steps)
    if begin < 0:
        return None
    return [(i.generation_tokens + i.context_tokens, i.elapsed_s) for i in decoding[begin:end]]


def _logged_tokens(pair: Pair) -> float | None:
    own = _own_iterations(pair)
    return None if own is None else sum(tokens for tokens, _ in own) / pair[1].tokens


def _logged_time(pair: Pair) -> float | None:
    own = _own_iterations(pair)
    return None if own is None else sum(elapsed for _, elapsed in own) / pair[1].duration_s


# -- SGLang: sums over decode steps, time of prefill steps -----------------------------------------


def _loads(pairs: Sequence[Pair], fit: StepTimeFit) -> list[CrossCheck]:
    alone = [p for p in pairs if not p[0].probe.prompts]
    beside = [p for p in pairs if p[0].probe.prompts]
    source = "/v1/loads of SGLang"
    return [
        _compared(source, "time of a decode step", alone, _moment_time),
        _compared(source, "time of decode and prompt steps", beside, _moment_and_prompt_time),
        _compared(source, "prompt tokens computed", pairs, _computed_prompts),
        _line(pairs, fit),
    ]


def _decode_step_s(result: ProbeResult) -> float | None:
    moments = result.told.decode_moments
    return None if moments is None or not moments[0] else moments[2] / moments[0] * 1e-6


def _moment_time(pair: Pair) -> float | None:
    """The engine's sums are of all of a probe's steps: so is the client's time here."""
    step_s, seen = _decode_step_s(pair[0]), pair[1]
    if step_s is None:
        return None
    return step_s * (seen.steps + seen.left_out_steps) / (seen.duration_s + seen.left_out_s)


def _moment_and_prompt_time(pair: Pair) -> float | None:
    """All prompts and the decode steps, over the time from the first sending to the last token.

    None where a prompt came after that token.
    """
    result, seen = pair
    told, step_s, probe = result.told, _decode_step_s(result), result.probe
    sent = [r.sent_ns for r in result.records if r.sent_ns is not None]
    if step_s is None or told.prefill_busy_s is None or not sent:
        return None
    last_ns = seen.end_ns + 1e9 * seen.left_out_s
    if any(r.first_token_ns is None or r.first_token_ns > last_ns for r in result.records):
        return None
    took_s = (last_ns - min(sent)) / 1e9
    return (step_s * (probe.output_tokens - 1) + told.prefill_busy_s) / took_s


def _computed_prompts(pair: Pair) -> float | None:
    """Below 1 where a cache answered for a part of the prompts."""
    computed = pair[0].told.prefill_tokens
    sent = sum(r.prompt_tokens for r in pair[0].records)
    return None if computed is None else computed / sent


def _line(pairs: Sequence[Pair], fit: StepTimeFit) -> CrossCheck:
    """t = alpha + beta b by least squares from the engine's sums, where contexts are short.

    Beside it the client's law at the same batches and context.
    """
    source, quantity = "/v1/loads of SGLang", "line t = alpha + beta b of short contexts"
    short = [p for p in pairs if p[0].probe.name in ("alone", "few", "short")]
    told = [(p, p[0].told.decode_moments) for p in short if p[0].told.decode_moments is not None]
    n, b, us, bb, bus = (sum(m[i] for _, m in told) for i in range(5))
    spread = n * bb - b * b
    if n == 0 or spread <= 0:
        return CrossCheck(
            source=source,
            quantity=quantity,
            ratio=None,
            designs={},
            agrees=None,
            text="not shown by this server",
        )
    beta_s = (n * bus - b * us) / spread * 1e-6
    alpha_s = us / n * 1e-6 - beta_s * b / n
    context = sum(o.kv_tokens for (_, o), _ in told) / sum(o.running for (_, o), _ in told)
    law = fit.law
    slope_s = law.b1_s_per_token + law.b3_s_per_request + law.b2_s_per_kv_token * context
    text = (
        f"the engine says {seconds(alpha_s)} + {seconds(beta_s)} x requests, the client's law "
        f"{seconds(law.b0_s)} + {seconds(slope_s)} x requests at a context of {context:.0f} tokens"
    )
    return CrossCheck(
        source=source, quantity=quantity, ratio=None, designs={}, agrees=None, text=text
    )
