"""Engine over client: one where both are right, named where they are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.calibration.cross_checks import CrossCheck, cross_checks
from analysis.calibration.probe_readings import EngineWord, Iteration, ProbeResult, step_observation
from analysis.calibration.probes import design_probes
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import Simulation, simulate
from analysis.schedulers.step_time import StepTime, fit_step_time
from loadgen.workload import uniform

LIMITS = EngineLimits(num_blocks=512, block_size=16, max_num_batched_tokens=2048)
LAW = StepTime(b0_s=0.014, b1_s_per_token=1e-5, b2_s_per_kv_token=4e-7, b3_s_per_request=1e-5)


def told(run: Simulation, slower: float, outside_s: float) -> EngineWord:
    """What a vLLM and an SGLang would tell of these steps, all of them decodes of everybody."""
    steps = run.steps
    held = (steps.tokens.tolist(), steps.duration_s.tolist(), steps.running.tolist())
    rows = list(zip(*held, strict=True))
    iterations = tuple(
        Iteration(
            context_requests=int(tokens > running),
            context_tokens=int(tokens - running) if tokens > running else 0,
            generation_requests=int(running) if index else 0,
            generation_tokens=int(min(tokens, running)),
            elapsed_s=slower * (duration_s - outside_s),
        )
        for index, (tokens, duration_s, running) in enumerate(rows)
    )
    pure = [(b, 1e6 * slower * s) for tokens, s, b in rows[1:] if tokens == b]
    sums = [(1.0, b, us, b * b, b * us) for b, us in pure]
    prompts = [(tokens, s) for tokens, s, b in rows if tokens > b]
    return EngineWord(
        iterations=iterations,
        decode_moments=tuple(map(sum, zip(*sums, strict=True))),
        prefill_tokens=int(sum(tokens for tokens, _ in prompts)),
        prefill_busy_s=sum(s for _, s in prompts),
    )


def checked(
    slower: float = 1.0, outside_s: float = 0.0, quiet: bool = False, only: str = ""
) -> dict[str, CrossCheck]:
    """Checks of three rounds; the engine's clock runs ``slower`` in the design ``only`` or in all."""
    rng, pairs = np.random.default_rng(5), []
    for probe in 3 * design_probes(uniform((16, 112), (16, 112)), LIMITS):
        if probe.output_tokens == 1 or probe.prompts:
            continue
        lengths = [(probe.prompt_tokens, probe.output_tokens, probe.output_tokens)] * probe.count
        tick_s = float(rng.uniform(0.02, 0.05))
        run = simulate(LIMITS, LAW, np.zeros(probe.count), np.array(lengths), 20.0, tick_s)
        factor = slower * float(rng.normal(1, 0.002)) if only in ("", probe.name) else 1.0
        word = EngineWord() if quiet else told(run, factor, outside_s)
        result = ProbeResult(
            probe=probe, records=tuple(run.records), samples=tuple(run.samples), told=word
        )
        pairs.append((result, replace(step_observation(run.records), probe=probe.name)))
    fit = fit_step_time([seen for _, seen in pairs], ("b0", "b1", "b2"))
    return {f"{c.source}: {c.quantity}": c for c in cross_checks(pairs, fit)}


COUNTER = "step counter: steps while the client waits for tokens"
LOG_TOKENS = "iteration log of vLLM: tokens of the same steps"
LOG_TIME = "iteration log of vLLM: time of the same steps"
MOMENTS = "/v1/loads of SGLang: time of a decode step"
LINE = "/v1/loads of SGLang: line t = alpha + beta b of short contexts"


def test_an_engine_that_tells_the_truth_agrees_everywhere() -> None:
    checks = checked()
    for name in (COUNTER, LOG_TOKENS, LOG_TIME, MOMENTS):
        check = checks[name]
        assert check.agrees is True, check.text
        assert check.ratio is not None and check.ratio.value == pytest.approx(1.0, abs=0.02)
    assert "x requests" in checks[LINE].text


def test_a_clock_that_runs_differently_is_said_to() -> None:
    checks = checked(slower=1.1)
    for name in (LOG_TIME, MOMENTS):
        assert checks[name].agrees is False and "DISAGREE" in checks[name].text
        assert checks[name].ratio is not None
        assert checks[name].ratio.value == pytest.approx(1.1, abs=0.02)
    assert checks[COUNTER].agrees is True


def test_one_design_that_differs_is_named_whatever_the_mean() -> None:
    check = checked(slower=1.05, only="typical")[MOMENTS]
    assert check.agrees is False and " in typical 1.0" in check.text
    assert check.designs["half"].value == pytest.approx(1.0, abs=0.01)


def test_time_outside_of_the_forward_pass_is_said_in_seconds() -> None:
    check = checked(outside_s=0.006)[LOG_TIME]
    assert check.agrees is False and "6.0" in check.text and "scheduling" in check.text


def test_a_source_that_is_not_shown_is_no_error() -> None:
    checks = checked(quiet=True)
    for name, check in checks.items():
        if name != COUNTER:
            assert check.ratio is None and check.agrees is None
            assert check.text == "not shown by this server"
    assert checks[COUNTER].agrees is True
