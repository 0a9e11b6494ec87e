"""Other tools' rules: each against its definition, spelled out slowly, and against closed forms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import linregress, t

from analysis.inference.peers import burn_down, burst_throughput, guidellm_stop_s, ols_grows
from analysis.schedulers.frames import RunFrames
from loadgen.records import Run

Floats = NDArray[np.float64]


def frames_of(sent_s: Floats, first_s: Floats, end_s: Floats, horizon_s: float) -> RunFrames:
    """Requests as their client saw them until the horizon."""
    requests = pd.DataFrame(
        {
            "scheduled_s": sent_s,
            "sent_s": sent_s,
            "first_token_s": np.where(first_s < horizon_s, first_s, np.nan),
            "last_token_s": np.where(end_s < horizon_s, end_s, np.nan),
            "outcome": np.where(end_s < horizon_s, "completed", "unfinished"),
        }
    )
    run = Run(id="x", arrival_rate=1.0, horizon_s=horizon_s, warmup_s=0.0, seed=1)
    return RunFrames(run, horizon_s, requests, pd.DataFrame(), pd.DataFrame())


def queue(load: float, seed: int, horizon_s: float = 200.0, rate: float = 2.0) -> RunFrames:
    """M/M/1 with the given service rate; a request's first token comes when its service begins."""
    rng = np.random.default_rng(seed)
    sent = np.cumsum(rng.exponential(1 / (load * rate), int(2 * load * rate * horizon_s)))
    sent = sent[sent < horizon_s]
    first, end, free_s = np.empty_like(sent), np.empty_like(sent), 0.0
    for i, (at_s, work_s) in enumerate(
        zip(sent.tolist(), rng.exponential(1 / rate, len(sent)).tolist(), strict=True)
    ):
        first[i] = max(free_s, at_s)
        end[i] = free_s = first[i] + work_s
    return frames_of(sent, first, end, horizon_s)


def slowly(frames: RunFrames, least_ttft_s: float) -> float | None:
    """GuideLLM's rule event by event: two lists that lose their oldest, and two fitted lines."""
    requests = frames.requests
    events = [(at_s, "sent", 0.0) for at_s in requests["sent_s"]]
    answered = requests[requests["first_token_s"].notna()]
    events += [
        (first_s, "first", first_s - sent_s)
        for sent_s, first_s in zip(answered["sent_s"], answered["first_token_s"], strict=True)
    ]
    lists: dict[str, list[tuple[float, float]]] = {"sent": [], "first": []}
    seen = {"sent": 0, "first": 0}
    for now_s, kind, value in sorted(events):
        if kind == "sent":
            ended = (requests["last_token_s"] <= now_s).sum()
            value = float((requests["sent_s"] <= now_s).sum() - ended)
        seen[kind] += 1
        lists[kind].append((now_s, value))
        for name, points in lists.items():
            while len(points) > int(0.75 * seen[name]):
                del points[0]
            while points and now_s - points[0][0] > 120.0:
                del points[0]
        late = sum(ttft_s > least_ttft_s for _, ttft_s in lists["first"])
        if now_s < 30.0 or 2 * late < len(lists["first"]) or len(lists["sent"]) < 5:
            continue
        asked = lists.values() if len(lists["first"]) >= 5 else [lists["sent"]]
        if all(rises(points, now_s) for points in asked):
            return now_s
    return None


def rises(points: list[tuple[float, float]], now_s: float) -> bool:
    x, y = np.array(points).T
    line = linregress(x, y)
    freedom = min(now_s, len(x)) - 2
    if not line.slope > 0:
        return False
    error = line.stderr * np.sqrt((len(x) - 2) / freedom)
    return bool(t.ppf(0.975, freedom) * error / line.slope < 2.0)


@pytest.mark.parametrize("least_ttft_s", [0.0, 2.5])
@pytest.mark.parametrize("load", [0.7, 0.95, 1.3])
def test_guidellm_stops_when_its_rule_says_so(load: float, least_ttft_s: float) -> None:
    stops = []
    for seed in range(4):
        frames = queue(load, seed)
        stop_s = guidellm_stop_s(frames, least_ttft_s)
        assert stop_s == slowly(frames, least_ttft_s)
        stops.append(stop_s is not None)
    if load > 1:
        assert all(stops), "a load 30 % too high must be stopped, or the comparison says nothing"


def test_guidellm_stops_a_certain_overload_as_soon_as_it_may() -> None:
    sent = np.arange(0.0, 100.0, 0.5)
    frames = frames_of(sent, 2 * sent + 0.1, 2 * sent + 0.2, 100.0)
    assert guidellm_stop_s(frames) == 30.0


def test_guidellm_lets_a_server_be_whose_first_tokens_are_prompt() -> None:
    sent = np.arange(0.0, 100.0, 0.5)
    growing = frames_of(sent, sent + 1.0 + 0.01 * sent, 2 * sent + 2.0, 100.0)
    assert guidellm_stop_s(growing) is None
    assert guidellm_stop_s(growing, least_ttft_s=0.0) == 30.0


def test_the_line_is_the_one_sided_test_at_5_percent() -> None:
    said = []
    for seed in range(40):
        frames = queue(0.9, seed)
        requests = frames.requests[frames.requests["scheduled_s"] >= 20.0]
        at_s = requests["scheduled_s"].to_numpy()
        ended = np.sort(frames.requests["last_token_s"].dropna())
        inside = np.arange(len(frames.requests) - len(at_s), len(frames.requests)) + 1
        inside = inside - np.searchsorted(ended, at_s, "right")
        line = linregress(at_s, inside, alternative="greater")
        if abs(line.pvalue - 0.05) < 0.001:
            continue  # between the normal's 1.645 and Student's quantile
        said.append(ols_grows(frames, 20.0, 200.0))
        assert said[-1] == (line.pvalue < 0.05)
    assert 0 < sum(said) < len(said)


def test_the_throughput_of_a_burst_has_its_ramp_and_its_drain() -> None:
    sent = np.zeros(10)
    end = 2.0 + np.arange(10.0)
    assert burst_throughput(frames_of(sent, end - 1, end, 100.0)) == 10 / 11
    assert burst_throughput(frames_of(sent, end - 1, end, 6.5)) == 5 / 6
    with pytest.raises(ValueError, match="nothing was completed"):
        burst_throughput(frames_of(sent, end - 1, end, 1.0))


def test_the_burn_down_of_a_steady_server_is_its_rate() -> None:
    sent, end = np.zeros(100), 0.05 + 0.1 * np.arange(100)
    assert burn_down(frames_of(sent, end, end, 20.0), 20.0) == 10.0


def test_the_burn_down_of_an_uneven_server_is_that_of_its_best_half_seconds() -> None:
    """Nine of ten half seconds serve one request, the tenth serves eleven: 4 req/s in the mean."""
    end = np.concatenate(
        [k * 5.0 + np.concatenate([0.5 * np.arange(9), np.full(11, 4.5)]) for k in range(10)]
    )
    frames = frames_of(np.zeros(len(end)), end + 0.25, end + 0.25, 50.0)
    assert len(end) / 50.0 == 4.0
    assert burn_down(frames, 50.0) == 22.0


def test_the_burn_down_needs_a_fall() -> None:
    sent = np.arange(0.0, 10.0, 0.1)
    with pytest.raises(ValueError, match="look for longer"):
        burn_down(frames_of(sent, sent + 50, sent + 50, 60.0), 10.0)
