"""
What the milliseconds of a training step are for, in every kind of step of every trainer, and how far the step is from
the least that it could take on this machine.

    python benchmarks/profile_step.py [--json FILE]

Timers sit around the real calls of the real trainers. Where one is called within another, the time is the inner one's
alone, so that the parts add up to the step. Kinds of steps take turns, and between them steps without timers: what the
timers cost is in `ratios`. On a GPU every timer waits for the device.

The floor is FLOP counted over the same step, at the rate of a large float32 matrix product measured in the same run,
and the bytes of clipping and optimizer at the rate of a large copy. Nothing else that a step does is in the floor: the
data, activations, normalization, softmax, and products too small to reach that rate. What share of its operators' time
products take, forward and backward, is read from PyTorch's profiler in steps of its own.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from bench.flops import counted_flops
from bench.machine import copy_bandwidth, matmul_rate, synchronize
from bench.marked import markdown
from bench.output import write_result
from bench.phases import PHASES, large_clip, phase_trainer
from bench.plain import make_rows
from step_cost import POOL_SIZE
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_robust_clip.pool import FeaturePool

PARTS = {
    "data": "loading and collating",
    "transfer": "transfer, floats",
    "augmentation": "augmentation",
    "image_forward": "image tower",
    "text_forward": "text tower",
    "model_rest": "rest of the model",
    "loss": "loss",
    "look_up": "look-up",
    "enqueue": "pools take in",
    "backward": "backward",
    "clipping": "clipping",
    "optimizer": "optimizer",
    "logging": "logging, callbacks",
    "rest": "rest",
}
#: Bytes of a parameter that AdamW (weight, gradient and two moments read, all but the gradient written) and clipping
#: (gradient read for its norm, then read and written) move.
OPTIMIZER_BYTES = (4 + 3) * 4
CLIPPING_BYTES = 3 * 4
#: Operators that are products.
PRODUCTS = re.compile(r"mm$|convolution|scaled_dot_product")


class Clock:
    """Seconds of each part since the last lap; of nested parts, the innermost has the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running = False
        self.lap()

    def lap(self) -> dict[str, float]:
        """Those so far; count from nothing."""
        synchronize(self.device)
        self._since = time.perf_counter()
        found = dict(getattr(self, "_seconds", {}))
        self._seconds: dict[str, float] = defaultdict(float)
        self._within = ["rest"]
        return found

    def _turn(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self._seconds[self._within[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        """What comes now is of that part."""
        if self.running:
            self._turn()
            self._within.append(part)

    def leave(self) -> None:
        """It was."""
        if self.running:
            self._turn()
            self._within.pop()

    @contextmanager
    def section(self, part: str) -> Iterator[None]:
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def end_step(self) -> dict[str, float]:
        """The parts of the step that ends now."""
        self._turn()
        return self.lap()

    def around(self, owner: Any, name: str, part: str) -> None:
        """Let an object's method count for a part."""
        inner = getattr(owner, name)

        @functools.wraps(inner)  # schedulers leave marks on an optimizer's step
        def timed(_: Any, *args: Any, **kwargs: Any) -> Any:
            with self.section(part):
                return inner(*args, **kwargs)

        timed.timed = part  # type: ignore[attr-defined]
        setattr(owner, name, types.MethodType(timed, owner))

    def around_module(self, module: torch.nn.Module, part: str) -> None:
        """Let a module's forward pass count for a part."""
        module.register_forward_pre_hook(lambda *_: self.enter(part))
        module.register_forward_hook(lambda *_: self.leave())


class Timed(TrainerCallback):
    """A trainer of a phase with timers on; the parts of each step, and the steps without timers."""

    def __init__(self, trainer: Any, clock: Clock) -> None:
        self.trainer, self.clock = trainer, clock
        self.parts: list[dict[str, float]] = []
        self.bare: list[float] = []
        clock.around(trainer, "get_batch_samples", "data")
        clock.around(trainer, "_prepare_inputs", "transfer")
        clock.around(trainer, "_image_view", "augmentation")
        clock.around(trainer, "compute_loss", "loss")
        clock.around(trainer.means, "add", "logging")
        for name in ("_note_similarities", "_note_matches"):
            if hasattr(trainer, name):
                clock.around(trainer, name, "logging")
        clock.around(trainer, "_maybe_log_save_evaluate", "logging")
        clock.around(trainer.callback_handler, "call_event", "logging")
        clock.around(trainer.accelerator, "backward", "backward")
        clock.around(trainer.accelerator, "clip_grad_norm_", "clipping")
        clock.around(trainer.model, "zero_grad", "optimizer")
        clock.around_module(trainer.model, "model_rest")
        for part, names in (
            ("image_forward", ("vision_model", "visual_projection")),
            ("text_forward", ("text_model", "text_projection")),
        ):
            for name in names:
                clock.around_module(getattr(trainer.model, name), part)
        if getattr(trainer, "pools", None) is not None:
            clock.around(trainer.pools, "enqueue", "enqueue")
        trainer.add_callback(self)

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self.trainer.optimizer.step, "timed"):  # a training makes its own
            self.clock.around(self.trainer.optimizer, "step", "optimizer")
        self._lap_within_call()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.clock.running:
            self.parts.append(self.clock.end_step())
        else:
            now = time.perf_counter()
            self.bare.append(now - self._step_start)
        self._lap_within_call()

    def _lap_within_call(self) -> None:
        """A step begins, within an event of the callbacks, whose end takes one part off."""
        self.clock.lap()
        if self.clock.running:
            self.clock._within.append("logging")
        self._step_start = time.perf_counter()

    def train(self, timed: bool) -> None:
        """An epoch."""
        self.clock.running = timed
        self.trainer.train()
        self.clock.running = False


@contextmanager
def timed_look_ups(clock: Clock) -> Iterator[None]:
    """Within the block, every pool's look-up counts for its part."""
    inner = FeaturePool.nearest_slots

    def timed(self: FeaturePool, queries: torch.Tensor) -> torch.Tensor:
        with clock.section("look_up"):
            return inner(self, queries)

    FeaturePool.nearest_slots = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        FeaturePool.nearest_slots = inner  # type: ignore[method-assign]


def step_flops(trainer: Any, steps: int) -> float:
    """FLOP of a training step, over an epoch of so many."""
    counts: list[int] = []
    inner = trainer.training_step

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        counts.append(counted_flops(lambda: losses.append(inner(*args, **kwargs))))
        return losses[0]

    trainer.training_step = counted
    trainer.train()
    trainer.training_step = inner
    assert len(counts) == steps
    return statistics.mean(counts)


def product_share(trainer: Any) -> float:
    """Of the time of PyTorch's operators in training, the share of products, convolutions and attention."""
    cuda = trainer.args.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        trainer.train()
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in recorded.key_averages()
        if event.key.startswith("aten::")
    }
    return sum(time for name, time in times.items() if PRODUCTS.search(name)) / sum(times.values())


def measure(options: argparse.Namespace, make: Callable[[str], Any], device: torch.device) -> dict[str, Any]:
    """Of each phase, the parts of its steps and its floor."""
    clock = Clock(device)
    trainers = {name: make(name) for name in PHASES}
    flops = {name: step_flops(trainer, options.steps) for name, trainer in trainers.items()}  # and warms up
    shares = {name: product_share(trainer) for name, trainer in trainers.items()}
    timed = {name: Timed(trainer, clock) for name, trainer in trainers.items()}
    rates, bandwidths = [], []
    names = list(PHASES)
    with timed_look_ups(clock):
        for number in range(options.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                rates.append(matmul_rate(device))
                bandwidths.append(copy_bandwidth(device))
                for with_timers in (True, False) if number % 2 else (False, True):
                    timed[name].train(with_timers)
            print(f"round {number + 1}/{options.rounds}: {rates[-1] / 1e9:.0f} GFLOP/s", flush=True)
    rate, bandwidth = statistics.median(rates), statistics.median(bandwidths)
    parameters = sum(value.numel() for value in trainers["clip"].model.parameters())
    moved = (OPTIMIZER_BYTES + CLIPPING_BYTES) * parameters
    found = {name: summary(one, flops[name] / rate, moved / bandwidth) for name, one in timed.items()}
    for name, one in found.items():
        one["flops"] = flops[name]
        one["product_share"] = shares[name]
    return {
        "phases": found,
        "matmul_flops_per_second": rate,
        "copy_bytes_per_second": bandwidth,
        "optimizer_bytes": moved,
        "parameters": parameters,
    }


def summary(timed: Timed, product_seconds: float, moving_seconds: float) -> dict[str, Any]:
    """Medians in milliseconds of a phase's parts; of the step as a whole, with timers and without; floor and gap."""
    parts = {
        part: 1e3 * statistics.median(step.get(part, 0.0) for step in timed.parts)
        for part in PARTS
        if any(part in step for step in timed.parts)
    }
    steps = [sum(step.values()) for step in timed.parts]
    floor = product_seconds + moving_seconds
    bare = statistics.median(timed.bare)
    return {
        "parts": parts,
        "step": 1e3 * statistics.median(steps),
        "step_without_timers": 1e3 * bare,
        "steps": [1e3 * step for step in steps],
        "floor": 1e3 * floor,
        "floor_of_products": 1e3 * product_seconds,
        "floor_of_optimizer": 1e3 * moving_seconds,
        "gap": bare / floor,
    }


def table(result: dict[str, Any]) -> str:
    """The parts as Markdown: a column for each kind of step, in milliseconds."""
    phases = result["phases"]
    heads = ("ms of a step", *(PHASES[name].title for name in phases))
    rows = [
        (title, *(f"{one['parts'].get(part, 0.0):.1f}" if part in one["parts"] else "" for one in phases.values()))
        for part, title in PARTS.items()
    ]
    totals = {
        "step_without_timers": "**step**",
        "floor": "**floor**",
        "floor_of_products": "of it of products",
    }
    for key, title in totals.items():
        rows.append((title, *(f"{one[key]:.0f}" for one in phases.values())))
    rows.append(("share of products in its operators", *(f"{one['product_share']:.0%}" for one in phases.values())))
    rows.append(("**step over floor**", *(f"{one['gap']:.2f}" for one in phases.values())))
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured (default: 3)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each kind in a round, twice (default: 2)")
    parser.add_argument("--batch", type=int, default=16, help="batch size (default: 16)")
    parser.add_argument("--image-size", type=int, default=64, help="side of the images in pixels (default: 64)")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = large_clip(options.image_size)
    rows = make_rows(options.batch * (options.steps + 1), options.image_size)  # SafeCLIP leaves out a batch
    with tempfile.TemporaryDirectory() as output:

        def make(name: str) -> Any:
            arguments: dict[str, Any] = {"per_device_train_batch_size": options.batch, "max_steps": options.steps}
            if device.type == "cpu":
                arguments["use_cpu"] = True
            return phase_trainer(name, output, model, processor, rows, POOL_SIZE, **arguments)

        found = measure(options, make, device)
    overheads = [one["step"] / one["step_without_timers"] for one in found["phases"].values()]
    result = {
        "ratios": {
            **{f"{name}_step_over_floor": one["gap"] for name, one in found["phases"].items()},
            "timers_over_none": statistics.median(overheads),
        },
        **found,
        "batch": options.batch,
        "image_size": options.image_size,
        "pool_size": POOL_SIZE,
    }
    print(table(result))
    for name, ratio in result["ratios"].items():
        print(f"{name:>40}: {ratio:.3f}")
    write_result(options.json, result, ("torch", "transformers", "accelerate", "datasets", "kornia"))


if __name__ == "__main__":
    main()
