"""
What does a scan of many pairs cost beside embedding them? Fits a scan on a sample of made-up embeddings, scores all of
them block by block, and looks for groups, copies and ranks, on one core. No image is decoded.

    OMP_NUM_THREADS=1 python benchmarks/scan_at_scale.py --json benchmarks/results/scan_at_scale.json
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench.output import write_result

from hf_robust_clip.scanning.features import Features
from hf_robust_clip.scanning.pairs import judged
from hf_robust_clip.scanning.parts import Parts, read_parts
from hf_robust_clip.scanning.reading import Rows, priorities
from hf_robust_clip.scanning.sample import Sample
from hf_robust_clip.scanning.scoring import BLOCK, Scorer

#: Classes of the made-up pairs, each with a center and a word.
CLASSES = 1000


def made_up(numbers: np.ndarray, centers: np.ndarray, width: int, seed: int) -> tuple[Features, Rows]:
    """Pairs with these numbers: a class each, images near its center, captions with its word."""
    rng = np.random.default_rng([seed, int(numbers[0])])
    classes = (priorities(numbers.astype(np.uint64), seed) % np.uint64(CLASSES)).astype(int)
    pooled = centers[classes] + rng.standard_normal((len(numbers), width), dtype=np.float32)
    pooled = (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).astype(np.float16)
    rows = Rows(
        numbers.astype(np.uint64),
        np.array(
            [f"a photo of a thing{'abcdefghij'[at % 10] * (1 + at // 10 % 100)}" for at in classes], dtype=object
        ),
        rng.integers(2**63, size=len(numbers), dtype=np.int64).astype(np.uint64),
        rng.integers(256, size=(len(numbers), 8, 8, 3), dtype=np.uint8),
        np.full(len(numbers), "", dtype=object),
    )
    return Features(pooled, pooled, pooled), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sample", type=int, default=50_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="Of the references.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for the scores, 400 bytes a row (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    centers = np.random.default_rng(0).standard_normal((CLASSES, args.width), dtype=np.float32)
    numbers = np.arange(min(args.sample, args.rows))
    features, rows = made_up(numbers, centers, args.width, 0)
    sample = Sample(rows, numbers, [features], complete=False)
    start = time.process_time()
    scorer = Scorer(sample, args.sizes, args.rounds, 0)
    fitted, scored = time.process_time() - start, 0.0
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        parts = Parts(Path(folder), 0)
        for first in range(0, args.rows, BLOCK):
            features, rows = made_up(np.arange(first, min(first + BLOCK, args.rows)), centers, args.width, 0)
            start = time.process_time()
            parts.write([scorer.table([features], rows)], [])
            scored += time.process_time() - start
        start = time.process_time()
        found, groups, duplicates = judged(read_parts(Path(folder)), scorer)
        listed = sum(map(len, found))
        after = time.process_time() - start
    print(f"{listed} pairs, {len(groups)} groups, {len(duplicates)} images with copies")
    result = {
        "device": "cpu",
        "rows": args.rows,
        "width": args.width,
        "sample": args.sample,
        "reference_sizes": args.sizes,
        "reference_rounds": args.rounds,
        "fit_cpu_seconds": round(fitted, 1),
        "score_cpu_seconds": round(scored, 1),
        "judge_cpu_seconds": round(after, 1),
        "microseconds_a_row": round(1e6 * (scored + after) / args.rows, 1),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(result)
    write_result(args.json, result, ("torch", "scikit-learn", "pyarrow"))


if __name__ == "__main__":
    main()
