"""Sends the probes to a server that is otherwise idle, and keeps what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from analysis.calibration.probe_readings import ProbeResult
from analysis.calibration.probes import Probe
from analysis.schedulers.engine import EngineSample
from harness.servers.engines import EngineFacts
from harness.servers.step_sources import SourceReading, read_sources, told_between
from loadgen.client import complete
from loadgen.exchange import TimedStream
from loadgen.mendable import Mendable
from loadgen.prompts import completion_body, make_prompts
from loadgen.request_record import RequestRecord, TokenRead

SAMPLE_INTERVAL_S = 0.05
SETTLE_S = 0.15
FIRST_TOKEN_POLL_S = 0.001
PROBE_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 60.0


class CalibrationFailed(Mendable):
    """The probes did not give what a step-time law needs; the message says which and why."""


@dataclass(eq=False)
class Prober:
    """One server, and the samples that are being taken of it."""

    session: aiohttp.ClientSession
    url: str
    facts: EngineFacts
    model: str
    vocabulary: range
    samples: list[EngineSample]
    sampling: asyncio.Task[Any]
    log: Path | None
    """What the server writes, where it was started here."""
    _idle: tuple[EngineSample, SourceReading] | None = field(default=None, init=False)
    """As the last probe left the server: nothing was sent since."""

    async def warm_up(self, probes: Sequence[Probe], seed: int) -> None:
        """A cold engine is slower: compile, allocate and connect before anything counts."""
        await self.until_idle()
        for probe in probes:
            few, short = min(probe.count, 64), min(probe.output_tokens, 8)
            await self.send(replace(probe, count=few, output_tokens=short), seed + 7)

    async def run(self, probe: Probe, seed: int) -> ProbeResult:
        """Send one probe to the idle server and wait until it is idle again."""
        before, told_before = self._idle or await self._at_rest()
        self._idle = None
        records, reads = await self.send(probe, seed)
        after, told_after = await self._at_rest()
        finished = after.finished - before.finished
        if finished != len(probe.lengths):
            raise CalibrationFailed(
                f"the server finished {finished} requests during probe {probe.name!r} of "
                f"{len(probe.lengths)}: somebody else is using it; calibrate on an idle server"
            )
        self._idle = after, told_after
        during = (x for x in self.samples if before.t_ns <= x.t_ns <= after.t_ns)
        told = told_between(told_before, told_after, self.log)
        return ProbeResult(
            probe=probe,
            records=tuple(records),
            reads=tuple(reads),
            samples=tuple(during),
            told=told,
        )

    async def _at_rest(self) -> tuple[EngineSample, SourceReading]:
        sample = await self.until_idle()
        return sample, await read_sources(self.session, self.url, self.facts, self.log)

    async def send(
        self, probe: Probe, seed: int
    ) -> tuple[list[RequestRecord], list[tuple[TokenRead, ...]]]:
        """All requests of a probe, the following prompts in turn; every one must complete.

        Returns their records and when their tokens came.
        """
        lengths = probe.lengths
        prompts = make_prompts([prompt for prompt, _ in lengths], seed, self.vocabulary)
        bodies = [
            completion_body(self.model, prompt, output, output)
            for prompt, (_, output) in zip(prompts, lengths, strict=True)
        ]

        streams = [TimedStream() for _ in lengths]

        async def one(index: int) -> RequestRecord:
            prompt, output = lengths[index]
            record = await complete(
                self.session,
                f"{self.url}/v1/completions",
                bodies[index],
                id=index,
                scheduled_ns=time.monotonic_ns(),
                prompt_tokens=prompt,
                output_tokens_designed=output,
                max_tokens=output,
                timeout_s=PROBE_TIMEOUT_S,
                stream=streams[index],
            )
            if record.outcome == "unfinished":
                # A cancelled request ends with a record; here the cancellation has to go on.
                raise asyncio.CancelledError
            return record

        async def all_of_them() -> list[RequestRecord]:
            async with asyncio.TaskGroup() as group:
                batch = [group.create_task(one(i)) for i in range(probe.count)]
                while probe.prompts and not all(
                    task.done() or stream.first_token_ns is not None
                    for task, stream in zip(batch, streams, strict=False)
                ):
                    await asyncio.sleep(FIRST_TOKEN_POLL_S)
                followers = [await one(i) for i in range(probe.count, len(lengths))]
            return [*(task.result() for task in batch), *followers]

        sent = asyncio.create_task(all_of_them())
        try:
            await asyncio.wait({sent, self.sampling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A probe that was sent in full has a result; one that a dead server holds does not.
            if not sent.done():
                sent.cancel()
                await asyncio.gather(sent, return_exceptions=True)
        if sent.cancelled():
            await self.sampling
            raise CalibrationFailed("sampling ended before the calibration did")
        records = sent.result()
        for r in records:
            if r.outcome != "completed" or r.output_tokens != r.output_tokens_designed:
                raise CalibrationFailed(
                    f"probe {probe.name!r}: a request of {r.prompt_tokens} + "
                    f"{r.output_tokens_designed} tokens was {r.outcome} with {r.output_tokens} "
                    f"output tokens ({r.error or 'no error'})"
                )
        return records, [stream.token_reads() for stream in streams]

    async def until_idle(self, timeout_s: float = IDLE_TIMEOUT_S) -> EngineSample:
        """The first sample read a little after now with nothing waiting or running."""
        asked_ns = time.monotonic_ns() + round(SETTLE_S * 1e9)
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.sampling.done():
                await self.sampling
                raise CalibrationFailed("sampling ended before the calibration did")
            if self.samples and self.samples[-1].read_ns >= asked_ns:
                latest = self.samples[-1]
                if latest.waiting == 0 and latest.running == 0:
                    return latest
            await asyncio.sleep(SAMPLE_INTERVAL_S / 2)
        raise CalibrationFailed(
            f"the server was not idle for {timeout_s:.0f} s: stop other clients before calibrating"
        )
