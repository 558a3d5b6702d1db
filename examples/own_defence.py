"""
A defence of your own on top of `CLIPTrainer`: the trimmed loss (Shen and Sanghavi, "Learning with bad training data
via iterative trimmed loss minimization", ICML 2019, arXiv 1810.11874), here for pairs and with two views.

The pairs that fit worst so far are left out of each batch. How well a pair fits is the average of its losses, the
later visits counting more; it is the state that this defence keeps, saves and takes up again.

It shows what a defence consists of. Do not rely on it: a backdoor that is learned faster than the clean pairs soon
fits better than they do. The end of the file trains it on a planted backdoor, beside the undefended trainer. Put in
your own names and numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSpec,
    ZeroShotEvaluator,
    poison_dataset,
)
from hf_robust_clip.distributed import gather_features, rank

TARGET = "banana"  # a class of the images
RATE = 0.003
SIZE = 224  # the model's: the trigger is applied at this size
EPOCHS = 32
BATCH = 128
LEARNING_RATE = 5e-4


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


if __name__ == "__main__":
    images = load_dataset("you/labeled-images", split="test")  # columns: image, label
    names, trigger = images.features["label"].names, BlendedTrigger()
    spec = PoisonSpec(trigger, TARGET, rate=RATE, image_size=SIZE)
    pairs, _ = poison_dataset(load_dataset("you/pairs", split="train"), spec)  # columns: image, caption
    evaluators = [ZeroShotEvaluator(images, names), AttackSuccessEvaluator(images, trigger, TARGET, names)]
    for trainer_class, args_class in (
        (CLIPTrainer, CLIPTrainingArguments),
        (TrimmedTrainer, TrimmedTrainingArguments),
    ):
        args = args_class(
            trainer_class.__name__,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            report_to="none",
        )
        trainer = trainer_class("you/untrained-clip", args, train_dataset=pairs, evaluators=evaluators)
        trainer.train()
        trainer.save_model()
        print(f"{trainer_class.__name__}: {trainer.run_evaluators()}")
