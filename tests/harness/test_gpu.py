"""The real bindings against a small libnvidia-ml, built here, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.machine.gpu import NoGpu, open_gpus

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("nvml_stand_in.c")
GIB = 2**30
Seen = Callable[..., Any]
OPEN = """
import json, os
from dataclasses import asdict
from harness.machine.gpu import NoGpu, open_gpus
gpus = open_gpus()
def told(reading):
    return json.loads(json.dumps(asdict(reading)))
"""
READ = OPEN + "print(json.dumps(gpus.reason if isinstance(gpus, NoGpu) else told(gpus.read())))"
DESCRIBE = OPEN + "print(json.dumps(gpus.describe())); gpus.close()"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What a program prints, as JSON, that finds the stand-in as its NVML library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for a stand-in of libnvidia-ml")
    built: dict[str, Path] = {}

    def library(functions: str) -> Path:
        folder = built.get(functions) or tmp_path_factory.mktemp("nvml")
        if functions not in built:
            flags = ["-DOLD_ONLY=1", "-DNEW_ONLY=2", "-DALL=3", f"-DFUNCTIONS={functions}"]
            command = [compiler, "-shared", "-fPIC", *flags, "-o", "libnvidia-ml.so.1", str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, cwd=folder)
            built[functions] = folder
        return folder

    def run(program: str, functions: str = "ALL", **answers: str) -> Any:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("NVML_")} | {
            "LD_LIBRARY_PATH": str(library(functions)),
            "PYTHONPATH": str(ROOT),
            **{f"NVML_{name}": value for name, value in answers.items()},
        }
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)

    return run


def test_the_absence_of_a_gpu_is_stated_with_its_reason() -> None:
    reader = open_gpus()
    if not isinstance(reader, NoGpu):
        reader.close()
        pytest.skip("this machine has a GPU")
    assert reader.reason.startswith("NVML cannot start: ")


def test_two_cards_are_read_whole(seen: Seen) -> None:
    reading = seen(READ, UNCORRECTED="2")
    large, small = reading["samples"]
    assert large.pop("t_ns") > 0
    assert large == {
        "gpu": 0,
        "mig": None,
        "utilization": 0.97,
        "memory_bytes": 60 * GIB,
        "power_w": 300.5,
        "sm_clock_mhz": 1001,
        "memory_clock_mhz": 1002,
        "temperature_c": 61,
        "throttle_reasons": 0x44,
        "ecc_corrected": 7,
        "ecc_uncorrected": 2,
    }
    assert small["gpu"] == 1
    assert reading["events"] == reading["failures"] == []
    assert seen(DESCRIBE) == {
        "driver": "999.1",
        "gpus": [
            {"index": 0, "name": "Large", "memory_bytes": 80 * GIB},
            {"index": 1, "name": "Small", "memory_bytes": 80 * GIB},
        ],
        "unsupported": {},
    }


@pytest.mark.parametrize(
    ("functions", "degrees", "bits"), [("OLD_ONLY", 55, 0x4), ("NEW_ONLY", 61, 0x44)]
)
def test_drivers_with_only_the_old_or_only_the_new_functions(
    seen: Seen, functions: str, degrees: int, bits: int
) -> None:
    for sample in seen(READ, functions)["samples"]:
        assert (sample["temperature_c"], sample["throttle_reasons"]) == (degrees, bits)


NOTHING = [
    ({"INIT": "9"}, "NVML cannot start: Driver Not Loaded: load the driver's kernel modules"),
    ({"INIT": "4"}, "NVML cannot start: Insufficient Permissions: give this user access"),
    ({"INIT": "18"}, "NVML cannot start: RM has detected an NVML/RM version mismatch: the driver"),
    ({"INIT": "999"}, "NVML cannot start: Unknown Error"),
    ({"COUNT": "0"}, "NVML finds no GPU"),
    (
        {"HANDLE": "15"},
        "NVML lists no GPU that can be read: GPU 0: GPU is lost; GPU 1: GPU is lost",
    ),
]


def test_why_there_is_nothing_to_read(seen: Seen) -> None:
    program = OPEN + (
        "reasons = []\n"
        f"for answers in {[answers for answers, _ in NOTHING]}:\n"
        "    asked = {f'NVML_{name}': value for name, value in answers.items()}\n"
        "    os.environ.update(asked)\n"
        "    reasons.append(open_gpus().reason)\n"
        "    [os.environ.pop(name) for name in asked]\n"
        "print(json.dumps(reasons))"
    )
    for told, (_, reason) in zip(seen(program), NOTHING, strict=True):
        assert told.startswith(reason)


def test_one_lost_card_does_not_hide_the_other(seen: Seen) -> None:
    record = seen(DESCRIBE, HANDLE="15@0")
    assert record["gpus"] == [
        {"index": 0, "unreadable": "GPU is lost"},
        {"index": 1, "name": "Small", "memory_bytes": 80 * GIB},
    ]


def test_what_a_card_refuses_for_good_is_none_and_stated_with_the_reason(seen: Seen) -> None:
    program = OPEN + (
        "os.environ['NVML_POWER'] = '0'\n"
        "print(json.dumps([gpus.describe()['unsupported'], told(gpus.read())]))"
    )
    # Not supported, no permission, no such function, and one that the driver no longer has.
    codes = {"UTILIZATION": "3@1", "POWER": "4@1", "ECC": "13@1", "REASONS": "26@1"}
    unsupported, reading = seen(program, **codes, REGISTER="3@1")
    assert unsupported == {
        "GPU 1": {
            "utilization": "Not Supported",
            "power_w": "Insufficient Permissions",
            "throttle_reasons": "text of the library",
            "ecc_corrected": "Function Not Found",
            "ecc_uncorrected": "Function Not Found",
            "xid events": "Not Supported",
        }
    }
    large, small = reading["samples"]
    assert None not in {v for k, v in large.items() if k != "mig"}
    assert {k for k, v in small.items() if v is None} == {"mig", *unsupported["GPU 1"]} - {
        "xid events"
    }
    assert reading["failures"] == [], "what never answers is not asked again"


def test_a_gpu_lost_while_it_is_read_ends_alone_and_is_not_asked_again(seen: Seen) -> None:
    program = OPEN + (
        "readings = []\n"
        "for code in ('0', '15@1', '0'):\n"
        "    os.environ['NVML_CLOCK'] = code\n"
        "    readings.append(told(gpus.read()))\n"
        "print(json.dumps([readings, [asdict(e) for e in gpus.lost]]))"
    )
    readings, lost = seen(program)
    assert [[s["gpu"] for s in r["samples"]] for r in readings] == [[0, 1], [0], [0]]
    events = [r["events"] for r in readings]
    assert events == [[], lost, []]
    (event,) = lost
    assert (event["gpu"], event["kind"], event["text"]) == (1, "lost", "GPU is lost")


def test_what_fails_once_is_a_gap_and_counted(seen: Seen) -> None:
    """One query times out; then nothing of that card answers; then all is well again."""
    program = OPEN + (
        "queries = ('POWER', 'MEMORY', 'UTILIZATION', 'CLOCK', 'TEMPERATURE', 'REASONS', 'ECC')\n"
        "readings = []\n"
        "for asked, code in ((queries[:1], '10@0'), (queries, '999@0'), (queries, '0')):\n"
        "    os.environ.update({f'NVML_{query}': code for query in asked})\n"
        "    readings.append(told(gpus.read()))\n"
        "print(json.dumps(readings))"
    )
    once, nothing, well = seen(program)
    assert [s["power_w"] for s in once["samples"]] == [None, 300.5]
    assert once["samples"][0]["memory_bytes"] == 60 * GIB
    assert once["failures"] == ["GPU 0: power_w: Timeout"]
    assert [s["gpu"] for s in nothing["samples"]] == [1]
    assert len(nothing["failures"]) == 9
    assert [s["power_w"] for s in well["samples"]] == [300.5, 300.5]
    assert well["failures"] == []
    assert not any(r["events"] for r in (once, nothing, well))


def test_mig_instances_are_listed_and_what_they_do_not_tell_is_stated(seen: Seen) -> None:
    program = OPEN + "print(json.dumps([gpus.describe(), told(gpus.read())]))"
    record, reading = seen(program, MIG="1")
    instances = [
        {"index": i, "name": "Small MIG 1g.10gb", "memory_bytes": 10 * GIB} for i in (0, 2)
    ]
    assert record["gpus"][1]["mig_instances"] == instances
    assert "mig_instances" not in record["gpus"][0]
    no = "Not Supported"
    assert record["unsupported"] == {
        "GPU 1": {"utilization": no, "ecc_corrected": no, "ecc_uncorrected": no},
        "MIG instances": {"all but memory_bytes": "told of the whole card, if at all"},
    }
    samples = reading["samples"]
    assert [(s["gpu"], s["mig"]) for s in samples] == [(0, None), (1, None), (1, 0), (1, 2)]
    parent, first, _ = samples[1:]
    assert parent["utilization"] is parent["ecc_uncorrected"] is None
    assert (parent["power_w"], parent["memory_bytes"]) == (300.5, 60 * GIB)
    told = {k: v for k, v in first.items() if v is not None and k != "t_ns"}
    assert told == {"gpu": 1, "mig": 0, "memory_bytes": 5 * GIB}


def test_a_driver_that_knows_nothing_of_mig_has_no_instances(seen: Seen) -> None:
    assert len(seen(READ, MIG="1", MIG_MODE="13")["samples"]) == 2


def test_xid_errors_are_told_once_and_of_the_right_card(seen: Seen) -> None:
    program = OPEN + (
        "one = gpus.only([d for d in gpus.devices if d.gpu == 0], 'a test')\n"
        "first = told(gpus.read())\n"
        "os.environ['NVML_XIDS'] = '3'\n"
        "print(json.dumps([first, told(gpus.read()), told(gpus.read()), told(one.read())]))"
    )
    first, second, third, other = seen(program, XID_CARD="1", XIDS="2")
    assert [(e["gpu"], e["kind"], e["text"]) for e in first["events"]] == [(1, "xid", "79")] * 2
    assert [e["text"] for e in second["events"]] == ["79"]
    assert third["events"] == other["events"] == []
    assert len(third["samples"]) == 2
    assert [s["gpu"] for s in other["samples"]] == [0]


def test_when_xid_errors_can_no_longer_be_had_this_is_said_once(seen: Seen) -> None:
    program = OPEN + "print(json.dumps([told(gpus.read()), told(gpus.read())]))"
    first, second = seen(program, XIDS="1", WAIT="15")
    assert first["failures"] == ["XID errors are no longer reported: GPU is lost"]
    assert second["failures"] == []
    assert len(first["samples"]) == len(second["samples"]) == 2


def test_a_driver_that_hangs_at_the_start_is_no_gpu_and_holds_nothing_up(seen: Seen) -> None:
    program = OPEN.replace("open_gpus()", "open_gpus(timeout_s=0.2)")
    start_s = time.monotonic()
    reason = seen(program + "print(json.dumps(gpus.reason))", INIT_SLEEP_MS="60000")
    assert reason.startswith("the NVIDIA driver did not answer for 0.2 s")
    assert time.monotonic() - start_s < 15.0


SAMPLED = (
    OPEN
    + """
