"""
This package beside what one would take in its place: a bare PyTorch loop, the stock `Trainer`, and
sentence-transformers, on the same model, rows, batch and threads.

    python benchmarks/peers.py [--json FILE]

Each round runs every contender in turn, in a rotating order. A step: an epoch over small JPEGs, without workers. From
JPEG to update: an epoch over photos of 500 x 375 pixels, with workers. Then each trains one step in a process of its
own, which gives its peak memory and the CPU time from the start of Python to the end of that step, imports included.
CPU times count the workers. sentence-transformers, which has a fixed temperature, is measured where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MISSING = "sentence-transformers is not installed and is left out: pip install 'sentence-transformers==6.2.*'"


def bare_loop(folder: str, rows: Any, batch: int, workers: int, output: str) -> Callable[[], Any]:
    from bench.plain import bare_loop
    from transformers import CLIPModel, CLIPProcessor

    return bare_loop(CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder), rows, batch, workers)


def stock(folder: str, rows: Any, batch: int, workers: int, output: str) -> Callable[[], Any]:
    from bench.plain import quiet_arguments, stock_trainer
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    return silent(stock_trainer(model, processor, rows, quiet_arguments(output, batch, workers)))


def sentence_transformers(folder: str, rows: Any, batch: int, workers: int, output: str) -> Callable[[], Any]:
    from bench.plain import quiet_arguments
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesSymmetricRankingLoss

    model = SentenceTransformer(folder, device="cpu")
    args = SentenceTransformerTrainingArguments(**quiet_arguments(output, batch, workers), dataloader_drop_last=True)
    return silent(
        SentenceTransformerTrainer(model, args, train_dataset=rows, loss=MultipleNegativesSymmetricRankingLoss(model))
    )


def ours(folder: str, rows: Any, batch: int, workers: int, output: str) -> Callable[[], Any]:
    from bench.plain import quiet_arguments
    from transformers import CLIPModel, CLIPProcessor

    from hf_robust_clip import CLIPTrainer, CLIPTrainingArguments

    args = CLIPTrainingArguments(**quiet_arguments(output, batch, workers))
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    return silent(CLIPTrainer(model, args, train_dataset=rows, processing_class=processor))


#: Each makes an epoch over the rows, of a model's folder, with so many workers.
CONTENDERS: dict[str, Callable[[str, Any, int, int, str], Callable[[], Any]]] = {
    "bare loop": bare_loop,
    "stock Trainer": stock,
    "sentence-transformers": sentence_transformers,
    "hf_robust_clip": ours,
}


def silent(trainer: Any) -> Callable[[], Any]:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    train: Callable[[], Any] = trainer.train
    return train


def present() -> list[str]:
    """The contenders that are installed."""
    if importlib.util.find_spec("sentence_transformers") is not None:
        return list(CONTENDERS)
    print(MISSING)
    return [name for name in CONTENDERS if name != "sentence-transformers"]


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of CPU that each takes in each round, after a run to warm up."""
    names = list(runs)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            clock, cpu = time.perf_counter(), cpu_seconds()
            runs[name]()
            if number:
                taken[name].append((time.perf_counter() - clock, cpu_seconds() - cpu))
    return taken


def over(taken: dict[str, list[tuple[float, float]]], name: str, kind: int) -> dict[str, float]:
    """The median over rounds of what one takes over each of the others; `kind` 0: by the clock, 1: of CPU."""
    return {
        other: statistics.median(a[kind] / b[kind] for a, b in zip(taken[name], rounds, strict=True))
        for other, rounds in taken.items()
        if other != name
    }


def alone(name: str, folder: str, rows: str, batch: int, output: Path) -> None:
    """One step in this process, and what it took."""
    import datasets
    import torch
    from bench.resident import resident

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        CONTENDERS[name](folder, datasets.load_from_disk(rows), batch, 0, made)()
    result = {"cpu_seconds": cpu_seconds(), "peak_mib": resident("VmHWM") / 2**20}
    output.write_text(json.dumps(result))


def photos(number: int) -> Any:
    from bench.plain import dataset_of
    from data_path import jpeg

    return dataset_of([jpeg(row) for row in range(number)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--rounds", type=int, default=5, help="rounds measured (default: 5)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each contender in a round (default: 4)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (default: 32)")
    parser.add_argument("--workers", type=int, default=2, help="loading processes of the photos (default: 2)")
    parser.add_argument("--alone", nargs=3, metavar=("NAME", "MODEL", "ROWS"), help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(*options.alone, options.batch, options.worker)
        return

    import datasets
    import torch
    import transformers
    from bench.apart import measure_apart
    from bench.output import write_result
    from bench.phases import large_clip
    from bench.plain import CAPTIONS, make_rows

    from hf_robust_clip.data.scratch import build_model, build_processor

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    names, pairs = present(), options.batch * options.steps
    with tempfile.TemporaryDirectory() as made:
        small, large, rows, output = (str(Path(made) / name) for name in ("small", "large", "rows", "output"))
        # The smaller one at 224 pixels, so that loading weighs.
        processor = build_processor(CAPTIONS, image_size=224)
        layers = {"vision_width": 256, "vision_layers": 4, "text_width": 128, "text_layers": 2}
        quick = build_model(processor, patch_size=32, projection_dim=128, **layers), processor
        for path, (model, own) in ((large, large_clip()), (small, quick)):
            model.save_pretrained(path)
            own.save_pretrained(path)
        tiny = make_rows(pairs, 64)
        tiny.select(range(options.batch)).save_to_disk(rows)

        def epochs(folder: str, rows: Any, workers: int) -> dict[str, list[tuple[float, float]]]:
            runs = {name: CONTENDERS[name](folder, rows, options.batch, workers, output) for name in names}
            return in_turns(runs, options.rounds)

        step, update = epochs(large, tiny, 0), epochs(small, photos(pairs), options.workers)
        words = ("--batch", str(options.batch), "--alone")
        first = {name: [measure_apart(__file__, *words, name, large, rows) for _ in range(3)] for name in names}
    rows_of_table = {
        name: {
            "step_cpu_milliseconds": 1e3 * statistics.median(cpu for _, cpu in step[name]) / options.steps,
            "pairs_per_second": pairs / statistics.median(clock for clock, _ in update[name]),
            "pair_cpu_milliseconds": 1e3 * statistics.median(cpu for _, cpu in update[name]) / pairs,
            "peak_mib": statistics.median(one["peak_mib"] for one in first[name]),
            "first_step_cpu_seconds": statistics.median(one["cpu_seconds"] for one in first[name]),
        }
        for name in names
    }
    print("| | " + " | ".join(next(iter(rows_of_table.values()))) + " |\n|---|" + 5 * "---|")
    for name, row in rows_of_table.items():
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")
    ratios = {
        "step_cpu": over(step, "hf_robust_clip", 1),
        "update_clock": over(update, "hf_robust_clip", 0),
        "update_cpu": over(update, "hf_robust_clip", 1),
    }
    for name, others in ratios.items():
        print(f"{name} over that of: " + ", ".join(f"{other} {value:.3f}" for other, value in others.items()))
    result = {
        "contenders": rows_of_table,
        "ratios": ratios,
        "batch": options.batch,
        "workers": options.workers,
        "rounds": options.rounds,
    }
    write_result(options.json, result, ("torch", "transformers", "accelerate", "sentence-transformers"))


if __name__ == "__main__":
    main()
