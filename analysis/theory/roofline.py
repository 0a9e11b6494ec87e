"""How long a step takes by what the hardware can do, before anything was measured: for grade P0.

A step reads the weights once, multiplies them with every scheduled token and reads the KV of every
scheduled request. Each takes its bytes over the memory's bandwidth, or its operations over the rate
of arithmetic (Williams, Waterman, Patterson, CACM 52(4), 2009), of which an engine reaches a share:

    b0 = weight bytes / (e_B B)   b1 = 2 parameters / (e_F F)   b2 = KV bytes per token / (e_B B)

It is their sum: perfect overlap would leave only the longest. The shares below were measured as shares
of the sum. Not counted: the arithmetic of attention, what tensor-parallel ranks tell each other, and
the engine's own time on the CPU; the lower share leaves room for them on one or two GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.numbers.quantiles import normal_quantile
from analysis.schedulers.step_time import StepTime, StepTimeFit

MOST_GPUS = 2
"""Beyond this many tensor-parallel ranks the shares do not hold: of the same measurements of Splitwise,
steps of decode reach 0.32 to 0.40 with four ranks and 0.15 to 0.20 with eight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one GPU does at most, and the interval (95 %) of the share of it that an engine reaches."""

    name: str
    bandwidth_bytes_per_s: float
    arithmetic_flop_per_s: float
    """16-bit matrix products with dense operands: half of what is printed "with sparsity"."""
    share_low: float
    share_high: float
    source: str

    def __post_init__(self) -> None:
        if not (self.bandwidth_bytes_per_s > 0 and self.arithmetic_flop_per_s > 0):
            raise ValueError(f"{self.name}: bandwidth and arithmetic must be positive")
        if not 0 < self.share_low <= self.share_high <= 1:
            raise ValueError(f"{self.name}: shares must lie in (0, 1], the lower one first")


DATA_SHEET_SHARE = (0.43, 0.90)
"""Shares of a data sheet's figures. Below, the least of what others' measurements come to: DistServe's
fits of vLLM with OPT-13B on one A100 0.54 and 0.62 (weights), 0.68 and 0.82 (KV), 0.59 and 0.69
(arithmetic); Splitwise, Llama-2-70B, medians of up to 32 at a time, on two A100 0.57 to 0.63 (steps of
decode) and 0.54 to 0.66 (prompts of 512 tokens and more), on two H100 0.45 to 0.56 and 0.43 to 0.48.
Above, assumed: about what a plain copy reaches."""
MEASURED_SHARE = (0.48, 1.00)
"""Shares of what `scripts/gpu-bandwidth` measured: the same, as if that were 0.9 of the data sheet."""


def _data_sheet(name: str, terabytes_per_s: float, teraflop_per_s: float, sheet: str) -> Rates:
    low, high = DATA_SHEET_SHARE
    return Rates(
        name=name,
        bandwidth_bytes_per_s=terabytes_per_s * 1e12,
        arithmetic_flop_per_s=teraflop_per_s * 1e12,
        share_low=low,
        share_high=high,
        source=f"NVIDIA's data sheet of the {sheet}",
    )


DATA_SHEETS: Mapping[str, Rates] = {
    rates.name: rates
    for rates in (
        _data_sheet("NVIDIA A100-SXM4-40GB", 1.555, 312.0, "A100"),
        _data_sheet("NVIDIA A100-SXM4-80GB", 2.039, 312.0, "A100"),
        _data_sheet("NVIDIA A100 80GB PCIe", 1.935, 312.0, "A100"),
        _data_sheet("NVIDIA H100 80GB HBM3", 3.35, 989.5, "H100 SXM"),
        _data_sheet("NVIDIA H100 PCIe", 2.0, 756.5, "H100 PCIe"),
        _data_sheet("NVIDIA H200", 4.8, 989.5, "H200 SXM"),
    )
}
"""By the name that NVML gives the GPU."""


def roofline(
    rates: Rates, parameters: int, weight_bytes: int, kv_bytes_per_token: int, gpus: int = 1
) -> StepTimeFit:
    """The law b0 + b1 tokens + b2 KV of a dense model on ``gpus`` that share it evenly.

    The shares of bandwidth and of arithmetic are independent, log-normal, with the interval of
    ``rates``; the law stands at their geometric middle. Raises ValueError for numbers that are not
    positive, and for more than `MOST_GPUS`.
    """
    if min(parameters, weight_bytes, kv_bytes_per_token, gpus) < 1:
        raise ValueError("parameters, bytes and GPUs must be positive")
    if gpus > MOST_GPUS:
        raise ValueError(
            f"{gpus} tensor-parallel ranks spend more on telling each other than is counted here (known "
            f"up to {MOST_GPUS}): state a measured step_time"
        )
    share = math.sqrt(rates.share_low * rates.share_high)
    bandwidth = gpus * share * rates.bandwidth_bytes_per_s
    law = StepTime(
        b0_s=weight_bytes / bandwidth,
        b1_s_per_token=2 * parameters / (gpus * share * rates.arithmetic_flop_per_s),
        b2_s_per_kv_token=kv_bytes_per_token / bandwidth,
    )
    spread = math.log(rates.share_high / rates.share_low) / 2 / normal_quantile(0.975)
    read = spread * np.array([law.b0_s, 0.0, law.b2_s_per_kv_token, 0.0])
    computed = spread * np.array([0.0, law.b1_s_per_token, 0.0, 0.0])
    return StepTimeFit(
        law=law,
        covariance=np.outer(read, read) + np.outer(computed, computed),
        residual_relative=0.0,
        condition_number=1.0,
        num_observations=0,
        method=f"{rates.source}, {rates.share_low:.2f} to {rates.share_high:.2f} of it reached",
    )
