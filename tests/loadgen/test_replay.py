"""Traces as loads: instants and lengths of each public format, from small files made here."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from loadgen.arrivals import arrivals, run_arrivals, schedule_ns
from loadgen.fidelity import fidelity
from loadgen.records import RequestRecord, Run
from loadgen.replay import replay_of, replayed, run_lengths
from loadgen.traces import (
    read_azure,
    read_burstgpt,
    read_mooncake,
    read_requests,
    read_servegen,
    read_sharegpt,
)
from loadgen.workload import clipped, declared

# Four requests at 0, 1.5, 1.5 and 4 s; in two of the formats a fifth that failed, or out of order.
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:58.6805900,374,44
2023-11-17 00:00:00.1805900,396,109
2023-11-17 00:00:00.1805900,879,55
2023-11-17 00:00:02.6805900,91,16
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,374,44
2024-05-10 02:00:01.509930+02:00,396,109
2024-05-10 00:00:01.509930+00:00,879,55
2024-05-10 00:00:04.009930+00:00,91,16
"""
MOONCAKE = """{"timestamp": 27000, "input_length": 374, "output_length": 44, "hash_ids": [46, 47]}
{"timestamp": 28500, "input_length": 396, "output_length": 109, "hash_ids": [46]}
{"timestamp": 28500, "input_length": 879, "output_length": 55, "hash_ids": [46]}
{"timestamp": 31000, "input_length": 91, "output_length": 16, "hash_ids": [46]}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5.0,ChatGPT,374,44,418,Conversation log
6.5,ChatGPT,396,109,505,Conversation log
6.5,GPT-4,500,0,500,API log
6.5,ChatGPT,879,55,934,Conversation log
9.0,GPT-4,91,16,107,API log
"""
SERVEGEN = """request_id,timestamp,input_tokens,output_tokens
0,0.25,374,44
3,4.25,91,16
1,1.75,396,109
2,1.75,879,55
"""
SHAREGPT = """arrival_s,prompt_tokens,output_tokens
1,374,44
2.5,396,109
2.5,879,55
5,91,16
"""
FILES = [
    ("azure", AZURE, read_azure),
    ("azure", AZURE_2024, read_azure),
    ("mooncake", MOONCAKE, read_mooncake),
    ("burstgpt", BURSTGPT, read_burstgpt),
    ("servegen", SERVEGEN, read_servegen),
    ("sharegpt", SHAREGPT, read_sharegpt),
]
LENGTHS = [[374, 44], [396, 109], [879, 55], [91, 16]]


def file_of(folder: Path, text: str, packed: bool = False) -> Path:
    path = folder / ("trace.gz" if packed else "trace")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def run_of(path: Path, format: str, speed: float = 1.0, horizon_s: float = 4.0, **more) -> Run:  # type: ignore[no-untyped-def]
    law = replay_of(path, format, **more)
    return Run(
        id="r",
        arrival_rate=speed * law.own_rate,
        horizon_s=horizon_s,
        warmup_s=0.5,
        seed=3,
        arrivals=law,
    )


