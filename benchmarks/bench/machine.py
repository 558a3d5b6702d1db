"""What the machine itself reaches, to measure a step against: matrix products, and bytes moved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def run_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run, waiting for the device before and after."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what a CUDA device has been given; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bf16_rate(device: torch.device) -> float:
    """As [`matmul_rate`], of bfloat16: what a training in half precision can reach at most."""
    return matmul_rate(device, runs=20 if device.type == "cuda" else 1, dtype=torch.bfloat16)


def matmul_rate(device: torch.device, runs: int = 3, dtype: torch.dtype = torch.float32) -> float:
    """FLOP a second of a large matrix product, the median of some runs after one that warms up."""
    side = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [run_seconds(lambda: one @ other, device) for _ in range(runs + 1)][1:]
    return 2 * side**3 / statistics.median(times)


def copy_bandwidth(device: torch.device, runs: int = 3) -> float:
    """Bytes a second, read and written, of a copy of 128 MiB, the median of some runs after one that warms up."""
    source = torch.ones(2**25, device=device)
    target = torch.empty_like(source)
    times = [run_seconds(lambda: target.copy_(source), device) for _ in range(runs + 1)][1:]
    return 2 * source.nbytes / statistics.median(times)
