"""What each client says of its own run, read from the report that it wrote."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Counts:
    """Requests that finished, and their tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Report:
    """One client's report of one run.

    ``words`` are the words in the text that it received: one per output token of the mock. ``beside``
    are requests that it sent and leaves out of its report, and ``why`` it sent them.
    """

    counts: Counts
    words: int
    failed: int
    beside: Counts = Counts(0, 0, 0)
    why: str = ""


def read_openai(path: Path) -> Report:
    """Of openai_client.py: its request that is too long must have been refused."""
    said = json.loads(path.read_text())
    counts = Counts(said["requests"], said["prompt_tokens"], said["output_tokens"])
    return Report(counts, said["words"], failed=1 - said["refused"])


def read_vllm(path: Path) -> Report:
    said = json.loads(path.read_text())
    counts = Counts(said["completed"], said["total_input_tokens"], said["total_output_tokens"])
    words = sum(len(text.split()) for text in said["generated_texts"])
    return Report(counts, words, said["failed"])


def read_vllm_ready_check(path: Path) -> Report:
    """With --ready-check-timeout-sec: the first request is sent once before the run."""
    said, report = json.loads(path.read_text()), read_vllm(path)
    check = Counts(1, said["input_lens"][0], said["output_lens"][0])
    return Report(report.counts, report.words, report.failed, check, "its ready check")


def read_sglang(path: Path) -> Report:
    """The warm-up is the first request, cut to 32 output tokens."""
    said = json.loads(path.read_text())
    counts = Counts(said["completed"], said["total_input_tokens"], said["total_output_tokens"])
    failed = sum(1 for error in said["errors"] if error)
    warm_up = Counts(1, said["input_lens"][0], min(said["output_lens"][0], 32))
    words = said["total_output_tokens_retokenized"]
    return Report(counts, words, failed, warm_up, "its warm-up")


def read_guidellm(path: Path) -> Report:
    (run,) = json.loads(path.read_text())["benchmarks"]
    totals, done = run["metrics"]["request_totals"], run["requests"]["successful"]
    counts = Counts(
        totals["successful"],
        sum(request["prompt_tokens"] for request in done),
        sum(request["output_tokens"] for request in done),
    )
    words = sum(len(request["output"].split()) for request in done)
    return Report(counts, words, totals["total"] - totals["successful"])
