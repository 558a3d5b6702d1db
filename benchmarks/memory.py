"""
What a training step holds in memory: a batch as a whole, and in chunks of `contrastive_chunk_size`, for every trainer.

    python benchmarks/memory.py [--json FILE]

Peaks are of tensors alone, over the second of two steps: on a CPU what PyTorch's allocator reports to its profiler, on
a GPU `torch.cuda.max_memory_allocated`. "Of the step" is what comes on top of the weights, their gradients and the
optimizer's moments, which no chunk makes smaller.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from bench.cell import TRAINERS
from bench.output import write_result
from bench.plain import CAPTIONS, make_rows
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback

from hf_robust_clip.data.scratch import build_model, build_processor

#: What the trainers are given in addition to what all of them are.
GIVEN: dict[str, dict[str, Any]] = {
    "clip": {"image_preset": "weak"},
    "cleanclip": {},
    "roclip": {"pool_size": 1000},
    "safeclip": {"unimodal_pool_size": 1000},
}


class Peak(TrainerCallback):
    """Records the peak of the last step, from its first batch to after the optimizer."""

    peak: int
    _recording: Any

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps - 1:
            self._recording = recorded(self)
            self._recording.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps:
            self._recording.__exit__(None, None, None)


@contextmanager
def recorded(found: Peak) -> Iterator[None]:
    """Set `found.peak` to the most bytes allocated within the block, on top of those before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found.peak = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        yield
    held = highest = 0
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    found.peak = highest


def measure(name: str, batch: int, chunk: int | None, model: Any, processor: Any, image_size: int) -> dict[str, Any]:
    """The peak of a step, in bytes, and of what is held between steps."""
    trainer_class = TRAINERS[name]
    found = Peak()
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_class(
            model=copy.deepcopy(model),
            args=trainer_class.args_class(
                output,
                per_device_train_batch_size=batch,
                contrastive_chunk_size=chunk,
                max_steps=2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                **GIVEN[name],
            ),
            train_dataset=make_rows(2 * batch if name != "safeclip" else 3 * batch, image_size),
            processing_class=processor,
            callbacks=[found],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # Gradients are let go between steps; weights and both moments stay.
    weights = sum(value.numel() * value.element_size() for value in trainer.model.parameters())
    return {
        "trainer": name,
        "batch": batch,
        "chunk": chunk,
        "step_bytes": found.peak - weights,
        "peak_bytes": found.peak + 3 * weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--chunk", type=int, default=16, help="rows in a chunk (default: 16)")
    parser.add_argument("--image-size", type=int, default=128, help="side of the images in pixels (default: 128)")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    processor = build_processor(CAPTIONS, image_size=options.image_size)
    model = build_model(
        processor, patch_size=16, vision_width=384, vision_layers=8, text_width=256, text_layers=4, projection_dim=256
    )
    runs = []
    print("| trainer | batch | chunk | peak, MiB | of the step, MiB |\n|---|---|---|---|---|")
    for name in TRAINERS:
        for chunks, chunk in ((1, None), (16, None), (1, options.chunk), (4, options.chunk), (16, options.chunk)):
            run = measure(name, chunks * options.chunk, chunk, model, processor, options.image_size)
            runs.append(run)
            sizes = (f"{run[kind] / 2**20:.0f}" for kind in ("peak_bytes", "step_bytes"))
            print(f"| {name} | {run['batch']} | {chunk or 'whole'} | {' | '.join(sizes)} |", flush=True)

    def ratio(name: str, kind: str, of: tuple[int, int | None], to: tuple[int, int | None]) -> float:
        found = {(run["batch"], run["chunk"]): run[kind] for run in runs if run["trainer"] == name}
        return float(found[of] / found[to])

    one, many = options.chunk, 16 * options.chunk
    ratios = {
        f"{name}_{label}": ratio(name, kind, *pair)
        for name in TRAINERS
        for label, kind, pair in (
            ("chunked_memory_over_one_chunk", "peak_bytes", ((many, one), (one, None))),
            ("chunked_step_over_one_chunk", "step_bytes", ((many, one), (one, None))),
            ("whole_batch_over_one_chunk", "step_bytes", ((many, None), (one, None))),
        )
    }
    worst = max(ratios[f"{name}_chunked_memory_over_one_chunk"] for name in TRAINERS)
    ratios = {"chunked_memory_over_one_chunk": worst, **ratios}
    for name, value in ratios.items():
        print(f"{name:>40}: {value:.2f}")
    result = {
        "ratios": ratios,
        "runs": runs,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": options.image_size,
    }
    write_result(options.json, result, ("torch", "transformers", "accelerate", "datasets"))


if __name__ == "__main__":
    main()
