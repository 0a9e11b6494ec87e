"""The step time from what hardware can do: closed forms, and what others measured on GPUs."""

from __future__ import annotations

import csv
import gzip
import math
import os
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from analysis.numbers.estimate import Estimate
from analysis.theory.roofline import DATA_SHEET_SHARE, DATA_SHEETS, MOST_GPUS, Rates, roofline

TRACES = Path(os.environ.get("CRITRATE_TRACES", "../shared/traces"))
A100 = DATA_SHEETS["NVIDIA A100-SXM4-80GB"]
LLAMA_3_8B = {
    "parameters": 8030261248,
    "weight_bytes": 2 * 8030261248,
    "kv_bytes_per_token": 131072,
}


def rates(
    bandwidth: float = 2e12, arithmetic: float = 3e14, low: float = 0.5, high: float = 0.5
) -> Rates:
    return Rates(
        name="x",
        bandwidth_bytes_per_s=bandwidth,
        arithmetic_flop_per_s=arithmetic,
        share_low=low,
        share_high=high,
        source="stated",
    )


@pytest.mark.parametrize(
    ("gpus", "b0_ms", "b1_us", "b2_ns"),
    # 16e9 bytes at 1 TB/s, 2 x 8e9 operations at 150 TFLOP/s, 131 072 bytes at 1 TB/s; halves on two.
    [(1, 16.0, 16e9 / 150e12 * 1e6, 131.072), (2, 8.0, 16e9 / 300e12 * 1e6, 65.536)],
)
def test_closed_form(gpus: int, b0_ms: float, b1_us: float, b2_ns: float) -> None:
    fit = roofline(rates(), 8 * 10**9, 16 * 10**9, 131072, gpus)
    assert fit.law.b0_s * 1e3 == pytest.approx(b0_ms)
    assert fit.law.b1_s_per_token * 1e6 == pytest.approx(b1_us)
    assert fit.law.b2_s_per_kv_token * 1e9 == pytest.approx(b2_ns)
    assert fit.law.b3_s_per_request == 0.0
    assert not fit.covariance.any(), "a share that is known leaves no error"


@given(
    low=st.floats(0.1, 0.9),
    wider=st.floats(1.0, 5.0),
    tokens=st.floats(1, 8192),
    kv_tokens=st.floats(0, 1e6),
)
@settings(max_examples=60, deadline=None)
def test_the_interval_is_that_of_the_shares(
    low: float, wider: float, tokens: float, kv_tokens: float
) -> None:
    high = min(low * wider, 1.0)
    fit = roofline(rates(low=low, high=high), 7 * 10**9, 14 * 10**9, 524288)
    z = float(norm.ppf(0.975))
    ends = roofline(rates(low=low, high=low), 7 * 10**9, 14 * 10**9, 524288).law
    # One share for all that is read: its terms add up; that of arithmetic is independent of it.
    read, read_error = fit.combination([1, 0, kv_tokens, 0])
    computed, computed_error = fit.combination([0, tokens, 0, 0])
    for value, error, slowest in (
        (read, read_error, ends(0, kv_tokens, 0)),
        (computed, computed_error, ends(tokens, 0, 0) - ends.b0_s),
    ):
        assert value * math.exp(z * error / value) == pytest.approx(slowest)
    value, error = fit.combination([1, tokens, kv_tokens, 0])
    assert value == pytest.approx(read + computed)
    assert error == pytest.approx(math.hypot(read_error, computed_error))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="telling each other"):
        roofline(rates(), 1, 1, 1, MOST_GPUS + 1)
    with pytest.raises(ValueError, match="positive"):
        roofline(rates(), 1, 1, 0)
    for wrong in ({"low": 0.0}, {"low": 0.6, "high": 0.5}, {"high": 1.1}, {"bandwidth": 0.0}):
        with pytest.raises(ValueError, match="x: "):
            rates(**wrong)


