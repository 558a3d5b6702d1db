"""
How long the mixture over the similarities of all pairs takes: its fit, which looks at a million of them at most, and
the probability of every pair.

    python benchmarks/mixture_fit.py [--json FILE]

Similarities are drawn from two Gaussians, 5% of them from the lower one.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from bench.output import write_result

from hf_robust_clip.mixture import SimilarityMixture

SIZES = (100_000, 1_000_000, 10_000_000)


def similarities(rows: int, seed: int) -> np.ndarray:
    """Of that many pairs `(rows,)`, float32."""
    generator = np.random.default_rng(seed)
    risky = generator.random(rows) < 0.05
    drawn = generator.normal(np.where(risky, 0.12, 0.28), np.where(risky, 0.05, 0.06)).astype(np.float32)
    return np.clip(drawn, -1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--rounds", type=int, default=3, help="draws of each size (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    print("| similarities | fit, s | probability, s | peak memory of the process, MiB |\n|---|---|---|---|")
    for rows in SIZES:
        fits, probabilities = [], []
        for seed in range(options.rounds):
            drawn = similarities(rows, seed)
            start = time.perf_counter()
            mixture = SimilarityMixture.fit(drawn, seed=seed)
            fitted = time.perf_counter()
            mixture.probability(drawn)
            fits.append(fitted - start)
            probabilities.append(time.perf_counter() - fitted)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        runs.append({"rows": rows, "fit_seconds": fits, "probability_seconds": probabilities, "peak_mib": peak})
        print(f"| {rows:,} | {statistics.median(fits):.2f} | {statistics.median(probabilities):.2f} | {peak:.0f} |")
    largest = runs[-1]
    seconds = statistics.median(map(sum, zip(largest["fit_seconds"], largest["probability_seconds"], strict=True)))
    print(f"fit and probability of {SIZES[-1]:,}: {seconds:.1f} s")
    result = {
        "ratios": {},
        "seconds_of_ten_million": seconds,
        "runs": runs,
        "device": "cpu",
    }
    write_result(options.json, result, ("torch", "scikit-learn", "numpy"))


if __name__ == "__main__":
    main()
