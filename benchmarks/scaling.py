"""
Steps on several processes, each with a batch of the same size: how long every kind of step and SafeCLIP's scoring pass
take, what the processes send each other, counted and computed from the shapes, and what each holds in memory.

    python benchmarks/scaling.py [--json FILE]

On a CPU 1, 2 and 4 processes of one thread (gloo), on GPUs one process a GPU (nccl). Where there are fewer cores than
processes, that point is a check of the bytes, and says nothing of speed. Times are medians over steps; the machine's
own rates, of matrix products, copies and all-reduces, are measured by all processes at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import gather_object
from bench.apart import measure_apart
from bench.machine import copy_bandwidth, matmul_rate, run_seconds, synchronize
from bench.marked import markdown
from bench.output import write_result
from bench.phases import PHASES, phase_trainer, small_clip
from bench.plain import CAPTIONS, make_rows
from bench.resident import reset_peak, resident
from bench.traffic import Counter, contrastive_traffic, counting, gradient_traffic
from transformers import TrainerCallback

IMAGE_SIZE = 64
POOL_SIZE = 4096
SCORING = "safeclip_scoring"


class Steps(TrainerCallback):
    """When each step ends, and what was counted in it."""

    def __init__(self, trainer: Any, counter: Counter | None) -> None:
        self.trainer, self.counter = trainer, counter
        self.ends: list[float] = []
        self.counts: list[dict[str, int]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        wrapped = self.trainer.model_wrapped
        if self.counter is not None and isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
            count = self.counter.averaging_hook
            # DDP reads annotations, which a method's are in text.
            wrapped.register_comm_hook(None, lambda group, bucket: count(group, bucket))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.counter is not None:
            self.counter.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.trainer.args.device)
        self.ends.append(time.perf_counter())
        if self.counter is not None:
            self.counts.append(self.counter.bytes())

    @property
    def seconds(self) -> list[float]:
        """Of each step after the first two, with the loading of its batch."""
        ends = self.ends[1:]
        return [end - start for start, end in itertools.pairwise(ends)]


class Worker:
    """One process: every phase in turn, in step with the other processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.steps, self.batch = options.steps, options.batch
        self.model, self.processor = small_clip(IMAGE_SIZE)
        self.rows = make_rows(self.batch * self.world * (self.steps + 3), IMAGE_SIZE)

    def trainer(self, name: str, output: str, steps: int) -> Any:
        """Of a phase, for so many steps."""
        return phase_trainer(
            *(name, output, self.model, self.processor, self.rows, POOL_SIZE),
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=self.batch,
            max_steps=steps,
            use_cpu=not torch.cuda.is_available(),
        )

    def train(self, name: str, steps: int, counter: Counter | None = None) -> tuple[Steps, Any]:
        """Train in a phase."""
        with tempfile.TemporaryDirectory() as output:
            trainer = self.trainer(name, output, steps)
            followed = Steps(trainer, counter)
            trainer.add_callback(followed)
            trainer.train()
        return followed, trainer

    def measure(self, name: str) -> dict[str, Any]:
        """Seconds of the steps of a phase, its peak memory, and the bytes of a step."""
        reset_peak()
        followed, trainer = self.train(name, self.steps + 2)
        peak = resident("VmHWM")
        counter = Counter()
        with counting(counter):
            counts = self.train(name, 1, counter)[0].counts
        parameters = sum(value.numel() for value in trainer.model.parameters())
        dim = trainer.model.config.projection_dim
        own = contrastive_traffic(name, self.batch, dim, self.world)
        computed = {
            "gathered": own.gathered,
            "reduced": own.reduced,
            "of_ddp": gradient_traffic(parameters, self.world).reduced,
        }
        return {
            "seconds": followed.seconds,
            "peak_resident_bytes": peak,
            "counted_bytes": counts[-1],
            "computed_bytes": computed,
        }

    def score(self) -> dict[str, Any]:
        """The same of the scoring pass, over as many rows of each process as its steps take; its bytes are counted."""
        with tempfile.TemporaryDirectory() as output:
            trainer = self.trainer("safeclip_unimodal", output, 1)
            trainer.score_pairs(epoch=0)  # warms up
            reset_peak()
            counter = Counter()
            with counting(counter):
                seconds = [run_seconds(lambda: trainer.score_pairs(epoch=0), trainer.args.device) for _ in range(3)]
            rows = len(self.rows)
        return {
            "seconds": [one * self.batch * self.world / rows for one in seconds],
            "peak_resident_bytes": resident("VmHWM"),
            "counted_bytes": {"gathered": counter.gathered / 3, "reduced": counter.reduced / 3, "of_ddp": 0},
            "rows": rows,
        }

    def rates(self) -> dict[str, float]:
        """What the machine reaches while all processes ask for it."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = {"matmul_flops": matmul_rate(device), "copy_bandwidth": copy_bandwidth(device)}
        if self.world > 1:
            tensor = torch.ones(2**23, device=device)
            seconds = [run_seconds(lambda: dist.all_reduce(tensor), device) for _ in range(4)][1:]
            found["all_reduce_bandwidth"] = tensor.nbytes / statistics.median(seconds)
        return found

    def run(self) -> dict[str, Any]:
        """Everything; memory is that of the largest process, times and rates are those of the first."""
        phases, rates = {}, []
        for name in PHASES:
            phases[name] = self.measure(name)
            rates.append(self.rates())  # each time, since other work on the machine comes and goes
        phases[SCORING] = self.score()
        peaks = {name: found["peak_resident_bytes"] for name, found in phases.items()}
        all_peaks = gather_object([peaks]) if self.world > 1 else [peaks]
        for name, found in phases.items():
            found["peak_resident_bytes"] = max(one[name] for one in all_peaks)
        tokens = self.processor.tokenizer(CAPTIONS, padding=True)["input_ids"]
        return {
            "processes": self.world,
            "more_processes_than_cores": self.world > len(os.sched_getaffinity(0)) and not torch.cuda.is_available(),
            "rates": {kind: statistics.median(one[kind] for one in rates) for kind in rates[0]},
            "phases": phases,
            "parameters": sum(value.numel() for value in self.model.parameters()),
            "text_tokens": len(tokens[0]),
        }


def exact(found: dict[str, Any]) -> bool:
    """Whether the bytes counted are the bytes computed."""
    return bool(found["counted_bytes"] == found["computed_bytes"])


def table(result: dict[str, Any]) -> str:
    """The points as Markdown: a row for each kind of step."""
    points = result["points"]
    names = [f"{point['processes']} process{'es' * (point['processes'] > 1)}" for point in points]
    heads = ("step", *(f"{name}, ms" for name in names), *(f"{name}, KiB gathered and summed" for name in names[1:]))
    heads += tuple(f"{name}, MiB resident in each" for name in names)
    rows = []
    for name in (*PHASES, SCORING):
        found = [point["phases"][name] for point in points]
        times = [f"{statistics.median(one['seconds']) * 1e3:.0f}" for one in found]
        sums = [one["counted_bytes"]["gathered"] + one["counted_bytes"]["reduced"] for one in found[1:]]
        title = PHASES[name].title if name in PHASES else "SafeCLIP, scoring, a batch"
        held = (f"{one['peak_resident_bytes'] / 2**20:.0f}" for one in found)
        rows.append((title, *times, *(f"{value / 2**10:.1f}" for value in sums), *held))
    return markdown(heads, rows)


def run_points(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One point for each number of processes, each in processes of its own."""
    points = []
    for processes in options.processes:
        words = ("--steps", str(options.steps), "--batch", str(options.batch))
        point = measure_apart(__file__, *words, processes=processes)
        agree = all(exact(point["phases"][name]) for name in PHASES)
        print(f"{processes} processes: bytes {'as computed' if agree else 'NOT as computed'}", flush=True)
        if point["more_processes_than_cores"]:
            print("  more processes than cores: a check of the bytes; the times say nothing of speed")
        points.append(point)
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--steps", type=int, default=5, help="steps measured in each phase (default: 5)")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a process in a step (default: 8)")
    gpus = torch.cuda.device_count()
    powers = [2**power for power in range(max(gpus, 1).bit_length())] if gpus else [1, 2, 4]
    parser.add_argument(
        "--processes", type=int, nargs="+", default=powers, help="numbers of processes, the first is 1"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.worker is not None:
        result = Worker(options).run()
        if int(os.environ.get("RANK", "0")) == 0:
            options.worker.write_text(json.dumps(result))
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    points = run_points(options)
    medians = [
        {name: statistics.median(found["seconds"]) for name, found in point["phases"].items()} for point in points
    ]
    # Of n processes on fewer cores: nothing about speed, so no ratio.
    ratios = {
        f"{name}_{point['processes']}_processes_over_1": times[name] / medians[0][name]
        for point, times in zip(points[1:], medians[1:], strict=True)
        if not point["more_processes_than_cores"]
        for name in times
    }
    result = {
        "ratios": ratios,
        "bytes_are_as_computed": all(exact(point["phases"][name]) for point in points for name in PHASES),
        "points": points,
        "batch": options.batch,
        "image_size": IMAGE_SIZE,
        "pool_size": POOL_SIZE,
        "cores": len(os.sched_getaffinity(0)),
        "threads_of_a_process": 1,
    }
    print(table(result))
    for name, ratio in ratios.items():
        print(f"{name:>45}: {ratio:.2f}")
    write_result(options.json, result, ("torch", "transformers", "accelerate", "datasets"))


if __name__ == "__main__":
    main()
