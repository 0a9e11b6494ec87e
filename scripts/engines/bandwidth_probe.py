"""What a device's memory and its matrix units do, per second: bytes copied, operations of a product.

    python bandwidth_probe.py [--gpu 0] [--small]

Prints one JSON object. The Python is one that has torch: an engine's environment. On a GPU: a copy
within its memory, read and written bytes both counted, and a bfloat16 product. Without a GPU it
measures the CPU, in float32, and says so: bfloat16 ends in an illegal instruction on machines with AMX.
"""

import argparse
import json
import platform
import statistics
import time

import torch

WARM_UP, REPEATS = 3, 20


def seconds_of(call, wait):
    """Durations of the call, s, after a few that do not count."""
    taken = []
    for repeat in range(WARM_UP + REPEATS):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        if repeat >= WARM_UP:
            taken.append(time.perf_counter() - begin)
    return taken


def rate(amount, taken_s):
    """Amount per second: the median over repeats and the range."""
    rates = sorted(amount / s for s in taken_s)
    return {
        "median": statistics.median(rates),
        "low": rates[0],
        "high": rates[-1],
        "repeats": len(rates),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=int, default=0, help="as torch numbers them")
    parser.add_argument("--small", action="store_true", help="a fortieth of a second, for a test")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device, dtype = torch.device("cuda", arguments.gpu), torch.bfloat16
        wait, name = lambda: torch.cuda.synchronize(device), torch.cuda.get_device_name(device)
    else:
        device, dtype = torch.device("cpu"), torch.float32
        wait, name = lambda: None, platform.processor() or platform.machine()
    size_bytes = 2**30 if on_gpu else 2**26
    side = 8192 if on_gpu else 768
    if arguments.small:
        size_bytes, side = size_bytes // 64, side // 8
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = rate(2 * size_bytes, seconds_of(lambda: target.copy_(source), wait))
    # Random numbers: products of zeros draw less power, and so run at higher clocks.
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty(side, side, dtype=dtype, device=device)
    multiplied = seconds_of(lambda: torch.matmul(left, right, out=product), wait)
    print(
        json.dumps(
            {
                "kind": "gpu" if on_gpu else "cpu",
                "device": name,
                "torch": torch.__version__,
                "copy_bytes": size_bytes,
                "copy_bytes_per_s": copied,
                "matmul_side": side,
                "matmul_dtype": str(dtype).removeprefix("torch."),
                "matmul_flop_per_s": rate(2 * side**3, multiplied),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
