"""
SafeCLIP's scoring pass: pairs a second against a bare encoding of the same pairs, with the loader and without it, and
its memory by rows.

    python benchmarks/scoring_pass.py [--json FILE]

The bare encoding runs the same batches through the same model in evaluation mode and takes their cosines, and does
nothing else. Without the loader it has its batches in memory from before. Contenders take turns; rates are medians
over rounds. Memory is the peak of the process in the pass on top of what was there before, over rows that are made up,
in batches that no image is read for, with a model too small to matter, each size in a fresh process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from bench.apart import measure_apart
from bench.marked import markdown
from bench.output import write_result
from bench.phases import phase_trainer, small_clip
from bench.plain import CAPTIONS, make_rows
from bench.resident import reset_peak, resident
from split_at_scale import line_through
from torch.utils.data import DataLoader

from hf_robust_clip.augment.images import to_float
from hf_robust_clip.columns import ROW_INDEX
from hf_robust_clip.data.collator import ORIGINAL, CLIPDataCollator
from hf_robust_clip.data.rows import IndexedDataset
from hf_robust_clip.data.scratch import build_model, build_processor

IMAGE_SIZE = 64
BATCH = 32
ROWS = (64, 256)
WORKERS = (0, 2)
MEMORY_ROWS = (100_000, 300_000, 1_000_000)
MEMORY_BATCH = 512


class MadeUpRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that are all one, of any number."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.row = {"image": np.zeros((4, 4, 3), dtype=np.uint8), "caption": CAPTIONS[0]}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.row


class MadeUpBatches(CLIPDataCollator):
    """Reads no image and no caption: one of each, as often as there are rows."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        first = super().__call__(rows[:1])
        batch = {name: value.expand(len(rows), *value.shape[1:]) for name, value in first.items()}
        return {**batch, ROW_INDEX: torch.tensor([row[ROW_INDEX] for row in rows])}


def scoring_trainer(output: str, model: Any, processor: Any, rows: Any, batch: int, workers: int = 0) -> Any:
    """Of SafeCLIP, to score with."""
    return phase_trainer(
        *("safeclip_unimodal", output, model, processor, rows, 1),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        dataloader_num_workers=workers,
        use_cpu=not torch.cuda.is_available(),
    )


def encode(trainer: Any, batches: Iterable[dict[str, Any]]) -> torch.Tensor:
    """The cosines of pairs `(N,)`, as plainly as can be."""
    model, device = trainer.model.eval(), trainer.args.device
    found = []
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != ROW_INDEX}
            inputs["pixel_values"] = trainer.normalization(to_float(inputs["pixel_values"]))
            outputs = model(**inputs)
            found.append(F.cosine_similarity(outputs.image_embeds, outputs.text_embeds))
        return torch.cat(found).cpu()


def rates(rows: int, workers: int, rounds: int, output: str) -> dict[str, Any]:
    """Pairs a second of each contender in every round."""
    model, processor = small_clip(IMAGE_SIZE)
    data = make_rows(rows, IMAGE_SIZE)
    trainer = scoring_trainer(output, model, processor, data, BATCH, workers)
    indexed: Any = IndexedDataset(data, "image", "caption")
    loader = DataLoader(indexed, BATCH, collate_fn=trainer.data_collator.with_views((ORIGINAL,)), num_workers=workers)
    kept = [copy.deepcopy(batch) for batch in loader]
    contenders: dict[str, Callable[[], Any]] = {
        "scoring": lambda: trainer.score_pairs(epoch=0),
        "encoding_with_loader": lambda: encode(trainer, loader),
        "encoding": lambda: encode(trainer, kept),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in sorted(contenders, reverse=bool(number % 2)):
            start = time.perf_counter()
            contenders[name]()
            if number:  # the first round warms up
                found[name].append(rows / (time.perf_counter() - start))
    return {"rows": rows, "workers": workers, "pairs_per_second": found}


def memory_of(rows: int, output: str) -> dict[str, Any]:
    """The peak of the pass over so many rows, on top of what was there before."""
    processor = build_processor(CAPTIONS, image_size=4)
    sizes: dict[str, int] = {"vision_width": 32, "vision_layers": 1, "text_width": 32, "text_layers": 1}
    model = build_model(processor, patch_size=4, projection_dim=16, **sizes)
    for length in (2 * MEMORY_BATCH, rows):
        trainer = scoring_trainer(output, model, processor, MadeUpRows(length), MEMORY_BATCH)
        collator = trainer.data_collator
        trainer.data_collator = MadeUpBatches(processor, views=collator.views, max_length=collator.max_length)
        before = reset_peak()
        start = time.perf_counter()
        scores = trainer.score_pairs(epoch=0)
        found = {
            "rows": length,
            "peak_bytes": resident("VmHWM") - before,
            "result_bytes": scores.similarities.nbytes,
            "seconds": time.perf_counter() - start,
        }
    return found


def table(result: dict[str, Any]) -> str:
    """Rates and memory as Markdown, two tables."""
    heads = ("rows", "workers", "scoring, pairs a second", "bare encoding with loader", "bare encoding without")
    names = ("scoring", "encoding_with_loader", "encoding")
    rows = [
        (
            str(run["rows"]),
            str(run["workers"]),
            *(f"{statistics.median(run['pairs_per_second'][name]):.0f}" for name in names),
        )
        for run in result["runs"]
    ]
    sizes = [
        (f"{point['rows']:,}", f"{point['peak_bytes'] / 1e6:.0f}", f"{point['seconds']:.1f}")
        for point in result["memory"]
    ]
    memory = markdown(("rows", "peak of the pass, MB", "seconds"), sizes)
    return markdown(heads, rows) + "\n" + memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured (default: 3)")
    parser.add_argument("--memory-rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as output:
        if options.worker is not None:
            options.worker.write_text(json.dumps(memory_of(options.memory_rows, output)))
            return
        runs = [rates(rows, workers, options.rounds, output) for rows in ROWS for workers in WORKERS]
    memory = [measure_apart(__file__, "--memory-rows", str(rows)) for rows in MEMORY_ROWS]
    ratios = {
        f"scoring_over_{name}_{run['rows']}_rows_{run['workers']}_workers": statistics.median(
            below / scoring
            for scoring, below in zip(run["pairs_per_second"]["scoring"], run["pairs_per_second"][name], strict=True)
        )
        for run in runs
        for name in ("encoding_with_loader", "encoding")
    }
    line = line_through([point["rows"] for point in memory], [point["peak_bytes"] for point in memory])
    result = {
        "ratios": ratios,
        "peak_bytes_line": line,
        "memory": memory,
        "runs": runs,
        "batch": BATCH,
        "memory_batch": MEMORY_BATCH,
        "image_size": IMAGE_SIZE,
    }
    print(table(result))
    print(f"{line['per_row']:.1f} bytes a row; the worst point is {line['worst_residual']:.0%} off the line")
    for name, ratio in ratios.items():
        print(f"{name:>50}: {ratio:.2f} times the time")
    write_result(options.json, result, ("torch", "transformers", "datasets", "numpy"))


if __name__ == "__main__":
    main()
