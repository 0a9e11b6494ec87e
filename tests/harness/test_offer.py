"""How many requests a run may have in flight at once, for so many files must be free; how it ends."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from analysis.engine import EngineLimits
from harness import offer as offers
from harness.config import ExperimentConfig
from harness.display import Countdown, Display
from harness.engines import VLLM
from harness.gpu import NoGpu
from harness.gpu_reader import GpuEvent
from harness.offer import SPARE_IN_FLIGHT, Stage, most_in_flight, offer
from harness.sampler import SamplerStats, ServerGone
from harness.server_limits import ServerLimits
from harness.store import Store
from harness.target import Target
from loadgen.records import Run


@pytest.mark.parametrize(
    ("rate", "preload", "expected"),
    [
        # Half of the predicted 10 req/s: what is offered above 5 may stay.
        (4.0, 0, SPARE_IN_FLIGHT),
        (10.0, 0, 5_000 + SPARE_IN_FLIGHT),
        (20.0, 0, 15_000 + SPARE_IN_FLIGHT),
        (10.0, 700, 700 + 5_000 + SPARE_IN_FLIGHT),
        (4.0, 700, 700 + SPARE_IN_FLIGHT),
    ],
)
def test_the_burst_may_be_in_flight_whole(rate: float, preload: int, expected: int) -> None:
    run = Run(
        id="00-1.00", arrival_rate=rate, horizon_s=1000.0, warmup_s=1.0, seed=1, preload=preload
    )
    assert most_in_flight(preload + round(rate * 1000.0), run, 10.0) == expected


def test_no_more_are_in_flight_than_are_offered() -> None:
    run = Run(id="00-1.00", arrival_rate=1.0, horizon_s=60.0, warmup_s=1.0, seed=1, preload=30)
    assert most_in_flight(90, run, 10.0) == 90


def test_what_the_sampler_saw_is_kept_when_the_server_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is lost takes its engine along: the run must still tell of it."""
    event = GpuEvent(5, 1, "lost", "GPU is lost")
    stats = SamplerStats(
        ticks=9,
        missed=0,
        failures=4,
        longest_gap_s=3.0,
        last_failure="refused",
        scrape_p50_ms=1.0,
        scrape_p99_ms=2.0,
        gpu_events=(event,),
    )

    async def gone(*_: Any, **__: Any) -> SamplerStats:
        raise ServerGone("http://127.0.0.1:1", 3.0, stats)

    async def at_once(*_: Any) -> None:
        return None

    monkeypatch.setattr(offers, "sample_engine", gone)
    monkeypatch.setattr(offers, "idle", at_once)
    mock = {"num_blocks": 64, "block_size": 16, "step_time": {"b0_ms": 1}}
    config = ExperimentConfig.model_validate(
        {
            "name": "x",
            "server": {"mock": mock},
            "workload": {"fixed": {"prompt": 8, "output": 8}},
        }
    )
    shown = ServerLimits(
        engine="vllm",
        version=None,
        model_id="m",
        max_model_len=None,
        num_blocks=64,
        block_size=16,
        num_blocks_given=False,
        prefix_caching=None,
        cache_dtype=None,
    )
    limits = EngineLimits(num_blocks=64, block_size=16)
    store = Store.create(tmp_path / "out")
    run = Run(id="00-1.00", arrival_rate=5.0, horizon_s=60.0, warmup_s=1.0, seed=1)

    async def driven() -> None:
        async with aiohttp.ClientSession() as session:
            target = Target("http://127.0.0.1:1", VLLM, session, shown, limits, lambda: None)
            with Display(Console(quiet=True), quiet=True) as display:
                stage = Stage(config, target, config.law(), store, display, NoGpu("none"), 5.0)
                await offer(stage, run, "digest", Countdown(60.0))

    with pytest.raises(ServerGone):
        asyncio.run(driven())
    end = store.read_json("runs/00-1.00/end.json")
    assert end["reason"] == "server gone"
    assert end["sampler"]["failures"] == 4
    assert end["sampler"]["gpu_events"] == [
        {"t_ns": 5, "gpu": 1, "kind": "lost", "text": "GPU is lost"}
    ]
