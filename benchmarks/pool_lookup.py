"""
What an exact look-up in a `FeaturePool` costs, against the bare float32 matrix product of the queries with the whole
pool, which is the least that an exact search does, taking turns within one process.

    python benchmarks/pool_lookup.py [--json FILE]

Only ratios mean anything across machines. Each round times both, in alternating order, and gives one ratio; the ratios
reported are the medians over rounds. Memory is what a look-up allocates beyond the pool and the queries, at its peak.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.machine import run_seconds
from bench.output import write_result
from torch.profiler import ProfilerActivity, profile

from hf_robust_clip.pool import FeaturePool

SIZES = ("256x21845x512", "64x5000x64", "256x200000x512")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes that a run held at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(batch: int, size: int, dim: int, dtype: torch.dtype, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of both in every round, the median of their ratios, and the peak memory of a look-up."""
    generator = torch.Generator(device).manual_seed(0)
    features = F.normalize(torch.randn(size, dim, generator=generator, device=device), dim=1)
    queries = F.normalize(torch.randn(batch, dim, generator=generator, device=device), dim=1)
    pool = FeaturePool(size, dim, dtype).to(device)
    pool.enqueue(features)
    runs: dict[str, Callable[[], Any]] = {
        "look_up": lambda: pool.nearest(queries),
        "product": lambda: queries @ features.T,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    # A single run of the smaller sizes is too short to time.
    repeats = min(max(round(2e9 / (batch * size * dim)), 1), 100)
    for run in runs.values():
        run()
    for number in range(rounds):
        for name in sorted(runs, reverse=bool(number % 2)):
            times[name].append(statistics.median(run_seconds(runs[name], device) for _ in range(repeats)))
    return {
        "batch": batch,
        "size": size,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": statistics.median(a / b for a, b in zip(times["look_up"], times["product"], strict=True)),
        "milliseconds": {name: [round(value * 1e3, 3) for value in values] for name, values in times.items()},
        "peak_mib": round(peak_bytes(runs["look_up"], device) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--rounds", type=int, default=9, help="rounds measured (default: 9)")
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="BxPxD", help="queries x pool x dimension (default: three sizes)"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    print("   queries      pool  dim  stored    look-up     product  ratio      peak")
    for size in options.sizes:
        batch, entries, dim = map(int, size.split("x"))
        for dtype in DTYPES.values():
            row = measure(batch, entries, dim, dtype, options.rounds, device)
            look_up, product = (statistics.median(row["milliseconds"][name]) for name in ("look_up", "product"))
            print(
                f"{batch:>10}{entries:>10}{dim:>5}  {row['dtype']:<8}{look_up:>7.1f} ms{product:>9.1f} ms"
                f"{row['ratio']:>7.2f}{row['peak_mib']:>6.1f} MiB"
            )
            results.append(row)
    result = {
        "results": results,
    }
    write_result(options.json, result, ("torch",))


if __name__ == "__main__":
    main()
