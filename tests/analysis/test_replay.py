"""The scheduler models at the instants of real engines, and what the comparison itself can see."""

import gzip
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.schedulers.engine import Engine, EngineLimits, Request, Step
from analysis.schedulers.recording import Recording, RecordingDamaged, recording_of
from analysis.schedulers.replay import agreement
from analysis.schedulers.scheduler import engine_of

RECORDINGS = Path(__file__).parent / "real_steps"
SMALL = EngineLimits(num_blocks=24, block_size=4, max_num_seqs=8, max_num_batched_tokens=32)
STEP_NS = 10_000


def real(name: str) -> Recording:
    return Recording.from_dict(
        json.loads(gzip.decompress((RECORDINGS / f"{name}.json.gz").read_bytes()))
    )


NAMES = sorted(path.name.removesuffix(".json.gz") for path in RECORDINGS.glob("*.gz"))


def test_there_is_a_recording_of_each_kind() -> None:
    assert sum(n.startswith("vllm") for n in NAMES) >= 4
    assert sum(n.startswith("sglang") for n in NAMES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_model_departs_and_preempts_as_the_real_engine(name: str) -> None:
    found = agreement(real(name))
    assert found.steps > 500 and found.departures > 100
    assert found.largest_difference <= 0.01
    if found.preemptions >= 100:
        assert found.preemptions_of_model == pytest.approx(found.preemptions, rel=0.2)
    assert found.first_difference is None and found.equal_steps == found.steps


@pytest.mark.parametrize("name", NAMES)
def test_a_tenth_less_of_what_binds_is_seen_in_the_departures(name: str) -> None:
    recording = real(name)
    limits = recording.limits
    binding = "max_num_batched_tokens" if name == "vllm_1024_8" else "num_blocks"
    fewer: dict[str, Any] = {binding: int(getattr(limits, binding) * 0.9)}
    other = replace(limits, **fewer)
    found = agreement(replace(recording, limits=other))
    assert found.largest_difference > 0.02
    assert found.first_difference is not None and found.equal_steps < found.steps / 2


# -- the recording and the comparison ---------------------------------------------------------------


def events_of(limits: EngineLimits, count: int = 60, ahead: bool = False) -> list[list[Any]]:
    """What a recorder would write of a model: arrivals every 25 us, steps of 10 us one after the other.

    With ``ahead`` a step is chosen just before the step before it ends.
    """
    rng = np.random.default_rng(3)
    engine = engine_of(limits)
    lengths = rng.integers(3, 20, (count, 2)).tolist()
    events: list[list[Any]] = []
    in_flight: list[Step] = []
    come, now_ns, preempted = 0, 0, 0
    while come < count or engine.running or engine.waiting:
        now_ns += STEP_NS
        while come < count and come * 25_000 <= now_ns - 2:
            events.append(["arrival", now_ns - 2, *lengths[come], 1])
            engine.submit(Request(come, *lengths[come]))
            come += 1
        if not ahead and in_flight:
            events.append(["end", now_ns - 1, ended(engine, in_flight.pop())])
        step = engine._schedule()
        counts = (len(step.scheduled), step.tokens) if step else (0, 0)
        books = (len(engine.running), len(engine.waiting), engine.free_blocks)
        events.append(["step", now_ns, *counts, *books, engine.preemptions - preempted])
        preempted = engine.preemptions
        if ahead and in_flight:
            events.append(["end", now_ns + 1, ended(engine, in_flight.pop())])
        if step is not None:
            in_flight.append(step)
        else:
            events.append(["end", now_ns + 2, 0])
    return events


def ended(engine: Engine, step: Step) -> int:
    return sum(last for _, last in engine.complete(step))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_model_agrees_with_itself(ahead: bool) -> None:
    limits = replace(SMALL, async_scheduling=ahead)
    recording = recording_of(events_of(limits, ahead=ahead), limits, 0, 1 << 60, what="", engine="")
    found = agreement(recording)
    assert found.first_difference is None and found.equal_steps == found.steps > 50
    assert found.departures == found.departures_of_model == 60
    assert found.preemptions == found.preemptions_of_model > 10
    assert found.largest_difference == 0


def test_the_first_step_that_differs_is_named() -> None:
    recording = recording_of(events_of(SMALL), SMALL, 0, 1 << 60, what="", engine="")
    tokens = recording.steps.tokens.copy()
    tokens[17] += 1
    changed = replace(recording, steps=replace(recording.steps, tokens=tokens))
    found = agreement(changed)
    assert found.first_difference == f"step 17: tokens {tokens[17]}, model {tokens[17] - 1}"
    assert found.equal_steps == found.steps - 1


def test_departures_are_compared_at_the_same_instant() -> None:
    recording = recording_of(events_of(SMALL), SMALL, 0, 1 << 60, what="", engine="")
    late = np.concatenate([[0], recording.steps.finished[:-1]])
    found = agreement(replace(recording, steps=replace(recording.steps, finished=late)))
    model, real_run = np.cumsum(recording.steps.finished), np.cumsum(late)
    warm = (recording.end_ns >= 0.2 * recording.end_ns[-1]) & (real_run > 0)
    assert found.largest_difference == pytest.approx(
        float((abs(model - real_run)[warm] / real_run[warm]).max())
    )
    assert found.largest_difference > 0


def test_a_recording_keeps_what_it_says_to_the_microsecond() -> None:
    recording = recording_of(events_of(SMALL), SMALL, 0, 1 << 60, what="w", engine="e")
    data = json.loads(json.dumps(recording.to_dict()))
    again = Recording.from_dict(data)
    assert again.limits == recording.limits and (again.what, again.engine) == ("w", "e")
    assert np.array_equal(again.lengths, recording.lengths)
    assert np.array_equal(again.start_ns, recording.start_ns // 1000 * 1000)
    assert again.to_dict() == data


def test_only_steps_that_ended_in_time_are_kept() -> None:
    events = events_of(SMALL)
    whole = recording_of(events, SMALL, 0, 1 << 60, what="", engine="")
    part = recording_of(events, SMALL, 0, 700_000, what="", engine="")
    assert 0 < len(part.end_ns) < len(whole.end_ns) and part.end_ns[-1] <= 700_000
    assert len(part.start_ns) == len(part.end_ns) == len(part.steps.tokens)
    assert part.arrival_ns[-1] < part.start_ns[-1]
    assert agreement(part).first_difference is None


GIVEN_UP = ["aborted", 500_000, 1]


@pytest.mark.parametrize(
    ("begin_ns", "extra", "complaint"),
    [
        (300_000, [], "not idle when the load began"),
        (0, [GIVEN_UP], "gave a request up"),
        (1 << 59, [], "no step ended"),
    ],
)
def test_what_is_no_run_is_refused(begin_ns: int, extra: list[list[Any]], complaint: str) -> None:
    events = sorted(chain(events_of(SMALL), extra), key=lambda e: e[1])
    with pytest.raises(RecordingDamaged, match=complaint):
        recording_of(events, SMALL, begin_ns, 1 << 60, what="", engine="")
