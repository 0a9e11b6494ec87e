"""A vLLM whose steps take a set time: the scheduler is vLLM's own, unchanged; the clock is held.

Loaded by `--scheduler-cls critrate_paced.PacedScheduler`. The law b = b0 + b1*tokens + b2*KV +
b3*requests comes as JSON, in seconds, in CRITRATE_STEP_TIME. How well it was kept goes to the file
CRITRATE_PACE_LOG, one line of JSON per `LOG_STEPS` steps: `t_ns` (monotonic, their end), `steps`,
`law_s`, `took_s` and `own_s` (sums over them; the last is the engine's own work, without the wait).

A step's results are held until its time is over, so that tokens leave when the emulated forward pass
ends and requests that came meanwhile are seen by the next step. A busy engine's next step starts at
that very instant: what vLLM does between two steps is inside the second. What a step is late by, a
hiccup of the machine, the next ones make up as long as it is less than `MOST_LATE_S`; beyond that the
time is lost, and the log shows it.
"""

import json
import os
import time

import vllm
from vllm.v1.core.sched.scheduler import Scheduler

WRITTEN_FOR = "0.32.0"
LOG_STEPS = 50
MOST_LATE_S = 0.1

if vllm.__version__.split("+")[0] != WRITTEN_FOR:
    raise RuntimeError(
        f"the paced scheduler is written for vLLM {WRITTEN_FOR}, this is {vllm.__version__}: vLLM's "
        "scheduler interface is not public; use that version or leave server.launch.step_time out"
    )


class PacedScheduler(Scheduler):
    """vLLM's scheduler; a step lasts as long as the law says."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if self.scheduler_config.async_scheduling:
            raise RuntimeError(
                "the paced scheduler knows one step at a time: --no-async-scheduling"
            )
        self._law = json.loads(os.environ["CRITRATE_STEP_TIME"])
        self._log = open(os.environ["CRITRATE_PACE_LOG"], "a", buffering=1)  # noqa: SIM115
        # Of the step under way: when it began by the law (None while idle), and when it really did.
        self._start_ns = None
        self._begun_ns = 0
        self._law_ns = 0
        self._sums = [0, 0, 0, 0]  # steps; ns by the law, taken, of the engine's own work

    def schedule(self, *arguments, **options):
        if self._start_ns is None:
            self._start_ns = self._begun_ns = time.monotonic_ns()
        output = super().schedule(*arguments, **options)
        counts = output.num_scheduled_tokens
        law = self._law
        # The base class has counted this step's tokens as computed already.
        kv_tokens = sum(self.requests[request].num_computed_tokens for request in counts)
        seconds = (
            law["b0_s"]
            + law["b1_s_per_token"] * output.total_num_scheduled_tokens
            + law["b2_s_per_kv_token"] * kv_tokens
            + law["b3_s_per_request"] * len(counts)
        )
        self._law_ns = round(1e9 * seconds) if counts else 0
        return output

    def update_from_output(self, scheduler_output, model_runner_output):
        if self._law_ns:
            done_ns, due_ns = time.monotonic_ns(), self._start_ns + self._law_ns
            if done_ns < due_ns:
                time.sleep((due_ns - done_ns) / 1e9)
            end_ns = time.monotonic_ns()
            self._note(end_ns, end_ns - self._begun_ns, done_ns - self._begun_ns)
            self._begun_ns = end_ns
            self._start_ns = max(due_ns, end_ns - round(1e9 * MOST_LATE_S))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self.has_unfinished_requests():
            self._start_ns = None  # idle: the next step starts when there is something to do
        return outputs

    def _note(self, end_ns, took_ns, own_ns):
        now = (1, self._law_ns, took_ns, own_ns)
        self._sums = [a + b for a, b in zip(self._sums, now, strict=True)]
        if self._sums[0] == LOG_STEPS:
            law_s, took_s, own_s = (ns / 1e9 for ns in self._sums[1:])
            line = {"t_ns": end_ns, "steps": LOG_STEPS, "law_s": law_s, "took_s": took_s}
            self._log.write(json.dumps(line | {"own_s": own_s}) + "\n")
            self._sums = [0, 0, 0, 0]