@pytest.mark.parametrize(("format", "text", "read"), FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_instants_and_lengths_come_together(  # type: ignore[no-untyped-def]
    tmp_path: Path, format: str, text: str, read, packed: bool
) -> None:
    path = file_of(tmp_path, text, packed)
    run = run_of(path, format)
    assert isinstance(run.arrivals.text, str) and run.arrival_rate == pytest.approx(3 / 4)
    due_s = run_arrivals(run)
    # The last request comes at 4 s, which a run of 4 s leaves out.
    assert due_s == pytest.approx([0.0, 1.5, 1.5], abs=1e-9)
    law = read(path)
    assert run_lengths(run, law, 3)[:, :2].tolist() == LENGTHS[:3]
    assert run_lengths(run, law, 3)[:, 2].tolist() == [44, 109, 55]
    assert read_requests(path, format).left_out == (1 if format == "burstgpt" else 0)


def test_another_rate_stretches_the_clock_and_nothing_else(tmp_path: Path) -> None:
    path = file_of(tmp_path, AZURE)
    twice = run_of(path, "azure", speed=2.0, horizon_s=2.0)
    assert run_arrivals(twice) == pytest.approx([0.0, 0.75, 0.75])
    short = arrivals(twice.arrivals, twice.arrival_rate, 0.5, 99)
    assert short.tolist() == [0.0], "a shorter horizon is the beginning of a longer one"
    with pytest.raises(ValueError, match=r"lasts 2 s at 1.5 req/s, shorter than a run of 2.5 s"):
        arrivals(twice.arrivals, twice.arrival_rate, 2.5, 1)


def test_a_part_from_an_instant_on_and_a_limit_of_tokens(tmp_path: Path) -> None:
    path = file_of(tmp_path, AZURE)
    late = run_of(path, "azure", horizon_s=3.0, from_s=1.0)
    assert run_arrivals(late) == pytest.approx([0.5, 0.5]) and late.arrival_rate == pytest.approx(
        2 / 3
    )
    small = run_of(path, "azure", max_total_tokens=600)
    law, share = clipped(read_azure(path), 600)
    assert share == pytest.approx(0.25)
    assert run_arrivals(small) == pytest.approx([0.0, 1.5])
    assert run_lengths(small, declared(law, extra=7), 2).tolist() == [
        [374, 44, 51],
        [396, 109, 116],
    ]
    with pytest.raises(ValueError, match="nothing is left to replay from 4 s on"):
        replay_of(path, "azure", from_s=4.0)


def test_lengths_of_another_law_are_refused(tmp_path: Path) -> None:
    run = run_of(file_of(tmp_path, AZURE), "azure")
    (tmp_path / "other").mkdir()
    for text in (AZURE.replace("879", "880"), "\n".join(AZURE.splitlines()[:3])):
        law = read_azure(file_of(tmp_path / "other", text))
        with pytest.raises(ValueError, match="are not those of"):
            run_lengths(run, law, 3)


def test_a_file_that_changed_or_went_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, MOONCAKE)
    run = run_of(path, "mooncake")
    run_arrivals(run)
    path.write_text(MOONCAKE.replace("28500", "28600"))
    changed = replace(run.arrivals, from_s=0.1)
    with pytest.raises(ValueError, match="is not the trace that was replayed"):
        replayed(changed, 0.75, 1.0)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        replayed(changed, 0.75, 1.0)


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("vidur", "num_prefill_tokens,num_decode_tokens\n5,6\n", "have no instants: replay one of"),
        ("azure", AZURE.replace("2023-11-17", "yesterday"), "line 3: 'yesterday 00:00:00.1805900'"),
        ("burstgpt", BURSTGPT.replace("\n6.5", "\nx"), "line 3: 'x' is no instant"),
        ("mooncake", MOONCAKE.replace('"timestamp": 28500, ', ""), "line 2: not a JSON object"),
        ("servegen", SERVEGEN.replace("timestamp", "time"), "no column 'timestamp'"),
        ("servegen", SERVEGEN.replace("1.75", "inf"), "'inf' is no instant"),
    ],
)
def test_a_damaged_trace_is_named_with_its_line(
    tmp_path: Path, format: str, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replay_of(file_of(tmp_path, text), format)


def test_a_replay_is_judged_by_its_schedule_alone(tmp_path: Path) -> None:
    rows = "\n".join(f"{i},{i // 3},50,5" for i in range(300))
    path = file_of(tmp_path, f"request_id,timestamp,input_tokens,output_tokens\n{rows}\n")
    run = run_of(path, "servegen", horizon_s=90.0)
    due_s = run_arrivals(run)
    assert len(due_s) == 270
    records = [
        RequestRecord(
            id=i,
            scheduled_ns=ns,
            sent_ns=ns + 1000,
            first_token_ns=ns + 2000,
            last_token_ns=ns + 3000,
            prompt_tokens=50,
            output_tokens_designed=5,
            max_tokens=5,
            output_tokens=5,
            prompt_tokens_reported=50,
            outcome="completed",
        )
        for i, ns in enumerate(schedule_ns(due_s, 0).tolist())
    ]
    assert fidelity(run, records, 90.0, 0).valid, (
        "three at once on every second, as the trace has it"
    )
    moved = [replace(r, scheduled_ns=r.scheduled_ns + 10**8) for r in records]
    assert not fidelity(run, moved, 90.0, 0).valid
