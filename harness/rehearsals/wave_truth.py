"""Equal outputs on SGLang: the rate of the walk of the waves, against its scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.reservation import reserving
from analysis.verdicts.second_opinion import simulated_rate
from harness.rehearsals.set_aside_truth import Compared
from loadgen.workload import Workload, uniform

EVEN = StepTime(b0_s=0.05)
"""Every step takes the same time, as in the walk."""
COSTLY = StepTime(b0_s=0.01, b1_s_per_token=1e-4, b3_s_per_request=5e-5)
"""A step takes up to several times as long for its tokens and requests."""
LENGTHS = (
    ("32/32", (32, 32), (32, 32)),
    ("64/64", (64, 64), (64, 64)),
    ("16/64", (16, 16), (64, 64)),
    ("256/16", (256, 256), (16, 16)),
    ("10-200/50-80", (10, 200), (50, 80)),
)
DRAWN = 24
DRAW_SEED = 78


def chosen() -> Iterator[Compared]:
    """Five laws of lengths, pools for 12, 30 and 100 requests, with the overlap schedule and without."""
    for name, prompt, output in LENGTHS:
        law = uniform(prompt, output)
        for requests in (12, 30, 100):
            for late in (False, True):
                limits = EngineLimits(
                    num_blocks=round(law.mean(law.prompt_tokens + law.output_tokens) * requests),
                    block_size=1,
                    max_num_batched_tokens=2048,
                    async_scheduling=late,
                    sglang=SGLangRules(),
                )
                yield compared(name, law, limits, EVEN)


def drawn() -> Iterator[Compared]:
    """`DRAWN` settings from one seed: lengths, pool, rows, page, chunk, schedule and step time."""
    rng = np.random.default_rng(DRAW_SEED)
    for _ in range(DRAWN):
        s, o = (round(math.exp(rng.uniform(math.log(8), math.log(400)))) for _ in range(2))
        spread = float(rng.choice([0.0, 0.0, 0.2]))
        prompt = (s, s * int(rng.integers(1, 4)))
        output = (max(round(o * (1 - spread)), 2), max(round(o * (1 + spread)), 2))
        law, page = uniform(prompt, output), int(rng.choice([1, 1, 16]))
        requests = math.exp(rng.uniform(math.log(8), math.log(150)))
        pool = max(
            law.mean(law.prompt_tokens + law.output_tokens) * requests,
            1.3 * (prompt[1] + output[1]) + 4 * page,
        )
        limits = EngineLimits(
            num_blocks=round(pool) // page,
            block_size=page,
            max_num_seqs=round(requests * float(rng.choice([0.7, 4.0, 4.0]))) + 2,
            max_num_batched_tokens=int(rng.choice([256, 2048, 8192])),
            async_scheduling=bool(rng.random() < 0.5),
            sglang=SGLangRules(radix_cache=bool(rng.random() < 0.7)),
        )
        name = f"{prompt[0]}-{prompt[1]}/{output[0]}-{output[1]}"
        yield compared(name, law, limits, EVEN if rng.random() < 0.5 else COSTLY)


def compared(name: str, law: Workload, limits: EngineLimits, step_time: StepTime) -> Compared:
    """Both rates of one setting."""
    found = reserving(law, limits)
    return Compared(
        lengths=name,
        factor=1.0,
        limits=limits,
        ratio=found.ratio,
        running=found.running,
        closed_form=predict(law, limits, exact_step_time(step_time), "engine", "P0").critical_rate,
        simulated=simulated_rate(law, limits, step_time, requests=2000, seed=5),
    )
