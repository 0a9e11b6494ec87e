"""The scheduler model at a real engine's own instants: do the two do the same?

The model gets each request when the real scheduler got it, chooses its step k when the real one chose
its step k, and ends it when that step ended. So the time that steps take, which a model of the
scheduler does not know, drops out, and what is left is the scheduler's rules.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineLimits, Request, Step
from analysis.schedulers.recording import Counts, Recording, StepTable
from analysis.schedulers.scheduler import engine_of

STEP_BY_STEP = ("requests", "tokens", "running", "waiting", "free_blocks", "preempted", "finished")
WARM_UP = 0.2
"""Share of a run's time before which cumulative departures are too few to be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A real run against the model of it, at the same instants."""

    steps: int
    """Steps of the real run, those that found nothing to run left out."""
    equal_steps: int
    """Of them those whose requests, tokens, running, waiting, free blocks, preemptions and
    departures the model has all equal."""
    first_difference: str | None
    """The first step that is not equal and what differs in it; None if all are."""
    departures: int
    departures_of_model: int
    largest_difference: float
    """Largest |real - model| / real of the departures counted from the start, over all instants after
    the warm-up at which a step of the real run ended."""
    preemptions: int
    preemptions_of_model: int


def replay(
    limits: EngineLimits,
    arrival_ns: Counts,
    lengths: Counts,
    ignore_eos: NDArray[np.bool_],
    start_ns: Counts,
    end_ns: Counts,
) -> StepTable:
    """What the model of an engine with these limits does at these instants; one row per step.

    ``arrival_ns`` (r,), ``lengths`` (r, 2): prompt and output tokens; ``start_ns`` and ``end_ns`` (n,),
    increasing. Step k begins at ``start_ns[k]`` with all requests that had come, and its tokens leave
    at ``end_ns[k]``, before or after step k+1 is chosen. Where the model finds nothing to run, its row
    has no requests; where it would run and the real engine was idle, it waits for the next instant:
    rows of the two are always of one instant, also where they part. Raises ValueError for a request
    that could never run.
    """
    engine = engine_of(limits)
    rows: dict[str, list[int]] = {name: [] for name in StepTable.__slots__ if name != "finished"}
    finished = [0] * len(start_ns)
    in_flight: deque[tuple[int, Step]] = deque()

    def end_steps(now_ns: float) -> None:
        while in_flight and end_ns[in_flight[0][0]] <= now_ns:
            row, step = in_flight.popleft()
            finished[row] = sum(last for _, last in engine.complete(step))

    come = 0
    for row, now_ns in enumerate(start_ns.tolist()):
        end_steps(now_ns)
        while come < len(arrival_ns) and arrival_ns[come] <= now_ns:
            prompt, output = lengths[come].tolist()
            engine.submit(Request(come, prompt, output, ignore_eos=bool(ignore_eos[come])))
            come += 1
        preemptions = engine.preemptions
        # Not `start`: with steps in flight the instants say what is chosen before what has ended.
        step = engine._schedule()
        rows["requests"].append(0 if step is None else len(step.scheduled))
        rows["tokens"].append(0 if step is None else step.tokens)
        rows["running"].append(len(engine.running))
        rows["waiting"].append(len(engine.waiting))
        rows["free_blocks"].append(engine.free_blocks)
        rows["preempted"].append(engine.preemptions - preemptions)
        if step is not None:
            in_flight.append((row, step))
    end_steps(float("inf"))
    return StepTable(
        finished=np.array(finished, dtype=np.int64),
        **{name: np.array(values, dtype=np.int64) for name, values in rows.items()},
    )


def agreement(recording: Recording) -> Agreement:
    """Replay a recording and compare. Raises ValueError if nothing departed after the warm-up."""
    real = recording.steps
    model = replay(
        recording.limits,
        recording.arrival_ns,
        recording.lengths,
        recording.ignore_eos,
        recording.start_ns,
        recording.end_ns,
    )
    departed, by_model = np.cumsum(real.finished), np.cumsum(model.finished)
    warm = recording.end_ns >= recording.end_ns[-1] * WARM_UP
    warm &= departed > 0
    if not warm.any():
        raise ValueError(f"{recording.what}: nothing departed after the warm-up: record for longer")
    off = np.abs(departed - by_model)[warm] / departed[warm]
    equal = np.all([getattr(real, c) == getattr(model, c) for c in STEP_BY_STEP], axis=0)
    # A row that found nothing to run still counts when the model finds something.
    steps = (real.requests > 0) | ~equal
    return Agreement(
        steps=int(steps.sum()),
        equal_steps=int(equal[steps].sum()),
        first_difference=_first_difference(real, model, equal),
        departures=int(departed[-1]),
        departures_of_model=int(by_model[-1]),
        largest_difference=float(off.max()),
        preemptions=int(real.preempted.sum()),
        preemptions_of_model=int(model.preempted.sum()),
    )


def _first_difference(real: StepTable, model: StepTable, equal: NDArray[np.bool_]) -> str | None:
    if equal.all():
        return None
    row = int(np.argmin(equal))
    pairs = [(name, getattr(real, name)[row], getattr(model, name)[row]) for name in STEP_BY_STEP]
    said = ", ".join(f"{name} {a}, model {b}" for name, a, b in pairs if a != b)
    return f"step {row}: {said}"
