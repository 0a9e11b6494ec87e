"""Steps of a set time, for an engine that calls these verbs around its own.

The law b = b0 + b1*tokens + b2*KV + b3*requests is CRITRATE_STEP_TIME, JSON, in seconds. How well
it was kept goes to the file CRITRATE_PACE_LOG, one line of JSON per `LOG_STEPS` steps: `t_ns`
(monotonic, their end), `steps`, `law_s`, `took_s` and `own_s` (sums over them; the last is the engine's
own work, without the wait).

A step's results are held until its time is over, so that tokens leave when the emulated forward pass
ends and requests that came meanwhile are seen by the next step. A busy engine's next step starts at
that very instant: what an engine does between two steps is inside the second. What a step is late by, a
hiccup of the machine, the next ones make up as long as it is less than `MOST_LATE_S`; beyond that the
time is lost, and the log shows it.
"""

import json
import os
import time

LOG_STEPS = 50
MOST_LATE_S = 0.1


class Pace:
    """The step under way: when it began, and how long it is to last."""

    def __init__(self):
        self._law = json.loads(os.environ["CRITRATE_STEP_TIME"])
        self._log = open(os.environ["CRITRATE_PACE_LOG"], "a", buffering=1)  # noqa: SIM115
        # When it began by the law (None while idle), and when it really did.
        self._start_ns = None
        self._begun_ns = 0
        self._law_ns = 0
        self._sums = [0, 0, 0, 0]  # steps; ns by the law, taken, of the engine's own work

    def begin(self):
        """A step is about to be chosen. Of a busy engine it began when the last one ended."""
        if self._start_ns is None:
            self._start_ns = self._begun_ns = time.monotonic_ns()

    def set(self, tokens, kv_tokens, requests):
        """What the step computes, and the KV that it holds when it ends; nothing if it is empty."""
        law = self._law
        seconds = (
            law["b0_s"]
            + law["b1_s_per_token"] * tokens
            + law["b2_s_per_kv_token"] * kv_tokens
            + law["b3_s_per_request"] * requests
        )
        self._law_ns = round(1e9 * seconds) if requests else 0

    def hold(self):
        """The step was computed: wait until its time is over."""
        if not self._law_ns:
            return
        done_ns, due_ns = time.monotonic_ns(), self._start_ns + self._law_ns
        if done_ns < due_ns:
            time.sleep((due_ns - done_ns) / 1e9)
        end_ns = time.monotonic_ns()
        self._note(end_ns, end_ns - self._begun_ns, done_ns - self._begun_ns)
        self._begun_ns = end_ns
        self._start_ns = max(due_ns, end_ns - round(1e9 * MOST_LATE_S))

    def rest(self):
        """Nothing is left to do: the next step starts when there is."""
        self._start_ns = None

    def _note(self, end_ns, took_ns, own_ns):
        now = (1, self._law_ns, took_ns, own_ns)
        self._sums = [a + b for a, b in zip(self._sums, now, strict=True)]
        if self._sums[0] == LOG_STEPS:
            law_s, took_s, own_s = (ns / 1e9 for ns in self._sums[1:])
            line = {"t_ns": end_ns, "steps": LOG_STEPS, "law_s": law_s, "took_s": took_s}
            self._log.write(json.dumps(line | {"own_s": own_s}) + "\n")
            self._sums = [0, 0, 0, 0]
