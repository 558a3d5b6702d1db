"""
What a training step costs: a bare PyTorch loop, the stock `Trainer` and the trainers of this package, on the same raw
rows and the same model, taking turns within one process. RoCLIP runs once with steps that all match, in pools of
21,845 pairs, and once with steps that never do; SafeCLIP's scoring pass runs next to its training.

    python benchmarks/step_cost.py [--of NAME ...] [--json FILE]

Only ratios mean anything across machines. Each round trains every contender for some steps, in turn and in a rotating
order, and gives one ratio a pair; the ratios reported are the medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from bench.output import write_result
from bench.phases import FillPools, full_pools, large_clip
from bench.plain import bare_loop, make_rows, quiet_arguments, stock_trainer
from transformers import CLIPModel, CLIPProcessor, PrinterCallback

from hf_robust_clip import (
    CleanCLIPTrainer,
    CleanCLIPTrainingArguments,
    CLIPTrainer,
    CLIPTrainingArguments,
    PARTrainer,
    PARTrainingArguments,
    RoCLIPTrainer,
    RoCLIPTrainingArguments,
    SafeCLIPTrainer,
    SafeCLIPTrainingArguments,
    UnbindTrainer,
    UnbindTrainingArguments,
)
from hf_robust_clip.losses import clip_loss

#: Of contenders, or of several together, over another.
RATIOS: dict[str, tuple[str | tuple[str, ...], str]] = {
    "stock_trainer_over_bare_loop": ("stock_trainer", "bare_loop"),
    "clip_over_bare_loop": ("clip", "bare_loop"),
    "clip_over_stock_trainer": ("clip", "stock_trainer"),
    "clip_vision_frozen_over_clip": ("clip_vision_frozen", "clip"),
    "clip_text_frozen_over_clip": ("clip_text_frozen", "clip"),
    "cleanclip_over_clip": ("cleanclip", "clip"),
    "par_over_clip": ("par", "clip"),
    "unbind_over_clip": ("unbind", "clip"),
    "unbind_without_adversary_over_clip": ("unbind_random", "clip"),
    "roclip_matching_over_plain": ("roclip_matching", "roclip_plain"),
    "safeclip_over_clip": ("safeclip", "clip"),
    "safeclip_scoring_over_epoch": ("safeclip_scoring", "safeclip"),
    "safeclip_epoch_over_clip_epoch": (("safeclip", "safeclip_scoring"), "clip_two_views"),
}
#: Pairs in RoCLIP's pools in its paper, 2% of a million and a bit.
POOL_SIZE = 21_845


def contenders(
    model: CLIPModel, processor: CLIPProcessor, rows: datasets.Dataset, batch: int, output: str
) -> dict[str, Callable[[], Any]]:
    """One epoch over the rows for each contender, each with its own copy of the model."""
    common = quiet_arguments(output, batch)
    stock = stock_trainer(copy.deepcopy(model), processor, rows, common)
    ours: dict[str, Any] = {"train_dataset": rows, "processing_class": processor}
    clip, vision_frozen, text_frozen = (
        CLIPTrainer(copy.deepcopy(model), CLIPTrainingArguments(**common, freeze=tower), **ours)
        for tower in ("none", "vision", "text")
    )
    cleanclip = CleanCLIPTrainer(copy.deepcopy(model), CleanCLIPTrainingArguments(**common), **ours)
    par = PARTrainer(copy.deepcopy(model), PARTrainingArguments(**common), **ours)
    unbind, random = (
        UnbindTrainer(copy.deepcopy(model), UnbindTrainingArguments(**common, adversary=adversary), **ours)
        for adversary in ("universal", "none")
    )
    pooled = {"pool_size": POOL_SIZE, "match_every_n_epochs": 1, **common}
    roclip = [
        RoCLIPTrainer(copy.deepcopy(model), RoCLIPTrainingArguments(**pooled, matching_start_epoch=start), **ours)
        for start in (0, 1)
    ]
    safeclip = SafeCLIPTrainer(
        copy.deepcopy(model), SafeCLIPTrainingArguments(**common, unimodal_pool_size=POOL_SIZE), **ours
    )
    augmented = CLIPTrainingArguments(**common, image_preset="strong", text_preset="eda")
    two_views = TwoViews(copy.deepcopy(model), augmented, **ours)
    for trainer in (
        *(stock, clip, vision_frozen, text_frozen, two_views, cleanclip, par, unbind, random),
        *(*roclip, safeclip),
    ):
        trainer.remove_callback(PrinterCallback)
    features = full_pools(POOL_SIZE, model.config.projection_dim)
    for trainer in (*roclip, safeclip):
        trainer.add_callback(FillPools(trainer, features))
    return {
        "bare_loop": bare_loop(copy.deepcopy(model), processor, rows, batch),
        "stock_trainer": stock.train,
        "clip": clip.train,
        "clip_vision_frozen": vision_frozen.train,
        "clip_text_frozen": text_frozen.train,
        "clip_two_views": two_views.train,
        "cleanclip": cleanclip.train,
        "par": par.train,
        "unbind": unbind.train,
        "unbind_random": random.train,
        "roclip_plain": roclip[1].train,
        "roclip_matching": roclip[0].train,
        "safeclip": safeclip.train,
        "safeclip_scoring": lambda: safeclip.score_pairs(epoch=0),
    }


class TwoViews(CLIPTrainer):
    """CLIP on two augmented views of each pair, as SafeCLIP's are: what two views cost without a defence."""

    views = ("first", "second")

    def loss_components(self, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        return {f"{name}_loss": 0.5 * clip_loss(*views[name], scale, gather=True) for name in self.views}


def measure(
    runs: dict[str, Callable[[], Any]], rounds: int, steps: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds a batch of every contender in every round."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # SafeCLIP leaves up to two batches of an epoch to another one, and scores all of them.
    batches = {name: steps - 1 if name == "safeclip" else steps for name in names}
    for run in runs.values():  # lazy imports, thread pools, allocator
        run()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            runs[name]()
            seconds[name].append((clock() - start) / batches[name])
        print(f"round {number + 1}/{rounds}: " + ", ".join(f"{n} {seconds[n][-1] * 1e3:.0f} ms" for n in names))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--of", nargs="+", metavar="NAME", help="contenders, such as clip and par (default: all)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the processor's time, on a machine that others work on"
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds measured (default: 8)")
    parser.add_argument("--steps", type=int, default=6, help="steps of each contender in a round (default: 6)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (default: 32)")
    parser.add_argument("--image-size", type=int, default=64, help="side of the images in pixels (default: 64)")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    model, processor = large_clip(options.image_size)
    rows = make_rows(options.batch * options.steps, options.image_size)
    with tempfile.TemporaryDirectory() as output:
        runs = contenders(model, processor, rows, options.batch, output)
        if unknown := set(options.of or ()) - set(runs):
            parser.error(f"--of: unknown {', '.join(sorted(unknown))}; there are {', '.join(runs)}")
        clock = time.process_time if options.cpu_time else time.perf_counter
        seconds = measure({name: runs[name] for name in options.of or runs}, options.rounds, options.steps, clock)
    ratios = {}
    for name, (above, below) in RATIOS.items():
        parts = [above] if isinstance(above, str) else above
        if not {*parts, below} <= set(seconds):
            continue
        rounds = zip(*(seconds[part] for part in parts), strict=True)
        ratios[name] = statistics.median(sum(a) / b for a, b in zip(rounds, seconds[below], strict=True))
    result = {
        "ratios": ratios,
        "milliseconds_per_step": {name: [round(value * 1e3, 2) for value in times] for name, times in seconds.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": options.batch,
        "image_size": options.image_size,
        "steps_per_round": options.steps,
    }
    for name, times in seconds.items():
        print(f"{name:>14}: {statistics.median(times) * 1e3:7.1f} ms a step")
    for name, ratio in ratios.items():
        print(f"{name:>30}: {ratio:.3f}")
    write_result(options.json, result, ("torch", "transformers", "accelerate", "datasets"))


if __name__ == "__main__":
    main()
