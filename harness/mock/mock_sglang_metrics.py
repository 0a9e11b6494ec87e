"""What the mock server shows at ``/metrics`` as SGLang 0.5.23: its names, labels and bucket edges.

As in SGLang, some series exist only once they have something to count; those of requests that are not
streamed are there from the start, as after the real server's warm-up request, which is not counted here.
Families that say nothing of one plain scheduler are left out (routing keys, disaggregation, stages, HTTP
requests by route). Only ``critrate_mock_*`` are not
SGLang's: they let a run be refused whose server ran late.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from analysis.schedulers.engine import EngineLimits
from harness.mock.exposition import Family, HistogramFamily, Labels, Page
from harness.mock.mock_sglang_books import SGLangBooks

BY_PROCESS = ("num_retracted_reqs", "num_paused_reqs")
"""Gauges whose label sets name the process."""
_Value = Callable[[SGLangBooks], float]


class _There(NamedTuple):
    """Which series exist already."""

    retracted: bool
    aborted: bool
    several_tokens: bool
    streamed_token: bool
    streamed: bool
    streamed_tokens: bool

    @classmethod
    def of(cls, books: SGLangBooks) -> _There:
        streamed = books.streamed
        return cls(
            retracted=books.engine.preemptions > 0,
            aborted=books.engine.aborted > 0,
            several_tokens=books.inter_token_latency.sum > 0,
            streamed_token=any(streamed.time_to_first_token.counts),
            streamed=streamed.requests > 0,
            streamed_tokens=any(streamed.time_per_output_token.counts),
        )


def _nothing(_: SGLangBooks) -> float:
    return 0.0


class SGLangMetrics:
    """Renders the page, whose series grow in number with what has happened."""

    def __init__(
        self, model: str, limits: EngineLimits, claimed_tokens: int, context_len: int
    ) -> None:
        """``claimed_tokens`` is the pool as the server shows it."""
        self._front = {"engine_type": "unified", "model_name": model}
        ranks = {"moe_ep_rank": "0", "pp_rank": "0", "tp_rank": "0"}
        self._scheduler = self._front | ranks
        self._limits = limits
        self._claimed_tokens = claimed_tokens
        self._constants = {
            "max_total_num_tokens": (
                "Maximum total number of tokens in the KV cache pool.",
                claimed_tokens,
            ),
            "page_size": ("KV cache page size in tokens.", limits.block_size),
            "num_pages": ("Number of KV cache pages.", claimed_tokens // limits.block_size),
            "context_len": ("Maximum context length.", context_len),
        }
        self._page: Page[SGLangBooks] | None = None
        self._there: _There | None = None

    def render(self, books: SGLangBooks) -> bytes:
        """The page as bytes, in the Prometheus text format 0.0.4."""
        there = _There.of(books)
        if self._page is None or there != self._there:
            self._there = there
            self._page = Page(self._families(books, there))
        return self._page.render(books)

    def _families(
        self, books: SGLangBooks, there: _There
    ) -> list[Family[SGLangBooks] | HistogramFamily]:
        families: list[Family[SGLangBooks] | HistogramFamily] = []
        families += self._gauges()
        families += self._scheduler_counters()
        if there.retracted:
            families += self._retractions()
        families += self._front_end(there)
        if there.aborted:
            families.append(
                Family(
                    "sglang:num_aborted_requests",
                    "counter",
                    "Number of requests aborted.",
                    [(self._front, lambda b: b.engine.aborted)],
                )
            )
        families += self._histograms(books, there)
        families += _of_the_mock()
        return families

    def _gauges(self) -> list[Family[SGLangBooks]]:
        pool, claimed = self._limits.pool_tokens, self._claimed_tokens
        rows: dict[str, tuple[str, _Value]] = {
            "num_running_reqs": ("The number of running requests.", lambda b: b.gauges.running),
            "num_queue_reqs": (
                "The number of requests in the waiting queue.",
                lambda b: b.gauges.waiting,
            ),
            "num_grammar_queue_reqs": (
                "The number of requests in the grammar waiting queue.",
                _nothing,
            ),
            "gen_throughput": (
                "The generation throughput (token/s).",
                lambda b: b.gauges.gen_throughput,
            ),
            "cache_hit_rate": ("The prefix cache hit rate.", _nothing),
            "decode_sum_seq_lens": (
                "The sum of all sequence lengths in decode.",
                lambda b: b.gauges.sum_seq_lens,
            ),
            "token_usage": ("The token usage.", lambda b: round(b.gauges.used_tokens / pool, 2)),
            "full_token_usage": (
                "The token usage for full attention layers.",
                lambda b: b.gauges.used_tokens / pool,
            ),
            "num_used_tokens": ("The number of used tokens.", lambda b: b.gauges.used_tokens),
            "kv_available_tokens": (
                "Number of free token slots in the KV cache pool.",
                lambda b: max(claimed - b.gauges.used_tokens - b.gauges.evictable_tokens, 0),
            ),
            "kv_evictable_tokens": (
                "Number of evictable (radix-cached) token slots in the KV cache pool.",
                lambda b: b.gauges.evictable_tokens,
            ),
            "kv_used_tokens": (
                "Number of actively used token slots in the KV cache pool.",
                lambda b: b.gauges.used_tokens,
            ),
            "num_retracted_reqs": (
                "The number of retracted requests.",
                lambda b: b.gauges.retracted,
            ),
            "num_paused_reqs": ("The number of paused requests by async weight sync.", _nothing),
            "utilization": ("The utilization.", _nothing),
            "new_token_ratio": ("The new token ratio.", lambda b: b.gauges.new_token_ratio),
            "is_cuda_graph": ("Whether the batch is using CUDA graph.", _nothing),
        }
        for name, (text, number) in self._constants.items():
            rows[name] = (text, _constant(number))
        of_process = {"pid": str(os.getpid())}
        return [
            Family(
                f"sglang:{name}",
                "gauge",
                text,
                [(self._scheduler | (of_process if name in BY_PROCESS else {}), value)],
            )
            for name, (text, value) in rows.items()
        ]

    def _scheduler_counters(self) -> list[Family[SGLangBooks]]:
        def modes(**values: _Value) -> list[tuple[Labels, _Value]]:
            return [(self._scheduler | {"mode": mode}, value) for mode, value in values.items()]

        return [
            Family(
                "sglang:cuda_graph_passes",
                "counter",
                "Total number of forward passes categorized by CUDA graph.",
                modes(prefill_none=lambda b: b.prefill_steps, decode_none=lambda b: b.decode_steps),
            ),
            Family(
                "sglang:realtime_tokens",
                "counter",
                "Total number of tokens processed (updated on each log interval). mode: "
                "prefill_compute, prefill_cache, decode.",
                modes(prefill_compute=lambda b: b.prefill_tokens, decode=lambda b: b.decode_tokens),
            ),
        ]

    def _retractions(self) -> list[Family[SGLangBooks]]:
        rows: dict[str, _Value] = {
            "requests": lambda b: b.engine.preemptions,
            "input tokens": lambda b: b.engine.retracted_input_tokens,
            "output tokens": lambda b: b.engine.retracted_output_tokens,
        }
        return [
            Family(
                f"sglang:num_retracted_{what.replace(' ', '_')}",
                "counter",
                f"Total number of retracted {what}.",
                [(self._scheduler, value)],
            )
            for what, value in rows.items()
        ]

    def _front_end(self, there: _There) -> list[Family[SGLangBooks]]:
        fronts = {"false": "whole"} | ({"true": "streamed"} if there.streamed else {})
        rows: dict[str, tuple[str, str]] = {
            "prompt_tokens": ("Number of prefill tokens processed.", "prompt_tokens"),
            "generation_tokens": ("Number of generation tokens processed.", "generation_tokens"),
            "num_requests": ("Number of requests processed.", "requests"),
        }
        return [
            Family(
                f"sglang:{name}",
                "counter",
                text,
                [
                    (self._front | {"is_streaming": flag}, _of(front, attribute))
                    for flag, front in fronts.items()
                ],
            )
            for name, (text, attribute) in rows.items()
        ]

    def _histograms(self, books: SGLangBooks, there: _There) -> list[HistogramFamily]:
        def by_streaming(name: str, attribute: str, text: str, streamed: bool) -> HistogramFamily:
            fronts = {"false": books.whole} | ({"true": books.streamed} if streamed else {})
            children = [
                (self._front | {"is_streaming": flag}, getattr(front, attribute))
                for flag, front in fronts.items()
            ]
            return HistogramFamily(f"sglang:{name}", text, children)

        families = [
            by_streaming(
                "time_to_first_token_seconds",
                "time_to_first_token",
                "Histogram of time to first token in seconds.",
                there.streamed_token,
            ),
            by_streaming(
                "e2e_request_latency_seconds",
                "e2e_latency",
                "Histogram of End-to-end request latency in seconds",
                there.streamed,
            ),
            by_streaming(
                "request_time_per_output_token_seconds",
                "time_per_output_token",
                "Per-request TPOT in seconds: (finished_time - first_token_time) / "
                "(completion_tokens - 1).",
                there.streamed_tokens,
            ),
        ]
        plain = [
            ("queue_time_seconds", "Histogram of queueing time in seconds.", books.queue_time),
            (
                "prompt_tokens_histogram",
                "Histogram of prompt token length.",
                books.prompt_lengths,
            ),
            (
                "uncached_prompt_tokens_histogram",
                "Histogram of uncached (compute) prompt token length.",
                books.prompt_lengths,
            ),
            (
                "generation_tokens_histogram",
                "Histogram of generation token length.",
                books.output_lengths,
            ),
        ]
        if there.several_tokens:
            text = "Histogram of inter-token latency in seconds."
            plain.append(("inter_token_latency_seconds", text, books.inter_token_latency))
        for name, text, histogram in plain:
            labels = self._scheduler if name == "queue_time_seconds" else self._front
            families.append(HistogramFamily(f"sglang:{name}", text, [(labels, histogram)]))
        return families


def _constant(number: float) -> _Value:
    return lambda _: number


def _of(front: str, attribute: str) -> _Value:
    def value(books: SGLangBooks) -> float:
        number: float = getattr(getattr(books, front), attribute)
        return number

    return value


def _of_the_mock() -> list[Family[SGLangBooks]]:
    return [
        Family(
            "critrate_mock_steps",
            "counter",
            "Steps that the mock engine completed.",
            [({}, lambda b: b.steps)],
        ),
        Family(
            "critrate_mock_overrun_steps",
            "counter",
            "Steps that were completed later than their set end by more than their duration.",
            [({}, lambda b: b.overruns)],
        ),
    ]
