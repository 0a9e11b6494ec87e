"""Length laws: their moments, their draws, and the trace formats they are read from."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import workload as wl

TRACES = Path(
    os.environ.get("CRITRATE_TRACES", Path(__file__).resolve().parents[2].parent / "shared/traces")
)


def trace(name: str) -> Path:
    path = TRACES / "lengths" / name
    if not path.exists():
        pytest.skip(f"no {path}: set CRITRATE_TRACES to the folder with the traces")
    return path


def test_fixed_lengths() -> None:
    law = wl.fixed(512, 128)
    assert law.exact and law.mean(law.prompt_tokens) == 512 and law.mean(law.output_tokens) == 128
    assert wl.fixed(5, 3, 10).max_tokens.tolist() == [10]


def test_uniform_is_the_exact_product_law() -> None:
    law = wl.uniform((10, 1600), (10, 1600))
    s, o = law.prompt_tokens, law.output_tokens
    assert len(s) == 1591**2
    assert law.mean(s) == pytest.approx(805) and law.mean(o) == pytest.approx(805)
    assert law.mean(s * o) == pytest.approx(805**2)
    assert law.mean(s**2) == pytest.approx(805**2 + (1591**2 - 1) / 12)
    assert law.standard_error(s) == 0.0


def test_mixture_is_the_weighted_law() -> None:
    law = wl.mixture([(0.25, wl.fixed(100, 10)), (0.75, wl.uniform((1, 3), (5, 5)))])
    assert law.mean(law.prompt_tokens) == pytest.approx(0.25 * 100 + 0.75 * 2)
    assert law.exact
    observed = wl.pairs([1, 2], [3, 4], name="seen", source="here")
    assert not wl.mixture([(0.5, observed), (0.5, wl.fixed(1, 1))]).exact


def test_clipping_reports_what_it_cut() -> None:
    law, cut = wl.clipped(wl.uniform((1, 10), (1, 10)), 10)
    assert cut == pytest.approx(0.55)
    assert (law.prompt_tokens + law.output_tokens).max() == 10
    assert law.weight.sum() == pytest.approx(1.0)
    whole, nothing = wl.clipped(law, 10)
    assert whole is law and nothing == 0.0


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_clipping_keeps_the_ratio_of_weights(limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    law = wl.pairs(rng.integers(1, 20, 30), rng.integers(1, 20, 30), name="seen", source="here")
    if (law.prompt_tokens + law.output_tokens).min() > limit:
        with pytest.raises(ValueError, match="the shortest has"):
            wl.clipped(law, limit)
        return
    kept, cut = wl.clipped(law, limit)
    assert len(kept.weight) == pytest.approx(30 * (1 - cut))
    assert np.allclose(kept.weight, 1 / len(kept.weight))


def test_draws_repeat_with_the_seed_and_follow_the_law() -> None:
    law = wl.uniform((10, 1600), (10, 800))
    first = law.sample(np.random.default_rng(7), 100_000)
    assert (first == law.sample(np.random.default_rng(7), 100_000)).all()
    assert first.shape == (100_000, 3)
    error = np.sqrt((1591**2 - 1) / 12 / 100_000)
    assert abs(first[:, 0].mean() - 805) < 4 * error
    assert first[:, 1].min() == 10 and first[:, 1].max() == 800
    weighted = wl.mixture([(0.9, wl.fixed(1, 1)), (0.1, wl.fixed(2, 1))])
    ones = (weighted.sample(np.random.default_rng(3), 10_000)[:, 0] == 1).mean()
    assert abs(ones - 0.9) < 4 * np.sqrt(0.09 / 10_000)


def test_the_standard_error_of_an_observed_law_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).integers(1, 1000, 400)
    law = wl.pairs(values, values, name="seen", source="here")
    assert law.standard_error(values) == pytest.approx(values.std(ddof=1) / 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wl.uniform((0, 5), (1, 5)), "prompt range"),
        (lambda: wl.uniform((1, 5), (6, 5)), "output range"),
        (lambda: wl.uniform((1, 100_000), (1, 100_000)), "narrow a range"),
        (lambda: wl.mixture([(0.5, wl.fixed(1, 1))]), "sum to 1"),
        (lambda: wl.fixed(0, 5), "at least one token"),
        (lambda: wl.fixed(5, 5, 4), "max_tokens"),
        (lambda: wl.pairs([1, 2], [1], name="seen", source="here"), "one length"),
    ],
)
def test_laws_that_cannot_be(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("read", "name", "count", "prompt", "output", "demand"),
    [
        (wl.read_azure, "azure_2023_conv.csv.gz", 19_366, 1154.7, 211.1, 259e3),
        (wl.read_azure, "azure_2023_code.csv.gz", 8_819, 2047.8, 27.9, 59e3),
        (wl.read_mooncake, "mooncake_fast25_conversation.jsonl.gz", 12_031, 12_035, 342.6, 4497e3),
        (wl.read_vidur, "vidur_arxiv_summarization_llama2.csv.gz", 28_257, 2588, 291.4, 705e3),
        (wl.read_sharegpt, "sharegpt_gpt4_qwen3_32b_300.csv.gz", 300, 862.3, 665.0, 812e3),
    ],
)
def test_public_traces(read, name, count, prompt, output, demand) -> None:  # type: ignore[no-untyped-def]
    law = read(trace(name))
    s, o = law.prompt_tokens, law.output_tokens
    assert len(s) == count and not law.exact and law.source == name
    assert law.mean(s) == pytest.approx(prompt, rel=1e-3)
    assert law.mean(o) == pytest.approx(output, rel=1e-3)
    assert law.mean(s * o + o * (o + 1) // 2) == pytest.approx(demand, rel=0.01)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (wl.read_azure, "TIMESTAMP,ContextTokens\n1,2\n", "line 1: no column 'GeneratedTokens'"),
        (wl.read_sharegpt, "prompt_tokens,output_tokens\n5,6\n5,0\n", "line 3: a length must be"),
        (wl.read_sharegpt, "prompt_tokens,output_tokens\n5\n", "line 2: a length must be"),
        (wl.read_vidur, "num_prefill_tokens,num_decode_tokens\n", "no requests"),
        (wl.read_mooncake, '{"input_length": 5, "output_length": 5}\n{"a": 1}\n', "line 2: not a"),
        (wl.read_mooncake, "5\n", "line 1: not a"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_trace_is_named_by_file_and_line(  # type: ignore[no-untyped-def]
    tmp_path: Path, read, text: str, message: str, packed: bool
) -> None:
    path = tmp_path / ("trace.csv.gz" if packed else "trace.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_trace_that_is_absent_or_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a trace"):
        wl.read_azure(tmp_path / "absent.csv")
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="cannot be read as a trace"):
        wl.read_azure(broken)
