"""
SafeCLIP's split, its sampler and its state, and a dataset on disk, with millions of rows: memory and time of each, by
rows, a line through them, and what the line says of 400 million.

    python benchmarks/split_at_scale.py [--json FILE]

Similarities are drawn from two Gaussians, with poisons among the lower ones; no model and no image has a part in it.
Every size is measured in a fresh process, and the mixture's fit, which looks at a million similarities at most, apart
from the rest of the split. "Held" is what stays in memory, "peak" the most on top of what was there before, as the
system counts both. What is beyond the largest size measured is extrapolated, not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from bench.apart import measure_apart
from bench.marked import markdown
from bench.output import write_result
from bench.resident import reset_peak, resident
from safetensors.torch import load_file, save_file

from hf_robust_clip.data.rows import IndexedDataset
from hf_robust_clip.data.sampling import RoutedBatchSampler
from hf_robust_clip.defences.base import PairScores
from hf_robust_clip.defences.split import SplitHistory
from hf_robust_clip.mixture import SimilarityMixture

SIZES = (1_000_000, 2_000_000, 4_000_000, 8_000_000)
#: Those of LAION-400M, of which the third size is 1%.
EXTRAPOLATED = 400_000_000
CAPTION_ROWS = 4_000_000
BATCH, BATCHES = 256, 100
PARTS = {
    "fit": "the mixture's fit, on a million at most",
    "first_split": "first split, with a column `poisoned`",
    "next_split": "a later split, without",
    "set_split": "the sampler's split",
    "epoch_start": "an epoch's first batches",
    "state": "state, saved and loaded",
}


def draw_scores(rows: int, seed: int) -> PairScores:
    """Of that many pairs: 5% from the lower of two Gaussians, a tenth of these poisons."""
    generator = np.random.default_rng(seed)
    similarities = generator.standard_normal(rows, dtype=np.float32)
    risky = generator.random(rows, dtype=np.float32)
    similarities *= np.where(risky < 0.05, np.float32(0.05), np.float32(0.06))
    similarities += np.where(risky < 0.05, np.float32(0.12), np.float32(0.28))
    return PairScores(np.clip(similarities, -1, 1, out=similarities), risky < 0.005)


def measured(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of a run, the bytes that it leaves and the most that it takes, and what it returns."""
    before = reset_peak()
    start = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    return {"seconds": seconds, "peak_bytes": peak, "held_bytes": reset_peak() - before}, found


@contextmanager
def fitted(mixture: SimilarityMixture) -> Iterator[None]:
    """Within the block a split takes this mixture, whose fit is the same work for any number of rows."""
    inner = SimilarityMixture.fit
    SimilarityMixture.fit = classmethod(lambda *args, **kwargs: mixture)  # type: ignore[assignment]
    try:
        yield
    finally:
        SimilarityMixture.fit = inner  # type: ignore[method-assign]


def split_anew(history: SplitHistory, epoch: int, scores: PairScores) -> dict[str, float]:
    """What a split takes, in addition to the scores that it is given."""
    return measured(lambda: history.add(epoch, scores, 0.9, 0.01, 0.85, seed=0))[0]


