"""Laws read from files: public formats, marginals, damaged files, and the law that ships."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadgen import traces
from loadgen.workload import Workload, part

ROOT = Path(__file__).resolve().parents[2]
TRACES = Path(os.environ.get("CRITRATE_TRACES", ROOT.parent / "shared/traces"))


def trace(name: str) -> Path:
    path = TRACES / "lengths" / name
    if not path.exists():
        pytest.skip(f"no {path}: set CRITRATE_TRACES to the folder with the traces")
    return path


@pytest.mark.parametrize(
    ("read", "name", "count", "prompt", "output", "demand"),
    [
        (traces.read_azure, "azure_2023_conv.csv.gz", 19_366, 1154.7, 211.1, 259e3),
        (traces.read_azure, "azure_2023_code.csv.gz", 8_819, 2047.8, 27.9, 59e3),
        (
            traces.read_mooncake,
            "mooncake_fast25_conversation.jsonl.gz",
            12_031,
            12_035,
            342.6,
            4497e3,
        ),
        (traces.read_mooncake, "mooncake_fast25_synthetic.jsonl.gz", 3_993, 15_326, 149.1, 1087e3),
        (traces.read_vidur, "vidur_arxiv_summarization_llama2.csv.gz", 28_257, 2588, 291.4, 705e3),
        (traces.read_sharegpt, "sharegpt_gpt4_qwen3_32b_300.csv.gz", 300, 862.3, 665.0, 812e3),
    ],
)
def test_public_traces(read, name, count, prompt, output, demand) -> None:  # type: ignore[no-untyped-def]
    law = read(trace(name))
    assert len(law.prompt_tokens) == count and not law.exact and law.source == name
    assert law.mean(law.prompt_tokens) == pytest.approx(prompt, rel=1e-3)
    assert law.mean(law.output_tokens) == pytest.approx(output, rel=1e-3)
    assert law.mean(law.decode_demand()) == pytest.approx(demand, rel=0.01)


# The columns of the first two releases, and of the third, which inserts two.
BURSTGPT = [
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,230,1317,Conversation log\n"
    "118,GPT-4,417,0,417,Conversation log\n"
    "120,GPT-4,0,0,0,API log\n",
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,a,1.5,ChatGPT,472,18,490,Conversation log\n"
    "45,b,9.1,ChatGPT,1087,230,1317,Conversation log\n"
    "118,c,0,GPT-4,417,0,417,Conversation log\n"
    "120,d,0,GPT-4,0,0,0,API log\n",
]


@pytest.mark.parametrize("text", BURSTGPT)
def test_burstgpt_leaves_failures_out_and_counts_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "BurstGPT_1.csv"
    path.write_text(text)
    law = traces.read_burstgpt(path)
    assert law.prompt_tokens.tolist() == [472, 1087] and law.output_tokens.tolist() == [18, 230]
    assert law.notes == (
        "BurstGPT_1: 2 of 4 requests (50 %) failed without output and are left out",
    )
    # Only a failure may be empty.
    path.write_text(
        text.replace("5,ChatGPT,472", "5,ChatGPT,0").replace("1.5,ChatGPT,472", "1,C,0")
    )
    with pytest.raises(ValueError, match="line 2: a length must be"):
        traces.read_burstgpt(path)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (
            traces.read_azure,
            "TIMESTAMP,ContextTokens\n1,2\n",
            "line 1: no column 'GeneratedTokens'",
        ),
        (traces.read_burstgpt, "Request tokens,Response tokens\n5,0\n", "no requests"),
        (traces.read_sharegpt, "prompt_tokens,output_tokens\n5,6\n5,0\n", "line 3: a length must"),
        (traces.read_sharegpt, "prompt_tokens,output_tokens\n5\n", "line 2: a length must be"),
        (traces.read_vidur, "num_prefill_tokens,num_decode_tokens\n", "no requests"),
        (
            traces.read_mooncake,
            '{"input_length": 5, "output_length": 5}\n{"a": 1}\n',
            "line 2: not",
        ),
        (traces.read_mooncake, "5\n", "line 1: not a"),
        (lambda p: traces.read_marginals(p, p), "n,share\n5,1\n", "no column 'probability'"),
        (lambda p: traces.read_marginals(p, p), "n,probability\n0.5,1\n", "line 2: a length must"),
        (lambda p: traces.read_marginals(p, p), "n,probability\n5,x\n", "'x' is no probability"),
        (
            lambda p: traces.read_marginals(p, p),
            "n,probability\n5,nan\n",
            "'nan' is no probability",
        ),
        (lambda p: traces.read_marginals(p, p), "", "no column 'of lengths'"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_named_with_its_line(  # type: ignore[no-untyped-def]
    tmp_path: Path, read, text: str, message: str, packed: bool
) -> None:
    path = tmp_path / ("trace.csv.gz" if packed else "trace.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_absent_or_not_packed(tmp_path: Path) -> None:
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"not gzip")
    for path in (tmp_path / "absent.csv", broken):
        with pytest.raises(ValueError, match="cannot be read as a trace"):
            traces.read_azure(path)
        with pytest.raises(ValueError, match="cannot be read as a law of lengths"):
            traces.read_marginals(path, path)


def test_marginals_of_files(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt,probability\n10,0.25\n20,0.75\n")
    (tmp_path / "out.csv").write_text("output,probability\n1,0.5\n3,0.5\n")
    law = traces.read_marginals(tmp_path / "in.csv", tmp_path / "out.csv")
    assert (law.name, law.exact) == ("in x out", True)
    assert law.source == "in.csv and out.csv; prompt and output taken as independent"
    points = zip(law.prompt_tokens, law.output_tokens, law.weight.round(9), strict=True)
    assert sorted(points) == [(10, 1, 0.125), (10, 3, 0.125), (20, 1, 0.375), (20, 3, 0.375)]


def test_a_long_marginal_keeps_its_first_and_second_moments() -> None:
    prompt = trace("servegen_deepseek_r1_prompt_pmf.csv.gz")
    law = traces.read_marginals(prompt, trace("servegen_deepseek_r1_output_pmf.csv.gz"))
    rows = [line.split(",") for line in gzip.decompress(prompt.read_bytes()).decode().split()[1:]]
    length, share = np.array(rows, dtype=float).T
    assert len(rows) == 29_530 and len(law.weight) < 300_000
    assert law.mean(law.prompt_tokens) == pytest.approx(length @ share, rel=1e-7)
    assert law.mean(law.prompt_tokens**2) == pytest.approx(length**2 @ share, rel=1e-7)
    assert law.mean(law.prompt_tokens**3) == pytest.approx(length**3 @ share, rel=1e-4)
    assert law.mean(law.output_tokens) == pytest.approx(1527.4, rel=1e-4)
    assert "29530 prompt lengths in 128 bins, which keep mean and second moment" in law.notes[1]
    assert "the third moves by" in law.notes[1]


# -- the law that ships ----------------------------------------------------------------------------


def moments(law: Workload) -> dict[str, float]:
    s, o = law.prompt_tokens.astype(float), law.output_tokens.astype(float)
    demand = law.decode_demand()
    values = {"s": s, "o": o, "s o": s * o, "o^2": o * o, "demand": demand, "demand^2": demand**2}
    return {name: law.mean(v) for name, v in values.items()} | {"error": law.standard_error(demand)}


def test_the_shipped_law_is_the_trace_in_bins() -> None:
    whole = traces.read_azure(trace("azure_2023_conv.csv.gz"))
    binned = traces.shipped("azure_2023_conv")
    assert not binned.exact and binned.observed.sum() == len(whole.weight)
    assert len(binned.weight) < len(whole.weight) / 5
    found, expected = moments(binned), moments(whole)
    assert found == pytest.approx(expected, rel=5e-3)
    for name, within in (("s", 2e-4), ("o", 2e-4), ("demand", 2e-4), ("o^2", 2e-3)):
        assert found[name] == pytest.approx(expected[name], rel=within), name


def test_the_shipped_law_says_where_it_comes_from() -> None:
    path = ROOT / "loadgen" / "data" / "azure_2023_conv.csv"
    text = path.read_text()
    for words in ("CC-BY-4.0", "AzurePublicDataset", "Patel et al., Splitwise", "ISCA 2024"):
        assert words in text
    assert path.stat().st_size < 60_000
    law = traces.shipped("azure_2023_conv")
    assert "CC-BY-4.0" in law.source and "ISCA 2024" in law.source
    assert law.mean(law.decode_demand()) == pytest.approx(259.1e3, rel=1e-3)
    with pytest.raises(ValueError, match="only azure_2023_conv"):
        traces.shipped("burstgpt")


def test_the_shipped_law_is_derived_again_byte_for_byte(tmp_path: Path) -> None:
    source, again = trace("azure_2023_conv.csv.gz"), tmp_path / "again.csv"
    script = ROOT / "scripts" / "derive_histogram"
    subprocess.run([sys.executable, script, source, "--out", again], check=True, cwd=ROOT)
    assert again.read_bytes() == (ROOT / "loadgen/data/azure_2023_conv.csv").read_bytes()


def test_parts_of_a_real_trace_agree_at_the_stated_rate() -> None:
    """80 % against 20 % of the Azure chats over 150 seeds: 95 % intervals miss 1 to 15 times.

    P(0 misses) = 5e-4, P(more than 15) = 4e-3 for 150 independent intervals that cover 95 %.
    """
    whole = traces.read_azure(trace("azure_2023_conv.csv.gz"))
    missed = 0
    for seed in range(150):
        one, other = (part(whole, 0.8, seed, side) for side in ("estimate", "test"))
        demands = one.decode_demand(), other.decode_demand()
        error = np.hypot(one.standard_error(demands[0]), other.standard_error(demands[1]))
        missed += abs(one.mean(demands[0]) - other.mean(demands[1])) > 1.96 * error
    assert 1 <= missed <= 15
