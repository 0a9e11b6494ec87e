"""What other tools' rules say of a run: over-saturated or not, and how much the server can do.

Written from their descriptions, each with its source, to be held against servers whose critical rate is
known (`scripts/bench/peers`). No verdict of critrate uses them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress, t

from analysis.schedulers.frames import RunFrames, number_in_system

GUIDELLM_FROM_S = 30.0
GUIDELLM_WINDOW_S = 120.0
GUIDELLM_WINDOW_SHARE = 0.75
GUIDELLM_TTFT_S = 2.5
GUIDELLM_MARGIN = 2.0
"""Half of a slope's 95 % interval may be so many times the slope."""
GUIDELLM_FEWEST = 5
OLS_LIMIT = 1.645
BURN_DOWN_EVERY_S = 0.5
BURN_DOWN_PERCENTILE = 95.0


def guidellm_stop_s(frames: RunFrames, least_ttft_s: float = GUIDELLM_TTFT_S) -> float | None:
    """When GuideLLM 0.7.3 would stop a run as over-saturated, in seconds; None if never.

    Its stop (``scheduler/constraints/saturation.py``, read there) follows two lines: the requests in
    flight at each sending, and the time to first token at each first token. Both look back over the
    latest three quarters of what they have seen, at most 120 s. From 30 s on, at every event, it stops
    when at least half of the times to first token exceed 2.5 s and both lines rise, each with
    half a 95 % interval below twice its slope. The residuals count as independent, but as no more of
    them than seconds have passed. It is meant to end hopeless runs early, not to find a critical rate.

    ``least_ttft_s`` = 0 leaves the two lines alone.
    """
    requests = frames.requests
    sent_s = requests["sent_s"].to_numpy(dtype=float)
    first_s = requests["first_token_s"].to_numpy(dtype=float)
    ttft_s = first_s - sent_s
    order = np.argsort(first_s)[: int(np.isfinite(first_s).sum())]
    first_s, ttft_s = first_s[order], ttft_s[order]
    at_s = np.sort(np.concatenate([sent_s, first_s]))
    at_s = at_s[at_s >= GUIDELLM_FROM_S]
    in_flight = number_in_system(frames, sent_s).astype(float)
    rising, starts = _rises(at_s, sent_s, in_flight)
    later, firsts = _rises(at_s, first_s, ttft_s)
    late = _sums(ttft_s > least_ttft_s, *_window(at_s, first_s))
    # Few first tokens: GuideLLM then goes by the requests in flight alone.
    stops = rising & (later | (firsts < GUIDELLM_FEWEST))
    stops &= (starts >= GUIDELLM_FEWEST) & (2 * late >= firsts)
    return float(at_s[np.argmax(stops)]) if stops.any() else None


def _window(
    at_s: NDArray[np.float64], seen_s: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of increasing instants, which ones each look takes in: from one index up to another."""
    end = np.searchsorted(seen_s, at_s, "right")
    begin = np.maximum(
        end - np.floor(GUIDELLM_WINDOW_SHARE * end).astype(np.int64),
        np.searchsorted(seen_s, at_s - GUIDELLM_WINDOW_S, "left"),
    )
    return begin, np.maximum(end, begin)


def _sums(
    values: NDArray[np.float64] | NDArray[np.bool_],
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
) -> NDArray[np.float64]:
    running = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    result: NDArray[np.float64] = running[end] - running[begin]
    return result


def _rises(
    at_s: NDArray[np.float64], seen_s: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Does the line through the window rise for certain by GuideLLM's measure? And how many points."""
    begin, end = _window(at_s, seen_s)
    count = (end - begin).astype(float)
    # Centred, or the sums would lose their digits.
    x = seen_s - seen_s.mean() if len(seen_s) else seen_s
    y = values - values.mean() if len(values) else values
    points = np.maximum(count, 1.0)
    sx, sy = _sums(x, begin, end), _sums(y, begin, end)
    sxx = np.maximum(_sums(x * x, begin, end) - sx**2 / points, 1e-12)
    sxy = _sums(x * y, begin, end) - sx * sy / points
    syy = _sums(y * y, begin, end) - sy**2 / points
    slope = sxy / sxx
    freedom = np.minimum(at_s, count) - 2.0
    enough = freedom >= 1.0
    freedom = np.where(enough, freedom, 1.0)
    error = np.sqrt(np.maximum(syy - sxy**2 / sxx, 0.0) / freedom / sxx)
    half = t.ppf(0.975, freedom) * error
    rises: NDArray[np.bool_] = enough & (slope > 0) & (half < GUIDELLM_MARGIN * slope)
    return rises, count


def ols_grows(frames: RunFrames, start_s: float, end_s: float) -> bool:
    """Does a straight line through N(t) rise with t > 1.645, as if its residuals were independent?

    Every arrival in the window is a point. The textbook's one-sided test at 5 %, which no queue obeys
    (theory.md 6.4). Raises ValueError for fewer than three arrivals.
    """
    at_s = frames.requests["scheduled_s"].to_numpy(dtype=float)
    at_s = at_s[(at_s >= start_s) & (at_s < end_s)]
    if len(at_s) < 3:
        raise ValueError("a line and its error need at least three arrivals")
    line = linregress(at_s, number_in_system(frames, at_s))
    return float(line.slope) > OLS_LIMIT * float(line.stderr)


def burst_throughput(frames: RunFrames) -> float:
    """Requests per second of a burst: completed over the time from the first sending to the last token.

    What `vllm bench serve` prints with its default rate, infinite, and what `vllm bench sweep` and
    GuideLLM's sweep take as the highest rate worth offering. Raises ValueError if none completed.
    """
    requests = frames.requests
    done = requests[requests["outcome"] == "completed"]
    if not len(done):
        raise ValueError("a burst of which nothing was completed has no throughput")
    return len(done) / float(done["last_token_s"].max() - requests["sent_s"].min())


def burn_down(frames: RunFrames, until_s: float) -> float:
    """inference-perf 0.5.0's saturation point, requests per second, from a burst.

    The 95th percentile of the rates at which the requests in flight fell between looks half a second
    apart, over the intervals in which they fell (``loadgen/load_generator.py``, read there). It sets the
    highest of the rates that are then offered. Raises ValueError where they fell in fewer than two.
    """
    at_s = np.arange(0.0, min(until_s, frames.end_s), BURN_DOWN_EVERY_S)
    change = np.diff(number_in_system(frames, at_s)) / BURN_DOWN_EVERY_S
    fell = -change[change < 0]
    if len(fell) < 2:
        raise ValueError("the requests in flight fell too seldom: look for longer")
    return float(np.percentile(fell, BURN_DOWN_PERCENTILE))