def split_of(rows: int) -> dict[str, Any]:
    """The split of so many rows, with known poisons and without; an epoch's start; the state in a checkpoint."""
    # What the first use of each library takes for itself.
    SplitHistory(10_000).add(0, draw_scores(10_000, 0), 0.9, 0.01, 0.85, seed=0)
    history = SplitHistory(rows)
    found: dict[str, Any] = {"rows": rows}
    scores = draw_scores(rows, seed=0)
    found["fit"], mixture = measured(lambda: SimilarityMixture.fit(scores.similarities, seed=0))
    with fitted(mixture):
        found["first_split"] = split_anew(history, 0, scores)
        scores = scores._replace(poisoned=None)
        found["next_split"] = split_anew(history, 1, scores)
    sampler = RoutedBatchSampler(rows, BATCH)
    sampler.set_epoch(1)
    found["set_split"], _ = measured(lambda: sampler.set_split(history.safe))

    def first_batches() -> Any:
        iterator = iter(sampler)
        return list(itertools.islice(iterator, BATCHES)), iterator

    found["epoch_start"], _ = measured(first_batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"

        def save_and_load() -> None:
            save_file(history.state_dict(), path)
            SplitHistory(rows).load_state_dict(load_file(path))

        found["state"], _ = measured(save_and_load)
        found["checkpoint_bytes"] = path.stat().st_size
    return found


def write_captions(path: Path, rows: int) -> None:
    """An Arrow file of captions of about 50 letters."""
    subjects, places = ("a dog", "two children", "an old man", "the team"), ("on a beach", "in the wet snow")
    named = itertools.product(range(500), subjects, places)
    base = [f"{subject} {place} in picture {number:05d} of the album" for number, subject, place in named]
    captions = pa.array(base)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("caption", pa.string())])) as writer:
        for _ in range(-(-rows // len(base))):
            writer.write_batch(pa.record_batch([captions], names=["caption"]))


def captions_of(path: str) -> dict[str, Any]:
    """What opening an Arrow file, and reading batches at random, takes."""
    before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
    start = time.perf_counter()
    dataset = IndexedDataset(datasets.Dataset.from_file(path), "image", "caption")
    opened = time.perf_counter() - start
    order = np.random.default_rng(0).integers(0, len(dataset), (BATCHES, BATCH))
    start = time.perf_counter()
    for batch in order.tolist():
        dataset.__getitems__(batch)
    seconds = time.perf_counter() - start
    return {
        "rows": len(dataset),
        "file_bytes": Path(path).stat().st_size,
        "own_bytes": resident("RssAnon") - before["RssAnon"],
        "mapped_bytes": resident("RssFile") - before["RssFile"],
        "open_seconds": opened,
        "seconds_per_row": seconds / order.size,
        "rows_read": order.size,
    }


def line_through(rows: list[int], values: list[float]) -> dict[str, float]:
    """The least-squares line, how far the worst point is off it, as a share of that point, and its end."""
    slope, intercept = np.polyfit(rows, values, 1)
    fitted = slope * np.array(rows) + intercept
    worst = float(np.max(np.abs(fitted - values) / np.maximum(np.abs(values), 1e-12)))
    return {
        "per_row": float(slope),
        "intercept": float(intercept),
        "worst_residual": worst,
        "extrapolated": float(slope * EXTRAPOLATED + intercept),
    }


def fit_lines(points: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Lines through the time and the memory of each part, and through the size of its state."""
    rows = [point["rows"] for point in points]
    lines = {
        part: {
            kind: line_through(rows, [point[part][kind] for point in points])
            for kind in ("seconds", "peak_bytes", "held_bytes")
        }
        for part in PARTS
    }
    lines["checkpoint"] = {"bytes": line_through(rows, [point["checkpoint_bytes"] for point in points])}
    return lines


def table(result: dict[str, Any]) -> str:
    """The parts as Markdown: the largest size measured, the lines, and where they lead."""
    last, lines = result["points"][-1], result["lines"]
    heads = ("", f"{last['rows']:,} rows, peak MB", "seconds", "bytes a row", "worst point off the line")
    heads += (f"{EXTRAPOLATED:,} rows, extrapolated, GB", "seconds")
    rows = []
    for part, title in PARTS.items():
        peak, seconds = lines[part]["peak_bytes"], lines[part]["seconds"]
        row = (title, f"{last[part]['peak_bytes'] / 1e6:.0f}", f"{last[part]['seconds']:.1f}")
        row += (f"{peak['per_row']:.1f}", f"{peak['worst_residual']:.0%}")
        # The fit takes as long for any number of rows.
        ended = "" if part == "fit" else f"{seconds['extrapolated']:.0f}"
        rows.append((*row, f"{peak['extrapolated'] / 1e9:.1f}", ended))
    size = lines["checkpoint"]["bytes"]
    row = ("of it in a checkpoint", f"{last['checkpoint_bytes'] / 1e6:.0f}", "", f"{size['per_row']:.2f}")
    rows.append((*row, f"{size['worst_residual']:.0%}", f"{size['extrapolated'] / 1e9:.2f}", ""))
    return markdown(heads, rows)


def told_of_captions(captions: dict[str, Any]) -> str:
    """The dataset's figures as text."""
    own, mapped, size = (captions[f"{kind}_bytes"] / 1e6 for kind in ("own", "mapped", "file"))
    return (
        f"{captions['rows']:,} captions, {size:.0f} MB on disk, {captions['rows_read']:,} of them read at random: "
        f"{own:.1f} MB of the process's own, {mapped:.0f} MB mapped from files; "
        f"{captions['seconds_per_row'] * 1e6:.1f} us a row"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="sizes (default: 1, 2, 4 and 8 million)")
    parser.add_argument("--captions", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker is not None:
        found = captions_of(options.captions) if options.captions else split_of(options.rows[0])
        options.worker.write_text(json.dumps(found))
        return
    points = []
    for rows in options.rows:
        points.append(measure_apart(__file__, "--rows", str(rows)))
        print(f"{rows:,} rows: {points[-1]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.arrow"
        write_captions(path, CAPTION_ROWS)
        captions = measure_apart(__file__, "--captions", str(path))
    result = {
        "ratios": {},
        "extrapolated_rows": EXTRAPOLATED,
        "lines": fit_lines(points),
        "points": points,
        "captions": captions,
        "device": "cpu",
    }
    print(table(result))
    print(told_of_captions(captions))
    write_result(options.json, result, ("torch", "datasets", "pyarrow", "numpy", "scikit-learn"))


if __name__ == "__main__":
    main()
