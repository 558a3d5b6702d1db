"""
Whether a long training stays as it began: memory, open files and the time of a step over many steps of a tiny model,
for every trainer, each in a process of its own, with a worker that is started anew each epoch and checkpoints on the
way.

    python benchmarks/endurance.py [--steps N] [--trainer NAME ...] [--json FILE]

Memory is what the system counts as resident, its median over the last tenth of the steps against that over the sixth.
Open files are counted between epochs, before the last against after the first. The time of a step is its median over
the last tenth against that over the first, by the clock and by the processor time of the process, which what else the
machine does moves less. SafeCLIP splits before every epoch and RoCLIP matches in all but the first, so that early and
late steps are of one kind. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import transformers
from bench.apart import measure_apart
from bench.cell import TRAINERS
from bench.output import write_result
from bench.resident import resident
from transformers import PrinterCallback, TrainerCallback

from hf_robust_clip.data.digits import digit_processor, load_digit_pairs
from hf_robust_clip.data.scratch import build_model

BATCH, ROWS = 8, 800
#: What the trainers are given in addition to what all of them are.
GIVEN: dict[str, dict[str, Any]] = {
    "clip": {"image_preset": "weak"},
    "cleanclip": {},
    "roclip": {"pool_size": 200, "matching_start_epoch": 1, "match_every_n_epochs": 1},
    "safeclip": {
        "unimodal_pool_size": 200,
        "warmup_unimodal_epochs": 0,
        "warmup_cross_epochs": 0,
        "safe_growth": 0.0,
    },
}
#: How often memory is looked at, and a checkpoint written, in a training.
LOOKS, CHECKPOINTS = 200, 20


class Follow(TrainerCallback):
    """Notes memory, open files and times."""

    def __init__(self, steps: int) -> None:
        self._every = max(1, steps // LOOKS)
        self._begin = (0.0, 0.0)
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.memory: list[int] = []
        self.files: list[int] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.files.append(len(os.listdir("/proc/self/fd")))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin[0])
        self.processor_seconds.append(time.process_time() - self._begin[1])
        if state.global_step % self._every == 0:
            self.memory.append(resident())


def measure(name: str, steps: int) -> dict[str, Any]:
    """What a training of so many steps came to."""
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    trainer_class = TRAINERS[name]
    processor, found = digit_processor(), Follow(steps)
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_class(
            model=build_model(
                processor, vision_width=32, vision_layers=2, text_width=32, text_layers=1, projection_dim=16
            ),
            args=trainer_class.args_class(
                output,
                per_device_train_batch_size=BATCH,
                max_steps=steps,
                dataloader_num_workers=1,
                save_strategy="steps",
                save_steps=max(1, steps // CHECKPOINTS),
                save_total_limit=1,
                logging_steps=steps,  # the Trainer keeps each log
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **GIVEN[name],
            ),
            train_dataset=load_digit_pairs("train", renderings=1).select(range(ROWS)),
            processing_class=processor,
            callbacks=[found],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "trainer": name,
        "steps": steps,
        "memory_bytes": tenths(found.memory),
        "open_files": [found.files[1], found.files[-1]],
        "step_seconds": tenths(found.seconds),
        "step_processor_seconds": tenths(found.processor_seconds),
    }


def tenths(values: list[Any]) -> list[float]:
    """The median of each tenth."""
    size = len(values) / 10
    return [statistics.median(values[int(i * size) : int((i + 1) * size)]) for i in range(10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="of each trainer (default: %(default)s)")
    parser.add_argument("--trainer", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="default: all")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 3 * ROWS // BATCH:
        parser.error(f"--steps must be at least {3 * ROWS // BATCH}, three epochs, not {options.steps}")
    if options.worker is not None:
        options.worker.write_text(json.dumps(measure(options.trainer[0], options.steps)))
        return
    runs, ratios = [], {}
    print("| trainer | memory at the half, MiB | at the end | open files | step, first tenth, ms | last tenth |")
    print("|---|---|---|---|---|---|")
    for name in options.trainer:
        run = measure_apart(__file__, "--trainer", name, "--steps", str(options.steps))
        runs.append(run)
        memory, files, seconds = run["memory_bytes"], run["open_files"], run["step_seconds"]
        ratios[f"{name}_memory_end_over_half"] = memory[9] / memory[5]
        ratios[f"{name}_open_files_end_over_begin"] = files[1] / files[0]
        ratios[f"{name}_step_last_over_first_tenth"] = seconds[9] / seconds[0]
        processor = run["step_processor_seconds"]
        ratios[f"{name}_processor_time_last_over_first_tenth"] = processor[9] / processor[0]
        cells = (f"{memory[5] / 2**20:.1f}", f"{memory[9] / 2**20:.1f}", f"{files[0]} to {files[1]}")
        print(f"| {name} | {' | '.join(cells)} | {seconds[0] * 1e3:.1f} | {seconds[9] * 1e3:.1f} |", flush=True)
    for name, value in ratios.items():
        print(f"{name:>50}: {value:.3f}")
    write_result(options.json, {"ratios": ratios, "runs": runs}, ("torch", "transformers", "accelerate", "datasets"))


if __name__ == "__main__":
    main()
