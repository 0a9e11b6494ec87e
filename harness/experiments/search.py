"""A search on a live server: looks at fixed instants, the rule's next rate, and all that was seen."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import numpy as np

from analysis.inference.capacity import Backlog
from analysis.inference.search_rule import Design, Search, advance, begin
from analysis.inference.sequential import EMPTY, Look, Served, served
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.frames import run_frames
from analysis.verdicts.audit import binding_resource, saturation
from analysis.verdicts.evidence import OVERRUN_LIMIT
from analysis.verdicts.search_result import SearchResult, search_result
from harness.experiments.analyse import LAG_OVER_RESIDENCE, MOST_LAG_MS
from harness.live.offer import START_DELAY_S, Stage, idle, recording
from harness.live.sampler import SamplerStats, ServerGone
from harness.records.store import EndReason, Store
from loadgen.drive import Load, drive_on, extend
from loadgen.exchange import TokenStream
from loadgen.fidelity import MAX_LAG_MS, fidelity_of_stretches
from loadgen.prompts import completion_body, make_prompts
from loadgen.records import LoadFidelity, RequestRecord, Run
from loadgen.stretches import Stretch, stretch_arrivals, stretch_seed
from loadgen.workload import Workload

RUN_ID = "search"
LOOK_S = 0.5
LEAD_S = 0.05
"""So long before a stretch ends the next one is decided, drawn and encoded."""
SECOND_NS = 1_000_000_000


@dataclass(slots=True)
class Watch:
    """What has been seen so far."""

    records: list[RequestRecord] = field(default_factory=list)
    samples: list[EngineSample] = field(default_factory=list)
    ended: Served = field(default_factory=Served)
    departures: int = 0
    summed: int = 0
    """Records in ``ended``."""
    looked: int = 0
    """Samples that an earlier look has used."""

    def look(self, load: Load, before: Look) -> Look:
        """What stands at this moment; gauges over the samples since the look ``before``."""
        load.catch_up()
        now_ns = time.monotonic_ns()
        fresh, self.summed = self.records[self.summed :], len(self.records)
        self.departures += sum(record.outcome == "completed" for record in fresh)
        self.ended += _served(
            (r.prompt_tokens, r.output_tokens, r.first_token_ns, r.last_token_ns) for r in fresh
        )
        under_way = _served(
            (load.lengths[3 * index], _received(stream), stream.first_token_ns, now_ns)
            for index, stream in load.streams.items()
        )
        seen = self.ended + under_way
        samples = self.samples[self.looked :] or self.samples[-1:]
        self.looked = len(self.samples)
        gone = self.departures
        return Look(
            t_s=(now_ns - load.start_ns) / SECOND_NS,
            arrivals=load.sent,
            departures=gone,
            waiting=samples[-1].waiting if samples else before.waiting,
            waiting_least=min((s.waiting for s in samples), default=0),
            running=float(np.mean([s.running for s in samples])) if samples else before.running,
            work=seen.work,
            residence_s=self.ended.ages_s / gone if gone else math.nan,
            memory_s=seen.memory_s,
        )


def _received(stream: TokenStream) -> int:
    counted, _ = stream.usage_counts()
    return stream.content_events if counted is None else counted


def _served(requests: Iterable[tuple[int, int, int | None, int | None]]) -> Served:
    """Of requests as prompt tokens, tokens received, and when the first and last came; None: never."""
    rows = [
        (prompt, tokens, (last_ns - first_ns) / SECOND_NS)
        for prompt, tokens, first_ns, last_ns in requests
        if first_ns is not None and last_ns is not None
    ]
    return served(*np.array(rows, dtype=float).reshape(-1, 3).T)


@dataclass(slots=True)
class Log:
    """The search as it goes: every stretch offered, every look taken, where the rule stands."""

    search: Search
    looks: list[Look]
    stretches: list[Stretch] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)


async def search_live(
    stage: Stage, design: Design, seed: int, prediction_digest: str = ""
) -> SearchResult:
    """Drive one search to its end. The folder holds all that was seen, however it ends.

    When cancelled, search.json is written from what was seen and the cancellation goes on. Raises
    ServerGone, ServerFailed, TooFewFileDescriptors and MissingMetric.
    """
    await idle(stage.target, stage.display)
    watch = Watch()
    log = Log(begin(design), [EMPTY])
    start_ns = time.monotonic_ns() + round(START_DELAY_S * SECOND_NS)
    run = Run(
        id=RUN_ID,
        arrival_rate=design.first_rate,
        horizon_s=design.max_duration_s,
        warmup_s=0.0,
        seed=seed,
    )
    stage.store.begin_run(run, start_ns, datetime.now(UTC).isoformat(), prediction_digest)
    reason: EndReason = "interrupted"
    stats: SamplerStats | None = None
    try:
        async with recording(stage, RUN_ID, watch.samples.append) as (write, sampling):

            def on_record(record: RequestRecord) -> None:
                write(record)
                watch.records.append(record)

            driving = asyncio.create_task(
                drive_on(
                    stage.target.session,
                    (f"{stage.target.url}/v1/completions",),
                    start_ns,
                    on_record,
                    lambda load: decide(stage, design, load, watch, log, seed),
                    send_delay_s=stage.config.load.send_delay_ms / 1e3,
                )
            )
            try:
                await asyncio.wait({driving, sampling.task}, return_when=asyncio.FIRST_COMPLETED)
                if not driving.done():
                    reason = "server gone"
            finally:
                driving.cancel()
                results = await asyncio.gather(driving, return_exceptions=True)
            if isinstance(results[0], Exception):
                raise results[0]
            if reason != "server gone":
                reason = "horizon"
            (stats,) = await sampling.finish()
    except ServerGone as error:
        stats = error.stats
        raise
    finally:
        end_ns = start_ns + round(log.looks[-1].t_s * SECOND_NS)
        stage.store.end_run(RUN_ID, end_ns, reason, stats)
        result = concluded(stage, design, log, watch, run, start_ns)
        write_search(stage.store, design, log, result)
    return result


async def decide(
    stage: Stage, design: Design, load: Load, watch: Watch, log: Log, seed: int
) -> None:
    """Stretch after stretch, each drawn before it begins, until the rule says that it is finished."""
    for index in itertools.count():
        stretch = Stretch(
            index=index,
            start_s=index * LOOK_S,
            end_s=(index + 1) * LOOK_S,
            rate=log.search.rate,
            seed=seed,
        )
        arrival_s = stretch_arrivals(stretch)
        lengths = stage.workload.sample(
            np.random.default_rng([stretch_seed(seed, index), 1]), len(arrival_s)
        )
        bodies = _bodies(stage, lengths, stretch_seed(seed, index))
        extend(load, arrival_s, bodies, lengths, stretch.end_s)
        log.stretches.append(stretch)
        due_ns = load.start_ns + round((stretch.end_s - LEAD_S) * SECOND_NS)
        await asyncio.sleep(max(due_ns - time.monotonic_ns(), 0) / SECOND_NS)
        log.looks.append(watch.look(load, log.looks[-1]))
        log.search = advance(design, log.search, log.looks)
        log.phases.append(log.search.phase)
        share = log.looks[-1].t_s / design.max_duration_s
        stage.display.phase(f"{log.search.phase}: {log.search.rate:.4g} req/s", share)
        stage.display.load(len(load.flying), load.sent)
        if log.search.phase == "finished":
            return


def _bodies(
    stage: Stage, lengths: np.ndarray[tuple[int, int], np.dtype[np.int64]], seed: int
) -> list[bytes]:
    vocabulary = stage.config.load.vocabulary
    prompts = make_prompts(lengths[:, 0], seed, range(*vocabulary))
    return [
        completion_body(
            stage.target.shown.model_id,
            prompt,
            int(o),
            int(declared),
            ignore_eos=stage.workload.ignore_eos,
            stop_id=vocabulary[1] - 1,
        )
        for prompt, (_, o, declared) in zip(prompts, lengths, strict=True)
    ]


# -- afterwards ----------------------------------------------------------------------------------


def concluded(
    stage: Stage, design: Design, log: Log, watch: Watch, run: Run, start_ns: int
) -> SearchResult:
    """The result with what binds and whether the load was what we claim."""
    end_s = log.looks[-1].t_s
    warnings = _late(stage, watch)
    fidelity: LoadFidelity | None = None
    if end_s > 0:
        residence_s = log.looks[-1].residence_s
        lag_ms = max(MAX_LAG_MS, min(LAG_OVER_RESIDENCE * residence_s * 1e3, MOST_LAG_MS))
        fidelity = fidelity_of_stretches(log.stretches, watch.records, end_s, start_ns, lag_ms)
    binding = binds(stage.target.limits, stage.workload, log.search, watch, run, start_ns)
    result = search_result(design, log.search, log.looks, binding, fidelity, warnings)
    # Some may have been sent after the last look.
    return replace(result, requests=len(watch.records))


def _late(stage: Stage, watch: Watch) -> tuple[str, ...]:
    """A mock server that could not keep its step time was not the server that it should have been."""
    server = stage.config.server
    if server is None or server.mock is None or len(watch.samples) < 2:
        return ()
    first, last = watch.samples[0], watch.samples[-1]
    share = (last.overrun_steps - first.overrun_steps) / max(last.steps - first.steps, 1)
    if share <= OVERRUN_LIMIT:
        return ()
    return (f"mock server: {100 * share:.1f} % of its steps ran late: give it a core of its own",)


def binds(
    limits: EngineLimits,
    workload: Workload,
    search: Search,
    watch: Watch,
    run: Run,
    start_ns: int,
) -> str:
    """Which ceiling refused requests while measured; "unknown" where nothing was."""
    if not search.measured:
        return "unknown"
    window = Backlog(search.measured[0].start_s, search.measured[-1].end_s)
    if window.duration_s <= 0:
        return "unknown"
    end_ns = start_ns + round(window.end_s * SECOND_NS)
    frames = run_frames(run, start_ns, end_ns, watch.records, watch.samples)
    saturated = saturation(frames, window, limits, workload)
    return "unknown" if saturated is None else binding_resource(saturated, limits)


def write_search(store: Store, design: Design, log: Log, result: SearchResult) -> None:
    """search.json: the result, the design, stretches of one rate joined, every look with its phase."""
    joined = []
    for rate, group in itertools.groupby(log.stretches, key=lambda stretch: stretch.rate):
        same = list(group)
        joined.append({"rate": rate, "start_s": same[0].start_s, "end_s": same[-1].end_s})
    looks = [
        {"phase": phase, **asdict(look)}
        for phase, look in zip(log.phases, log.looks[1:], strict=False)
    ]
    store.write_json(
        "search.json",
        {
            "result": result.to_dict(),
            "design": asdict(design),
            "measured": [asdict(stretch) for stretch in log.search.measured],
            "stretches": joined,
            "looks": looks,
        },
    )