@pytest.mark.parametrize(
    ("demand", "tokens", "published_s"),
    # E[g] of theory and s + o - 1 on average: 1:1, 2:1, 1:2.
    [(1_079_151, 1609, 0.0372), (770_034, 1608.5, 0.0430), (1_339_675, 1608.5, 0.0337)],
)
def test_the_published_steps_of_an_a100_lie_within(
    demand: int, tokens: float, published_s: float
) -> None:
    """Nie, Si, Zhou, arXiv 2605.04595: Llama 3 8B, 131 000 tokens of KV. Assumed: the card of 80 GB and
    16 bits; that of 40 GB takes 1.3 times as long to read its memory."""
    held = 131_000
    fit = roofline(A100, **LLAMA_3_8B)
    value, error = fit.combination([1, held / demand * tokens, held, 0])
    step = Estimate.log_normal(value, error / value, "s", "roofline")
    assert step.low < published_s < step.high
    # One share of the sum explains all three, so that the sum has the published ratios.
    middle = math.sqrt(math.prod(DATA_SHEET_SHARE))
    assert middle * value / published_s == pytest.approx(0.715, abs=0.015)


DISTSERVE = (22.052204789310185, 0.14050923870128956, 23.475041008414784, 0.000592934466077393)
"""OPT-13B on one A100 with vLLM: ms of a prompt and per token of it, of a decode step and per KV token
(github.com/LLMServe/DistServe, commit 82831f16, Apache-2.0)."""


def test_vllm_on_an_a100_as_distserve_measured_it_lies_within_the_shares() -> None:
    parameters, layers, hidden = 12.85e9, 40, 5120
    _, prompt_ms, decode_ms, kv_ms = DISTSERVE
    ideal_ms = (
        (2e3 * parameters / A100.arithmetic_flop_per_s, prompt_ms),
        (2e3 * parameters / A100.bandwidth_bytes_per_s, decode_ms),
        (4e3 * layers * hidden / A100.bandwidth_bytes_per_s, kv_ms),
    )
    low, high = DATA_SHEET_SHARE
    for ideal, measured in ideal_ms:
        assert low <= ideal / measured <= high


@pytest.mark.parametrize(
    ("name", "hardware"),
    [("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA H100 80GB HBM3", "h100-80gb")],
)
def test_llama_2_70b_as_splitwise_measured_it_lies_within_the_shares(
    name: str, hardware: str
) -> None:
    path = TRACES / "service_time/splitwise_perf_model.csv.gz"
    if not path.is_file():
        pytest.skip(f"no {path}: set CRITRATE_TRACES to the folder with the traces")
    prompts, steps = defaultdict(list), defaultdict(list)
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            key = int(row["prompt_size"]), int(row["batch_size"])
            measured = row["model"] == "llama2-70b" and row["hardware"] == hardware
            if measured and int(row["tensor_parallel"]) == MOST_GPUS and key[1] <= 32:
                prompts[key].append(float(row["prompt_time"]) / 1e3)
                steps[key].append(float(row["token_time"]) / 1e3)
    whole = Rates(
        name=name,
        bandwidth_bytes_per_s=DATA_SHEETS[name].bandwidth_bytes_per_s,
        arithmetic_flop_per_s=DATA_SHEETS[name].arithmetic_flop_per_s,
        share_low=1.0,
        share_high=1.0,
        source="data sheet",
    )
    law = roofline(whole, 69 * 10**9, 138 * 10**9, 80 * 8 * 256 * 2, MOST_GPUS).law
    low, high = DATA_SHEET_SHARE
    assert len(steps) > 8
    for (prompt, batch), taken_s in steps.items():
        share = law(batch, batch * (prompt + 64), batch) / statistics.median(taken_s)
        assert low <= round(share, 2) <= high, (prompt, batch)
    for (prompt, batch), taken_s in prompts.items():
        if prompt >= 512:
            tokens = prompt * batch
            share = law.b1_s_per_token * tokens / statistics.median(taken_s)
            assert low <= round(share, 2) <= high, (prompt, batch)


def test_data_sheets_are_of_their_kind() -> None:
    """150 to 400 dense operations in the time of a byte; those with sparsity would be twice as many."""
    for found in DATA_SHEETS.values():
        assert 150 < found.arithmetic_flop_per_s / found.bandwidth_bytes_per_s < 400
        assert found.source.startswith("NVIDIA")
    assert np.isfinite([r.bandwidth_bytes_per_s for r in DATA_SHEETS.values()]).all()
