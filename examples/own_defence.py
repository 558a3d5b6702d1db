"""
A defence of your own on top of `CLIPTrainer`: the trimmed loss (Shen and Sanghavi, "Learning with bad training data
via iterative trimmed loss minimization", ICML 2019, arXiv 1810.11874), here for pairs and with two views.

The pairs that fit worst so far are left out of each batch. How well a pair fits is the average of its losses, the
later visits counting more; it is the state that this defence keeps, saves and takes up again.

It shows what a defence consists of, and is none to rely on: a backdoor that is learned faster than the clean pairs
soon fits better than they do. To see what it does to a planted backdoor, beside the undefended trainer:

    python examples/own_defence.py --model my-untrained-clip --pairs you/pairs --images you/labelled-images \
        --target banana --output_dir trimmed

On a few digits, in seconds:

    python examples/own_defence.py --quick
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from quick import example_parser, parse
from transformers import AutoProcessor

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSpec,
    ZeroShotEvaluator,
    load_pairs,
    poison_dataset,
)
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.distributed import gather_features, rank


@dataclass
class TrimmedTrainingArguments(CLIPTrainingArguments):
    """
    Arguments of [`TrimmedTrainer`], beside those of [`CLIPTrainingArguments`].

    Args:
        trim (`float`, defaults to 0.1): Share of a batch that is left out, in [0, 1).
        trim_start_epoch (`int`, defaults to 2): First epoch in which pairs are left out, counted from 0.
    """

    image_preset: str = field(default="weak", metadata={"help": "Augmentation of the second view's images."})
    text_preset: str = field(default="light", metadata={"help": "Augmentation of the second view's captions."})
    trim: float = field(default=0.1, metadata={"help": "Share of a batch that is left out."})
    trim_start_epoch: int = field(default=2, metadata={"help": "First epoch in which pairs are left out, from 0."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trim < 1:
            raise ValueError(f"trim must be in [0, 1), but is {self.trim!r}")


class TrimmedTrainer(CLIPTrainer):
    """CLIP across two views, on the pairs of a batch whose average loss so far is lowest; on map-style datasets."""

    views = ("original", "augmented")
    args_class = TrimmedTrainingArguments
    args: TrimmedTrainingArguments
    fit: torch.Tensor  # (N,), float32: each pair's average loss, NaN before its first visit

    def loss_components(self, views: Any, scale: torch.Tensor, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        (images, captions), (images_2, captions_2) = views["original"], views["augmented"]
        losses = 0.5 * (pair_losses(images, captions_2, scale) + pair_losses(captions, images_2, scale))  # (B,)
        rows = inputs["row_index"]
        # Of all ranks: which of them a pair goes to changes from epoch to epoch, and all must hold the same.
        seen, found = gather_features(rows), gather_features(losses.detach())
        self.fit[seen] = torch.where(self.fit[seen].isnan(), found, 0.5 * (self.fit[seen] + found))
        trimming = (self.state.epoch or 0) >= self.args.trim_start_epoch
        kept = len(rows) - (int(self.args.trim * len(rows)) if trimming else 0)
        return {"trimmed_loss": losses[self.fit[rows].argsort(stable=True)[:kept]].mean()}

    def training_state(self) -> dict[str, torch.Tensor]:
        return {**super().training_state(), "fit": self.fit}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        super().load_training_state(state)
        self.fit = state["fit"].to(self.args.device)

    def reset_training_state(self) -> None:
        super().reset_training_state()
        self.fit = torch.full((len(self.train_dataset),), math.nan, device=self.args.device)


def pair_losses(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """InfoNCE of each query `(B,)`, with the keys of all ranks as candidates."""
    logits = scale * queries @ gather_features(keys).T  # (B, world_size * B)
    positives = rank() * len(queries) + torch.arange(len(queries), device=logits.device)
    return F.cross_entropy(logits, positives, reduction="none")


def main() -> None:
    given = parse(example_parser(__doc__))
    images = load_pairs(given.images, split="test")
    names = images.features["label"].names
    trigger = BlendedTrigger()
    # The trigger goes on at the model's own resolution, where it is measured too.
    size = ImagePreprocessor(AutoProcessor.from_pretrained(given.model).image_processor).image_size
    spec = PoisonSpec(trigger, given.target, rate=0.1 if given.quick else 0.003, image_size=size)
    poisoned, _ = poison_dataset(load_pairs(given.pairs), spec)
    common: dict[str, Any] = {
        "train_dataset": poisoned,
        "evaluators": [
            ZeroShotEvaluator(images, names),
            AttackSuccessEvaluator(images, trigger, given.target, names),
        ],
    }
    settings: dict[str, Any] = {"num_train_epochs": 32, "learning_rate": 5e-4, "per_device_train_batch_size": 128}
    if given.quick:
        settings = {"num_train_epochs": 4, "learning_rate": 2e-3, "per_device_train_batch_size": 32}
    undefended = CLIPTrainer(
        given.model, CLIPTrainingArguments(given.output_dir, report_to="none", **settings), **common
    )
    undefended.train()
    print("undefended:", undefended.run_evaluators())
    args = TrimmedTrainingArguments(given.output_dir, report_to="none", **settings)
    trainer = TrimmedTrainer(given.model, args, **common)
    trainer.train()
    trainer.save_model()
    print("trimmed:", trainer.run_evaluators())
    worst = trainer.fit.argsort(descending=True)[: int(args.trim * len(poisoned))].tolist()
    print(f"{sum(poisoned[row]['poisoned'] for row in worst)} of the {len(worst)} pairs that fit worst are poisons")


if __name__ == "__main__":
    main()
