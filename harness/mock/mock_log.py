"""The mock server's step log: what came, what was scheduled, step by step."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import IO

from analysis.schedulers.engine import Engine, Step
from harness.mock.mock_books import Job

LOG_FLUSH_S = 1.0


class StepLogFile:
    """One JSON line per step, written once a second.

    ``submissions`` ([id, prompt_tokens, output_tokens, max_tokens, ignore_eos, receive_ns]) and
    ``aborts`` (ids) are those that took effect at the step's nominal start ``start_ns``, in this
    order; ``waiting``, ``running``, ``free_blocks`` and ``preemptions`` (since the start of the
    engine) hold once the step has been scheduled. Given each submission's step, a replay through a
    fresh engine is exact.
    """

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._file: IO[str] = path.open("w")
        self._loop = loop
        self._lines: list[str] = []
        self._submissions: list[list[int]] = []
        self._aborts: list[int] = []
        self._timer = loop.call_later(LOG_FLUSH_S, self._flush)

    def joined(self, job: Job) -> None:
        request = job.request
        self._submissions.append(
            [
                request.id,
                request.prompt_tokens,
                request.output_tokens,
                request.max_tokens,
                request.ignore_eos,
                job.receive_ns,
            ]
        )

    def left(self, job: Job) -> None:
        self._aborts.append(job.request.id)

    def step(self, start_ns: int, step: Step, engine: Engine) -> None:
        row = {
            "step": step.index,
            "start_ns": start_ns,
            "submissions": self._submissions,
            "aborts": self._aborts,
            "waiting": len(engine.waiting),
            "running": len(engine.running),
            "free_blocks": engine.free_blocks,
            "preemptions": engine.preemptions,
            "tokens": step.tokens,
            "kv_tokens": step.kv_tokens,
        }
        self._lines.append(json.dumps(row, separators=(",", ":")) + "\n")
        self._submissions, self._aborts = [], []

    def close(self) -> None:
        self._timer.cancel()
        self._file.writelines(self._lines)
        self._file.close()

    def _flush(self) -> None:
        self._file.writelines(self._lines)
        self._file.flush()
        self._lines.clear()
        self._timer = self._loop.call_later(LOG_FLUSH_S, self._flush)
