"""How many requests a run may have in flight at once, for so many files must be free; how it ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from analysis.schedulers.engine import EngineLimits, EngineSample
from harness.configs.config import ExperimentConfig
from harness.live import offer as offers
from harness.live.offer import SPARE_IN_FLIGHT, Stage, most_in_flight, offer, workers_of
from harness.live.ray_load import NodeClock, Offset
from harness.live.sampler import SamplerStats, ServerGone
from harness.live.target import Target
from harness.machine.display import Countdown, Display
from harness.machine.gpu import NoGpu
from harness.machine.gpu_reader import GpuEvent
from harness.records.store import Store
from harness.servers.engines import VLLM
from harness.servers.server_limits import ServerLimits
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


@pytest.mark.parametrize(
    ("workers", "url", "rate", "expected"),
    [
        # Each request streams 50 tokens.
        ("auto", "http://a", 200.0, 1),
        ("auto", "http://a", 201.0, 2),
        ("auto", "https://a", 201.0, 1),
        (1, "http://a", 201.0, 1),
        (3, "http://a", 1.0, 3),
    ],
)
def test_processes_are_as_many_as_stated_or_as_the_tokens_take(
    workers: Any, url: str, rate: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "usable_cores", lambda: 2)
    config = ExperimentConfig.model_validate(
        {
            "name": "x",
            "server": {"url": url},
            "workload": {"fixed": {"prompt": 8, "output": 50}},
            "load": {"workers": workers},
        }
    )
    assert workers_of(config, [url], config.law(), rate) == expected


def test_several_processes_do_not_go_with_tls() -> None:
    server = {"url": "https://a"}
    workload = {"fixed": {"prompt": 8, "output": 8}}
    given = {"name": "x", "server": server, "workload": workload, "load": {"workers": 2}}
    with pytest.raises(ValueError, match="plain HTTP alone"):
        ExperimentConfig.model_validate(given)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({"cluster": "auto"}, "`workers` must say how many"),
        ({"cluster": "local:two", "workers": 2}, "say how many workers"),
    ],
)
def test_a_cluster_must_say_how_many_senders(load: dict[str, Any], words: str) -> None:
    server, workload = {"url": "https://a"}, {"fixed": {"prompt": 8, "output": 8}}
    given = {"name": "x", "server": server, "workload": workload, "load": load}
    with pytest.raises(ValueError, match=words):
        ExperimentConfig.model_validate(given)
    # Machines of a cluster speak TLS too.
    given["load"] = {"cluster": "local:2", "workers": 2}
    assert ExperimentConfig.model_validate(given).load.workers == 2


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
    store = Store.create(tmp_path / "out")
    with pytest.raises(ServerGone):
        offered(store, 1)
    end = store.read_json("runs/00-1.00/end.json")
    assert end["reason"] == "server gone"
    assert end["sampler"]["failures"] == 4
    assert end["sampler"]["gpu_events"] == [
        {"t_ns": 5, "gpu": 1, "kind": "lost", "text": "GPU is lost"}
    ]


def test_each_of_several_servers_has_a_stream_and_every_other_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls: list[str] = []

    async def seen(*given: Any, **_: Any) -> SamplerStats:
        _, url, _, _, stop, on_sample = given
        port = int(url.rpartition(":")[2])
        on_sample(EngineSample(**{**dict.fromkeys(EngineSample.__slots__, 0), "waiting": port}))
        await stop.wait()
        return SamplerStats(
            ticks=port,
            missed=0,
            failures=0,
            longest_gap_s=0.1,
            last_failure=None,
            scrape_p50_ms=1.0,
            scrape_p99_ms=2.0,
        )

    @contextlib.asynccontextmanager
    async def ready(_: Any, __: Any, to: Any, *___: Any, **____: Any) -> AsyncIterator[Any]:
        urls.extend(to)

        async def load(*_: Any) -> None:
            await asyncio.sleep(0.01)

        yield load

    async def at_once(*_: Any) -> None:
        return None

    for name, made in (("sample_engine", seen), ("ready_load", ready), ("idle", at_once)):
        monkeypatch.setattr(offers, name, made)
    store = Store.create(tmp_path / "out")
    offered(store, 2)
    assert urls == ["http://127.0.0.1:1/v1/completions", "http://127.0.0.1:2/v1/completions"]
    stored = store.read_run("00-1.00")
    assert [[sample.waiting for sample in own] for own in stored.by_replica] == [[1], [2]]
    assert stored.end is not None
    assert [stats["ticks"] for stats in stored.end["samplers"]] == [1, 2]


def test_a_cluster_takes_the_place_of_this_machine_and_its_clocks_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    clock = NodeClock("a-node", Offset(1, 2, 3), Offset(4, 5, 6))

    @contextlib.asynccontextmanager
    async def ready(*given: Any, **_: Any) -> AsyncIterator[Any]:
        asked.extend(given[:2])

        async def load(*_: Any) -> tuple[str, ...]:
            return ()

        yield SimpleNamespace(offer=load, clocks=(clock,), stopped_ns=None)

    async def seen(*given: Any, **_: Any) -> None:
        await given[4].wait()

    async def at_once(*_: Any) -> None:
        return None

    for name, made in (("sample_engine", seen), ("ready_senders", ready), ("idle", at_once)):
        monkeypatch.setattr(offers, name, made)
    store = Store.create(tmp_path / "out")
    offered(store, 1, cluster="local:2", workers=2)
    assert asked == ["local:2", 2]
    (kept,) = store.read_json("runs/00-1.00/clocks.json")["clocks"]
    assert kept["node"] == "a-node"
    assert kept["after"] == {"at_ns": 4, "offset_ns": 5, "error_ns": 6}


def offered(store: Store, servers: int, **load: Any) -> None:
    """Offer a minute's run to servers that nobody answers for."""
    mock = {"num_blocks": 64, "block_size": 16, "step_time": {"b0_ms": 1}}
    config = ExperimentConfig.model_validate(
        {
            "name": "x",
            "server": {"mock": mock},
            "workload": {"fixed": {"prompt": 8, "output": 8}},
            "load": load,
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
    run = Run(id="00-1.00", arrival_rate=5.0, horizon_s=60.0, warmup_s=1.0, seed=1)

    async def driven() -> None:
        async with aiohttp.ClientSession() as session:
            targets = tuple(
                Target(f"http://127.0.0.1:{port}", VLLM, session, shown, limits, lambda: None)
                for port in range(1, servers + 1)
            )
            with Display(Console(quiet=True), quiet=True) as display:
                stage = Stage(config, targets, config.law(), store, display, NoGpu("none"), 5.0)
                await offer(stage, run, "digest", Countdown(60.0))

    asyncio.run(driven())
