from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.gpu import NoGpu, open_gpus

ROOT = Path(__file__).resolve().parents[2]
# The part of NVML that a reader calls: two cards, the second of which knows less.
STAND_IN = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;
#ifndef INIT
#define INIT 0
#endif
static int cards[2];
#define IS_SECOND(device) ((int *)(device) == &cards[1])
int nvmlInitWithFlags(unsigned flags) { return INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "text"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    strncpy(text, "999.1", size); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = COUNT; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = &cards[i]; return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) {
    strncpy(text, IS_SECOND(device) ? "Small" : "Large", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory_t *m) {
    m->total = 80ull << 30; m->used = 60ull << 30; m->free = m->total - m->used; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *u) {
    u->gpu = 97; u->memory = 40; return IS_SECOND(device) ? 3 : 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) {
    *mw = 300500; return IS_SECOND(device) ? SECOND_POWER : 0; }
int nvmlDeviceGetClockInfo(void *device, int type, unsigned *mhz) {
    *mhz = 1000 + type; return 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *c) { *c = 61; return 0; }
#ifndef OLD
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *bits) {
    *bits = 0x4 | 0x40; return 0; }
#endif
"""
READ = """
import dataclasses, json
from harness.gpu import *
reader = open_gpus()
if isinstance(reader, NoGpu):
    print(json.dumps({"none": reader.reason}))
else:
    try:
        samples = [dataclasses.asdict(s) for s in reader.read()]
        print(json.dumps({"samples": samples, **reader.describe()}))
    except GpuLost as error:
        print(json.dumps({"lost": str(error)}))
    reader.close()
"""


def read_with_stand_in(folder: Path, **defines: int) -> dict[str, Any]:
    """What a process sees that finds the stand-in as its NVML library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for a stand-in of libnvidia-ml")
    source, library = folder / "nvml.c", folder / "libnvidia-ml.so.1"
    source.write_text(STAND_IN)
    values = {"COUNT": 2, "SECOND_POWER": 4, **defines}
    flags = [f"-D{name}={value}" for name, value in values.items()]
    subprocess.run(
        [compiler, "-shared", "-fPIC", *flags, "-o", str(library), str(source)],
        check=True,
        capture_output=True,
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_absence_of_a_gpu_is_stated_with_its_reason() -> None:
    reader = open_gpus()
    if not isinstance(reader, NoGpu):
        reader.close()
        pytest.skip("this machine has a GPU")
    assert reader.reason.startswith("NVML cannot start: ")


def test_two_cards_one_of_which_knows_less(tmp_path: Path) -> None:
    seen = read_with_stand_in(tmp_path)
    large, small = seen["samples"]
    assert large.pop("t_ns") > 0
    assert large == {
        "gpu": 0,
        "utilization": 0.97,
        "memory_bytes": 60 << 30,
        "power_w": 300.5,
        "sm_clock_mhz": 1001,
        "temperature_c": 61,
        "throttle_reasons": 0x44,
    }
    assert (small["gpu"], small["utilization"], small["power_w"]) == (1, None, None)
    assert small["sm_clock_mhz"] == 1001
    assert seen["driver"] == "999.1"
    assert [gpu["name"] for gpu in seen["gpus"]] == ["Large", "Small"]
    assert seen["gpus"][0]["memory_bytes"] == 80 << 30
    assert seen["unsupported"] == {"1": ["utilization", "power_w"]}


def test_a_driver_without_a_query_gives_none(tmp_path: Path) -> None:
    assert read_with_stand_in(tmp_path, OLD=1)["samples"][0]["throttle_reasons"] is None


@pytest.mark.parametrize(
    ("defines", "answer"),
    [
        ({"INIT": 9}, {"none": "NVML cannot start: Driver Not Loaded"}),
        ({"INIT": 4}, {"none": "NVML cannot start: Insufficient Permissions"}),
        ({"COUNT": 0}, {"none": "NVML started and finds no GPU"}),
        ({"SECOND_POWER": 15}, {"lost": "GPU 1 no longer answers for power_w: GPU is lost"}),
    ],
)
def test_what_can_be_wrong(tmp_path: Path, defines: dict[str, int], answer: dict[str, str]) -> None:
    assert read_with_stand_in(tmp_path, **defines) == answer
