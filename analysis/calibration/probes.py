"""Probes below saturation: which batches to send.

At a stationary load tokens per step, resident KV and running requests are proportional, so a plain
low-load run cannot tell their coefficients apart. These batches are built to differ, and to be more
than the coefficients, so that a step time that is not linear shows: one request alone, few and many
short ones, few long and some medium ones, a typical batch and half of it, and prompts of two sizes
beside decoding requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from analysis.schedulers.engine import EngineLimits
from analysis.theory.kv_demand import kv_demand_engine, residence_steps
from loadgen.workload import Workload

DECODE_STEPS = 64
"""Decode steps of a probe: the error of two token times, some milliseconds, is spread over so many."""
FILL = 0.7
"""Largest share of the pool that a probe fills: near saturation, and safely without preemption."""
SHORT_PROMPT = 8
BUDGET_STEPS = 48
"""A burst of prompts lasts so many steps if the token budget were what the load needs per step."""
MAX_PROBE_REQUESTS = 400
BUDGET_SHARE = 0.9
"""Of a token budget, which probes find to a few percent, prompts and decodes take so much of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A batch of equal requests sent at one instant.

    While they decode, ``prompts`` further requests of ``prompt_length`` tokens and one output token
    follow one after another: each adds its prompt to one step of the batch.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    count: int
    prompts: int = 0
    prompt_length: int = 0

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, output) tokens of every request: ``count`` at once, then one after another.

        The first that follows is sent when all of the batch have their first token: a prompt that shared
        a step with theirs would be in part in a step that is observed and in part in one that is not.
        """
        batch = [(self.prompt_tokens, self.output_tokens)] * self.count
        return [*batch, *[(self.prompt_length, 1)] * self.prompts]

    def in_one_step(self, budget: int | None) -> bool:
        """Does each prompt fit one step beside the decodes? With a token budget or without one."""
        return budget is None or self.count + self.prompt_length <= budget


def design_probes(workload: Workload, limits: EngineLimits) -> list[Probe]:
    """Probes whose tokens, KV and running requests differ, sized by the pool and the workload.

    "short" is large enough to meet a ``max_num_seqs`` that would bind before the KV cache, "burst" to
    meet such a token budget. Prompts beside decodes fit a known token budget.
    """
    s, o = workload.prompt_tokens, workload.output_tokens
    chunk = int(s.max())
    per_step = limits.pool_tokens / workload.mean(kv_demand_engine(s, o, chunk))
    running = per_step * workload.mean(residence_steps(s, o, chunk))
    longest = min(limits.max_model_len or limits.pool_tokens, limits.pool_tokens)
    decode = max(2, min(DECODE_STEPS, longest - SHORT_PROMPT - 1))

    def batch(name: str, prompt: float, output: int, wanted: float) -> Probe:
        """So many requests as are wanted, or as fit.

        Where most would be through before the last prompt is in, all decode longer.
        """
        tokens = max(SHORT_PROMPT, min(round(prompt), longest - output - 1))
        if limits.mixed_budget is not None:
            prefill_steps = math.ceil(wanted * tokens / limits.mixed_budget)
            if prefill_steps > 2 * output:
                output = min(output + prefill_steps, longest // 2)
                tokens = min(tokens, longest - output - 1)
        blocks = math.ceil((tokens + output) / limits.block_size)
        count = min(round(wanted), int(FILL * limits.num_blocks / blocks), MAX_PROBE_REQUESTS)
        return Probe(name=name, prompt_tokens=tokens, output_tokens=output, count=max(1, count))

    few, some = max(2, round(running / 10)), max(3, round(running / 4))
    mean_prompt = max(round(workload.mean(s)), SHORT_PROMPT)
    long_prompt = int(FILL * limits.num_blocks / few) * limits.block_size - decode
    medium_prompt = int(FILL / 2 * limits.num_blocks / some) * limits.block_size - decode
    needed_tokens = per_step * workload.mean(s + o - 1)
    beside = max(SHORT_PROMPT, round(min(5 * needed_tokens, longest - 2, 0.2 * limits.pool_tokens)))
    small = max(SHORT_PROMPT, beside // 3)
    if limits.mixed_budget is not None:
        room = int(BUDGET_SHARE * limits.mixed_budget)
        beside, small = min(beside, room - 1), max(1, min(small, room - few))
    burst = round(min(max(32.0, needed_tokens / 4), longest - 2))
    return [
        batch("alone", SHORT_PROMPT, decode, 1),
        batch("few", SHORT_PROMPT, decode, running / 3),
        batch("short", SHORT_PROMPT, decode, 1.3 * running),
        batch("long", long_prompt, decode, few),
        batch("medium", medium_prompt, decode, some),
        batch("half", mean_prompt, decode, running / 2),
        batch("typical", mean_prompt, decode, running),
        replace(
            batch("prompts", SHORT_PROMPT, decode, 1),
            prompts=max(1, decode // 4),
            prompt_length=beside,
        ),
        replace(
            batch("small prompts", mean_prompt, decode, few),
            prompts=max(1, decode // 4),
            prompt_length=small,
        ),
        Probe(
            name="burst",
            prompt_tokens=burst,
            output_tokens=1,
            count=max(4, min(MAX_PROBE_REQUESTS, math.ceil(BUDGET_STEPS * needed_tokens / burst))),
        ),
    ]
