"""What a real engine's scheduler saw and did, step by step, as it was written down inside of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineLimits

Counts = NDArray[np.int64]
MICROSECOND_NS = 1000


class RecordingDamaged(ValueError):
    """The events cannot be what a scheduler did; the message says which and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTable:
    """One row for each time that a scheduler chose a step; arrays of shape (n,).

    The first six as the choice left them. A row without requests found nothing to run.
    """

    requests: Counts
    """Requests that the step computes something of."""
    tokens: Counts
    """Tokens that it computes."""
    running: Counts
    waiting: Counts
    free_blocks: Counts
    preempted: Counts
    """Requests that lost their blocks in the choice."""
    finished: Counts
    """Requests that had their last token when the step ended."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording:
    """A real run from an idle engine on; instants in nanoseconds from the run's start."""

    what: str
    engine: str
    limits: EngineLimits
    arrival_ns: Counts
    """When the scheduler got each request, shape (r,), increasing."""
    lengths: Counts
    """Prompt and output tokens of each, shape (r, 2); requests run to their declared length."""
    ignore_eos: NDArray[np.bool_]
    start_ns: Counts
    """When each step was chosen, shape (n,), increasing."""
    end_ns: Counts
    """When its results had been processed, shape (n,)."""
    steps: StepTable

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in whole microseconds; instants as differences, which compress well."""
        starts = self.start_ns // MICROSECOND_NS
        return {
            "what": self.what,
            "engine": self.engine,
            "limits": asdict(self.limits),
            "arrival_us": _differences(self.arrival_ns // MICROSECOND_NS),
            "prompt_tokens": self.lengths[:, 0].tolist(),
            "output_tokens": self.lengths[:, 1].tolist(),
            "ignore_eos": self.ignore_eos.astype(int).tolist(),
            "start_us": _differences(starts),
            "took_us": (self.end_ns // MICROSECOND_NS - starts).tolist(),
            "steps": {name: getattr(self.steps, name).tolist() for name in StepTable.__slots__},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recording:
        """The inverse of `to_dict`."""
        starts = np.cumsum(_counts(data["start_us"]))
        return Recording(
            what=data["what"],
            engine=data["engine"],
            limits=EngineLimits.from_dict(data["limits"]),
            arrival_ns=np.cumsum(_counts(data["arrival_us"])) * MICROSECOND_NS,
            lengths=np.stack(
                [_counts(data["prompt_tokens"]), _counts(data["output_tokens"])], axis=1
            ),
            ignore_eos=np.asarray(data["ignore_eos"], dtype=bool),
            start_ns=starts * MICROSECOND_NS,
            end_ns=(starts + _counts(data["took_us"])) * MICROSECOND_NS,
            steps=StepTable(**{name: _counts(data["steps"][name]) for name in StepTable.__slots__}),
        )


def recording_of(
    events: Iterable[Sequence[Any]],
    limits: EngineLimits,
    begin_ns: int,
    finish_ns: int,
    *,
    what: str,
    engine: str,
) -> Recording:
    """The run between two instants of the monotonic clock, at the first of which the engine was idle.

    ``events`` are the lines that `critrate_recorded` of either engine writes, in their order. Only
    steps that ended by ``finish_ns`` are kept, and the arrivals until the last of them was chosen.
    Raises RecordingDamaged when the engine was not idle, when a client gave a request up before the
    end, or when nothing is left.
    """
    arrivals: list[Sequence[int]] = []
    chosen: list[Sequence[int]] = []
    ended: list[Sequence[int]] = []
    for kind, t_ns, *counts in events:
        if t_ns > finish_ns:
            break
        if kind == "aborted" and t_ns >= begin_ns:
            raise RecordingDamaged(
                "a client gave a request up during the run: end the recording before, or let it drain"
            )
        rows = {"arrival": arrivals, "step": chosen, "end": ended}.get(kind)
        if rows is not None:
            rows.append((t_ns, *counts))
    first = sum(t_ns < begin_ns for t_ns, *_ in chosen)
    if sum(t_ns < begin_ns for t_ns, *_ in ended) != first or (
        sum(t_ns < begin_ns for t_ns, *_ in arrivals) != sum(count for _, count in ended[:first])
    ):
        raise RecordingDamaged("the engine was not idle when the load began: wait until it is")
    ends = np.array(ended[first:], dtype=np.int64)
    if not len(ends):
        raise RecordingDamaged("no step ended during the run: was the recorder loaded?")
    # Steps that were under way at the end have no row: what they did is not known.
    steps = np.array(chosen[first : first + len(ends)], dtype=np.int64)
    came = np.array([a for a in arrivals if begin_ns <= a[0] < steps[-1, 0]], dtype=np.int64)
    columns = [name for name in StepTable.__slots__ if name != "finished"]
    table = dict(zip(columns, steps[:, 1:].T, strict=True))
    return Recording(
        what=what,
        engine=engine,
        limits=limits,
        arrival_ns=came[:, 0] - begin_ns,
        lengths=came[:, 1:3],
        ignore_eos=came[:, 3].astype(bool),
        start_ns=steps[:, 0] - begin_ns,
        end_ns=ends[:, 0] - begin_ns,
        steps=StepTable(**table, finished=ends[:, 1]),
    )


def _counts(values: Sequence[int]) -> Counts:
    return np.asarray(values, dtype=np.int64)


def _differences(values: Counts) -> list[int]:
    differences: list[int] = np.diff(values, prepend=0).tolist()
    return differences