import asyncio, time
import aiohttp
from aiohttp import web
from harness.live import sampler
from harness.servers.engines import VLLM
NAMES = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_hits_total "
    "num_preemptions_total prompt_tokens_total generation_tokens_total request_success_total "
    "iteration_tokens_total_count iteration_tokens_total_sum"
)
PAGE = "".join(f"vllm:{name} 0.0\\n" for name in NAMES.split())
sampler.GPU_FINISH_S = 0.5

async def main():
    async def metrics(_):
        return web.Response(text=PAGE)
    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    samples, rows, stop = [], [], asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.call_later(0.2, os.environ.update, {"NVML_SLEEP_MS": os.environ["NVML_THEN_SLEEP_MS"]})
    loop.call_later(0.9, stop.set)
    async with aiohttp.ClientSession() as session:
        stats = await sampler.sample_engine(
            session, url, VLLM, 0.02, stop, samples.append, gpus=gpus, on_gpu=rows.extend
        )
    await runner.cleanup()
    return stats, samples, rows

stats, samples, rows = asyncio.run(main())
print(json.dumps([told(stats), [s.read_ns for s in samples], [r.t_ns for r in rows]]))
"""
)


@pytest.mark.parametrize(("sleep_ms", "hangs"), [("100", False), ("60000", True)])
def test_a_driver_that_sleeps_delays_no_sample_of_the_engine(
    seen: Seen, sleep_ms: str, hangs: bool
) -> None:
    """From 0.2 s on each query of two cards sleeps; 35 ticks of 20 ms are due after that."""
    start_s = time.monotonic()
    stats, read_ns, gpu_ns = seen(SAMPLED, THEN_SLEEP_MS=sleep_ms)
    assert time.monotonic() - start_s < 20.0, "a call that hangs must not hold the program back"
    asleep_ns = gpu_ns[0] + 250_000_000
    ticks = [t for t in read_ns if t > asleep_ns]
    assert len(ticks) > 12, "one tick a read of 200 ms would be four"
    assert stats["ticks"] == len(read_ns)
    assert stats["longest_gap_s"] < 0.5
    assert stats["gpu_missed"] > len(ticks) / 2
    if hangs:
        assert stats["gpu_error"].startswith("NVML had not answered for ")
        assert max(gpu_ns) < asleep_ns
    else:
        assert stats["gpu_error"] is None
        assert 2 <= len([t for t in gpu_ns if t > asleep_ns]) <= 2 * 5
