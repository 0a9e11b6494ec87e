"""SGLang's scheduler: conservation laws, its rules one by one, and every step of a real engine."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.schedulers.engine import EngineLimits, Request, SGLangRules, Step, check_conservation
from analysis.schedulers.sglang import SGLangEngine, longest_request

RECORDINGS = Path(__file__).parent / "sglang"


def limits(tokens: int = 100, page: int = 1, **other: Any) -> EngineLimits:
    """A pool of ``tokens``; fields of SGLangRules go to the rules, all others to the limits."""
    rules = {k: other.pop(k) for k in list(other) if k in SGLangRules.__slots__}
    return EngineLimits(
        num_blocks=tokens // page, block_size=page, sglang=SGLangRules(**rules), **other
    )


def run_to_end(engine: SGLangEngine, requests: list[Request], arrivals: list[int]) -> list[Step]:
    """Submit request i before step arrivals[i]; the steps. Checks the laws after each."""
    steps = []
    for k in range(100_000):
        for request, at in zip(requests, arrivals, strict=True):
            if at == k:
                engine.submit(request)
        step = engine.start()
        check_conservation(engine, requests)
        if step is None:
            if k > max(arrivals):
                return steps
            continue
        assert len(engine.running) <= (engine.limits.max_num_seqs or 10**9)
        if step.prefill and engine.limits.max_num_batched_tokens is not None:
            assert step.tokens <= engine.limits.max_num_batched_tokens + engine.limits.block_size
        steps.append(step)
        engine.complete(step)
        check_conservation(engine, requests)
    raise AssertionError("the engine never became idle")


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        limits,
        tokens=st.integers(100, 400),
        page=st.sampled_from([1, 4, 16]),
        max_num_seqs=st.none() | st.integers(1, 8),
        max_num_batched_tokens=st.none() | st.integers(16, 64),
        async_scheduling=st.booleans(),
        radix_cache=st.booleans(),
        whole_output_of_ignore_eos=st.booleans(),
        schedule_conservativeness=st.sampled_from([0.1, 1.0]),
        max_prefill_tokens=st.sampled_from([64, 16384]),
    ),
    st.lists(
        st.tuples(
            st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.booleans(),
            st.integers(0, 30),
        ),
        min_size=1,
        max_size=25,
    ),
)  # fmt: skip
def test_every_request_finishes_with_its_length_and_pages_are_conserved(
    bounds: EngineLimits, drawn: list[tuple[int, int, int, bool, int]]
) -> None:
    engine = SGLangEngine(bounds)
    fitting = [d for d in drawn if d[0] + d[1] + d[2] <= longest_request(bounds)]
    requests = [Request(i, s, o, o + more, eos) for i, (s, o, more, eos, _) in enumerate(fitting)]
    if not requests:
        return
    steps = run_to_end(engine, requests, [at for *_, at in fitting])
    assert all(r.outputs == r.output_tokens and r.state == "finished" for r in requests)
    assert engine.free_blocks == bounds.num_blocks and not engine.running
    assert engine.prefill_steps == sum(step.prefill for step in steps)


def test_prompts_and_decodes_have_steps_of_their_own() -> None:
    engine = SGLangEngine(limits(tokens=100))
    steps = run_to_end(engine, [Request(0, 10, 5), Request(1, 10, 5)], [0, 2])
    assert [s.prefill for s in steps] == [True, False, True, False, False, False, False]
    assert [s.tokens for s in steps] == [10, 1, 10, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("ignore_eos", "radix", "running"),
    [
        # Twice 10 + 30 declared tokens and a page fit 99; the ratio 0.7 leaves no room for a third.
        (True, True, 2),
        (False, True, 2),
        # Looking ahead asks only for the prompt, but the outputs of the others stay set aside.
        (True, False, 2),
    ],
)
def test_the_declared_output_is_set_aside(ignore_eos: bool, radix: bool, running: int) -> None:
    engine = SGLangEngine(limits(tokens=99, radix_cache=radix))
    requests = [Request(i, 10, 5, 30, ignore_eos) for i in range(6)]
    for request in requests:
        engine.submit(request)
    step = engine.start()
    assert step is not None and len(engine.running) == running
    assert engine.free_blocks == 99 - 10 * running


def test_admission_stays_shut_until_a_request_leaves() -> None:
    engine = SGLangEngine(limits(tokens=60))
    long, small, tiny = Request(0, 10, 20), Request(1, 30, 20), Request(2, 1, 1)
    steps = run_to_end(engine, [long, small, tiny], [0, 1, 2])
    # "small" does not fit beside "long", and "tiny" behind it must wait although it would.
    assert [s.prefill for s in steps].index(True, 1) == 20
    assert len(steps[20].scheduled) == 2


def test_the_ratio_falls_with_decode_steps_and_an_idle_engine_resets_it() -> None:
    engine = SGLangEngine(limits(tokens=2000))
    run_to_end(engine, [Request(0, 10, 1000, 1000, False)], [0])
    assert engine.new_token_ratio == 0.7
    engine.submit(Request(1, 10, 1000, 1000, False))
    for _ in range(301):
        step = engine.start()
        assert step is not None
        engine.complete(step)
    assert engine.new_token_ratio == pytest.approx(0.7 - 300 * 0.7 * 0.86 / 600)
    for _ in range(400):
        step = engine.start()
        assert step is not None
        engine.complete(step)
    assert engine.new_token_ratio == pytest.approx(0.098)


def test_a_retracted_request_goes_to_the_back_and_lifts_the_ratio() -> None:
    bounds = limits(tokens=60, schedule_conservativeness=0.01, radix_cache=False)
    engine = SGLangEngine(bounds)
    old, new, later = (Request(i, 10, 25, 25, False) for i in range(3))
    for request in (old, new):
        engine.submit(request)
    step = engine.start()
    assert step is not None
    engine.complete(step)
    engine.submit(later)
    while not engine.preemptions:
        step = engine.start()
        assert step is not None
        engine.complete(step)
    # As many outputs and as long a prompt: the last in the batch is the victim.
    assert list(engine.waiting) == [later, new]
    assert new.preemptions == 1 and new.blocks == 0 and new.outputs == old.outputs - 1
    assert engine.new_token_ratio == 1.0


def test_a_long_prompt_is_cut_and_its_output_is_set_aside_when_it_is_whole() -> None:
    engine = SGLangEngine(limits(tokens=200, max_num_batched_tokens=16))
    steps = run_to_end(engine, [Request(0, 40, 3), Request(1, 10, 3)], [0, 0])
    assert [(s.prefill, s.tokens) for s in steps] == [
        (True, 16), (True, 16), (True, 16), (True, 2), (False, 2), (False, 2)
    ]  # fmt: skip
    assert [s.samples for s in steps[:3]] == [[False], [False], [True, False]]


def test_the_overlap_schedule_admits_a_step_later() -> None:
    late = limits(tokens=100, async_scheduling=True)
    steps = run_to_end(SGLangEngine(late), [Request(0, 10, 6), Request(1, 10, 2)], [0, 2])
    assert [s.prefill for s in steps] == [True, False, False, True, False, False, False]


def test_requests_that_can_never_be_admitted_are_refused() -> None:
    engine = SGLangEngine(limits(tokens=100))
    with pytest.raises(ValueError, match="101 declared tokens exceed the 97"):
        engine.submit(Request(0, 1, 50, 100, False))


# -- a real engine -----------------------------------------------------------------------------------


def recording(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        gzip.decompress((RECORDINGS / f"{name}.json.gz").read_bytes())
    )
    return data


@pytest.mark.parametrize(
    "path", sorted(RECORDINGS.glob("*.gz")), ids=lambda p: p.name.split(".json")[0]
)
def test_every_step_of_a_real_engine(path: Path) -> None:
    """Arrivals and results in the order in which the real scheduler saw them; nothing else is given."""
    data = recording(path.name.removesuffix(".json.gz"))
    engine = SGLangEngine(EngineLimits.from_dict(data["limits"]))
    in_flight: list[Step] = []
    count = retracted = steps = 0
    new_step = False
    for kind, *what in data["events"]:
        if kind == "arrival":
            _, prompt, output, declared, ignore_eos = what
            engine.submit(Request(count, prompt, output, declared, bool(ignore_eos)))
            count += 1
        elif kind == "step":
            step = engine._schedule()
            assert step is not None
            _, prefill, requests, tokens, free, waiting, ratio = what
            seen = (step.prefill, len(step.scheduled), step.tokens, len(engine.waiting))
            assert seen == (bool(prefill), requests, tokens, waiting), steps
            assert engine.free_blocks * engine.limits.block_size == free, steps
            assert engine.new_token_ratio == pytest.approx(ratio / 1e4, abs=2e-3), steps
            in_flight.append(step)
            steps += 1
            new_step = True
        elif kind == "result":
            if engine.limits.async_scheduling and not new_step:
                assert engine._schedule() is None
            new_step = False
            engine.complete(in_flight.pop(0))
        elif kind == "idle":
            assert engine._schedule() is None
        else:
            retracted += what[0]
    assert steps > 300 and engine.finished == count and engine.preemptions == retracted


def step_counts(data: dict[str, Any]) -> tuple[int, int]:
    """Prefill and decode steps of the model, given the times of the arrivals alone.

    A step takes as long as the real engine's step of its kind that ran at that time.
    """
    engine = SGLangEngine(EngineLimits.from_dict(data["limits"]))
    real = np.array([e[1:3] for e in data["events"] if e[0] == "step"], dtype=float)
    starts_s = {kind: real[real[:, 1] == kind, 0] / 1e6 for kind in (0, 1)}
    taken_s = np.append(np.diff(real[:, 0]), np.inf) / 1e6
    most = 3 * np.median(taken_s)
    took_s = {kind: taken_s[real[:, 1] == kind].clip(max=most) for kind in (0, 1)}
    arrivals = [e[1:] for e in data["events"] if e[0] == "arrival"]
    now_s, decodes, joined = 0.0, 0, 0
    while True:
        while joined < len(arrivals) and arrivals[joined][0] / 1e6 <= now_s:
            _, *asked, ignore_eos = arrivals[joined]
            engine.submit(Request(joined, *asked, bool(ignore_eos)))
            joined += 1
        step = engine.start()
        if step is None:
            if joined == len(arrivals):
                return engine.prefill_steps, decodes
            now_s = arrivals[joined][0] / 1e6
            continue
        decodes += not step.prefill
        kind = int(step.prefill)
        near = min(int(np.searchsorted(starts_s[kind], now_s)), len(took_s[kind]) - 1)
        now_s += float(took_s[kind][near])
        engine.complete(step)


def test_step_counts_of_a_real_engine_from_arrival_times_alone() -> None:
    """A burst of 150, then Poisson arrivals at 9, 4.59 and 6.88 per second, all counted together."""
    simulated = recorded = np.zeros(2)
    for name in ("burst", "poisson_9", "poisson_4.59", "poisson_6.88"):
        data = recording(name)
        prefill = sum(e[2] for e in data["events"] if e[0] == "step")
        steps = sum(e[0] == "step" for e in data["events"])
        simulated = simulated + step_counts(data)
        recorded = recorded + np.array([prefill, steps - prefill])
    assert simulated == pytest.approx(recorded, rel=0.03)
