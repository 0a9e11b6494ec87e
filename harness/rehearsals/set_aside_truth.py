"""SGLang's closed form where a share of the outputs to come is set aside, against its scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.reservation import reserving
from analysis.verdicts.second_opinion import simulated_rate
from loadgen.workload import Workload, declared, uniform

LAW = StepTime(b0_s=0.02, b1_s_per_token=1e-5)
LENGTHS = (
    ("8-56/8-56", (8, 56), (8, 56)),
    ("100-500/100-500", (100, 500), (100, 500)),
    ("16-112/64-448", (16, 112), (64, 448)),
    ("200-600/16-112", (200, 600), (16, 112)),
    ("16-240/16-240", (16, 240), (16, 240)),
)
DRAWN = 40
DRAW_SEED = 77


@dataclass(frozen=True, slots=True)
class Compared:
    """One setting, and both rates in req/s."""

    lengths: str
    factor: float
    """Declared over used."""
    limits: EngineLimits
    ratio: float
    running: float
    closed_form: Estimate
    simulated: Estimate

    @property
    def off(self) -> float:
        return self.closed_form.value / self.simulated.value - 1

    @property
    def held(self) -> bool:
        """Does the closed form's interval hold the simulated rate?"""
        return self.closed_form.low <= self.simulated.value <= self.closed_form.high


def chosen() -> Iterator[Compared]:
    """Five laws of lengths, pools for 20, 60 and 200 requests, 1, 2 and 4 times declared."""
    for name, prompt, output in LENGTHS:
        law = uniform(prompt, output)
        for requests in (20, 60, 200):
            for factor in (1.0, 2.0, 4.0):
                pool = round(_size(law) * requests * (2 if (requests, factor) == (20, 4.0) else 1))
                limits = EngineLimits(
                    num_blocks=pool,
                    block_size=1,
                    max_num_batched_tokens=2048,
                    sglang=SGLangRules(radix_cache=False),
                )
                yield compared(name, law, factor, limits)


def drawn() -> Iterator[Compared]:
    """`DRAWN` settings from one seed: lengths, pool, page, chunk, declaration and SGLang's rules."""
    rng = np.random.default_rng(DRAW_SEED)
    for _ in range(DRAWN):
        low_s, low_o = (int(x) for x in rng.integers((4, 2), 200))
        prompt, output = ((low, low * int(rng.integers(2, 12))) for low in (low_s, low_o))
        law, factor = uniform(prompt, output), float(rng.choice([1, 1.5, 3, 8]))
        page = int(rng.choice([1, 1, 16]))
        wanted = _size(law) * math.exp(rng.uniform(math.log(12), math.log(300)))
        largest = 1.3 * (prompt[1] + factor * output[1])
        limits = EngineLimits(
            num_blocks=int(max(wanted, largest)) // page,
            block_size=page,
            max_num_batched_tokens=int(rng.choice([512, 2048, 8192])),
            sglang=SGLangRules(
                radix_cache=bool(rng.random() < 0.5),
                schedule_conservativeness=float(rng.choice([1.0, 1.0, 0.3])),
            ),
        )
        yield compared(f"{low_s}-{prompt[1]}/{low_o}-{output[1]}", law, factor, limits)


def compared(name: str, law: Workload, factor: float, limits: EngineLimits) -> Compared:
    """The setting ``limits`` with outputs declared ``factor`` times, by both."""
    law = declared(replace(law, ignore_eos=False), factor=factor)
    found = reserving(law, limits)
    return Compared(
        lengths=name,
        factor=factor,
        limits=limits,
        ratio=found.ratio,
        running=found.running,
        closed_form=predict(law, limits, exact_step_time(LAW), "engine", "P0").critical_rate,
        simulated=simulated_rate(law, limits, LAW, requests=8000, seed=5),
    )


def _size(law: Workload) -> float:
    """Tokens that a request holds, about halfway through its output."""
    return law.mean(law.prompt_tokens + law.output_tokens / 2)
