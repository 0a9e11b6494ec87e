"""The pool that occupancy implies, on engines whose pool is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.calibration.implied_pool import implied_pool
from analysis.calibration.probe_readings import ProbeResult
from analysis.calibration.probes import design_probes
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime
from loadgen.workload import Workload, uniform

LAW = StepTime(b0_s=0.014, b1_s_per_token=1e-5, b2_s_per_kv_token=4e-7)
SHORT = uniform((16, 112), (16, 112))
VLLM = EngineLimits(num_blocks=512, block_size=16, max_num_batched_tokens=2048)
SGLANG_SMALL = EngineLimits(num_blocks=2048, block_size=1, sglang=SGLangRules())
SGLANG = EngineLimits(num_blocks=8192, block_size=1, sglang=SGLangRules())


def probed(
    limits: EngineLimits,
    shown: EngineLimits,
    workload: Workload = SHORT,
    law: StepTime = LAW,
) -> list[ProbeResult]:
    """The probes for the pool that is shown, served by the pool that is there."""
    results = []
    for probe in design_probes(workload, shown):
        lengths = [(probe.prompt_tokens, probe.output_tokens, probe.output_tokens)] * probe.count
        lengths += [(probe.prompt_length, 1, 1)] * probe.prompts
        arrivals = [0.0] * probe.count + [0.04 * (i + 1) for i in range(probe.prompts)]
        run = simulate(limits, law, np.array(arrivals), np.array(lengths), 60.0, 0.05)
        results.append(
            ProbeResult(probe=probe, records=tuple(run.records), samples=tuple(run.samples))
        )
    return results


@pytest.mark.parametrize("limits", [VLLM, SGLANG, replace(VLLM, block_size=32, num_blocks=300)])
@pytest.mark.parametrize("truth", [1.0, 1.5])
def test_the_pool_that_is_there_is_found_whatever_is_shown(
    limits: EngineLimits, truth: float
) -> None:
    there = replace(limits, num_blocks=round(truth * limits.num_blocks))
    found = implied_pool(probed(there, limits), limits)
    assert found is not None and found.unit == "tokens"
    assert found.low <= there.pool_tokens <= found.high
    assert found.half_width < 0.02 * there.pool_tokens


def test_a_pool_that_the_probes_hardly_touch_is_not_guessed() -> None:
    there = replace(VLLM, num_blocks=512 * 40)
    assert implied_pool(probed(there, VLLM), VLLM) is None


@pytest.mark.parametrize(
    ("limits", "law"),
    [
        # The paper's own pool: steps that compute prompts last three times as long as others.
        (
            EngineLimits(num_blocks=4094, block_size=32, max_num_batched_tokens=512),
            StepTime(b0_s=0.02147, b1_s_per_token=79e-6),
        ),
        # Steps so short that dozens lie between two samples, and requests that end all at once.
        (SGLANG_SMALL, StepTime(b0_s=0.002)),
        # As on a GPU with chunks of 8 192: twenty times as long.
        (
            EngineLimits(num_blocks=27_000, block_size=16, max_num_batched_tokens=8192),
            StepTime(b0_s=0.008, b1_s_per_token=2.5e-5, b2_s_per_kv_token=3e-8),
        ),
    ],
)
def test_requests_that_were_slowed_by_the_prompts_of_others_hold_no_more_for_it(
    limits: EngineLimits, law: StepTime
) -> None:
    found = implied_pool(probed(limits, limits, uniform((10, 1600), (10, 1600)), law), limits)
    assert found is not None
    assert found.low <= limits.pool_tokens <= found.high
    assert found.half_width < 0.005 * limits.pool_tokens
