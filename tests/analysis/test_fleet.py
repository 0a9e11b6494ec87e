"""A whole fleet against its replicas one by one."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.operation.fleet import fleet_waits
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime

LAW = StepTime(b0_s=0.01, b1_s_per_token=1e-5, b2_s_per_kv_token=1e-7)
VLLM = EngineLimits(num_blocks=64, block_size=16, max_num_batched_tokens=256)
LIMITS = {
    "vLLM": VLLM,
    "async": EngineLimits(num_blocks=64, block_size=16, async_scheduling=True),
    "SGLang": EngineLimits(num_blocks=1024, block_size=1, sglang=SGLangRules()),
}


def load(rate: float, count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    prompt, output = rng.integers(4, 60, count), rng.integers(4, 40, count)
    arrival_s = np.cumsum(rng.exponential(1 / rate, count))
    return arrival_s, np.stack([prompt, output, output], axis=1)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_round_robin_is_every_nth_request_of_a_replica_alone(name: str, replicas: int) -> None:
    arrival_s, lengths = load(50.0 * replicas, 150 * replicas)
    waits = fleet_waits(LIMITS[name], LAW, arrival_s, lengths, replicas)
    for index in range(replicas):
        own = slice(index, None, replicas)
        run = simulate(LIMITS[name], LAW, arrival_s[own], lengths[own], 1e3, 1e3, compiled=False)
        alone = run.rows["first_s"] - run.rows["arrival_s"]
        np.testing.assert_allclose(waits[own], alone, rtol=1e-9)


def test_erlang_gaps_stand_for_the_whole_fleet() -> None:
    """The shortcut of sizing: one replica with gaps of variance 1/N has the waits of the fleet."""
    replicas, rate, each, late_s = 8, 68.0, 800, 0.03
    arrival_s, lengths = load(rate * replicas, each * replicas)
    waits = fleet_waits(VLLM, LAW, arrival_s, lengths, replicas)
    fleet = [(waits[i::replicas][200:] > late_s).mean() for i in range(replicas)]
    alone = []
    for seed in range(16):
        rng = np.random.default_rng([seed, 3])
        gaps_s = rng.gamma(replicas, 1 / replicas / rate, each)
        run = simulate(VLLM, LAW, np.cumsum(gaps_s), load(1.0, each, seed)[1], 1e3, 1e3)
        alone.append(((run.rows["first_s"] - run.rows["arrival_s"])[200:] > late_s).mean())
    errors = [float(np.std(late, ddof=1)) / len(late) ** 0.5 for late in (fleet, alone)]
    assert 0.01 < np.mean(alone) < 0.5
    assert np.mean(fleet) == pytest.approx(np.mean(alone), abs=3 * float(np.hypot(*errors)))


def test_looking_at_the_queues_waits_less_and_a_lost_replica_more() -> None:
    arrival_s, lengths = load(72.0 * 4, 1600)
    tail = {
        (router, lost): np.quantile(
            fleet_waits(VLLM, LAW, arrival_s, lengths, 4, router, True, lost), 0.95
        )
        for router in ("round-robin", "least-loaded")
        for lost in (None, 2.0)
    }
    assert tail["least-loaded", None] < tail["round-robin", None]
    for router in ("round-robin", "least-loaded"):
        assert tail[router, 2.0] > tail[router, None]


def test_what_cannot_be_is_refused() -> None:
    arrival_s, lengths = load(10.0, 5)
    with pytest.raises(ValueError, match="two where one is lost"):
        fleet_waits(VLLM, LAW, arrival_s, lengths, 1, lost_from_s=0.0)
    with pytest.raises(ValueError, match="none of round-robin"):
        fleet_waits(VLLM, LAW, arrival_s, lengths, 1, "random")  # type: ignore[arg-type]
