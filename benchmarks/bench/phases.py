"""The steps that the trainers take, each kind of them by itself, as often as a benchmark needs it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPProcessor, PrinterCallback, TrainerCallback

from hf_robust_clip import (
    CleanCLIPTrainer,
    CleanCLIPTrainingArguments,
    CLIPTrainer,
    CLIPTrainingArguments,
    RoCLIPTrainer,
    RoCLIPTrainingArguments,
    SafeCLIPTrainer,
    SafeCLIPTrainingArguments,
)
from hf_robust_clip.data.scratch import build_model, build_processor
from hf_robust_clip.defences import SafeCLIP

from .plain import CAPTIONS


class _Safe(SafeCLIP):
    """All of whose batches are safe."""

    def kind(self, batch: Any) -> bool:
        return True


class SafeBatches(SafeCLIPTrainer):
    """SafeCLIP's steps on safe batches, without a split."""

    def make_defence(self, args: Any, train_dataset: Any) -> SafeCLIP:
        return _Safe(len(train_dataset), args.warmup_unimodal_epochs, unimodal_pool_size=args.unimodal_pool_size)


@dataclass(frozen=True)
class Phase:
    """A trainer and the arguments with which each of its steps is of one kind."""

    title: str
    trainer: type[CLIPTrainer]
    arguments: type[CLIPTrainingArguments]
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def pooled(self) -> str | None:
        """The argument for the size of its pools, if it has any."""
        pools = {RoCLIPTrainer: "pool_size", SafeCLIPTrainer: "unimodal_pool_size"}
        return next((name for base, name in pools.items() if issubclass(self.trainer, base)), None)


_SAFE = SafeCLIPTrainingArguments
_ALL = {"match_every_n_epochs": 1}
#: A risky step is a step of the unimodal warm-up: the same loss, the same pools.
PHASES: dict[str, Phase] = {
    "clip": Phase("CLIP", CLIPTrainer, CLIPTrainingArguments),
    "cleanclip": Phase("CleanCLIP", CleanCLIPTrainer, CleanCLIPTrainingArguments),
    "roclip_plain": Phase(
        "RoCLIP, plain", RoCLIPTrainer, RoCLIPTrainingArguments, {**_ALL, "matching_start_epoch": 1000}
    ),
    "roclip_matching": Phase(
        "RoCLIP, matching", RoCLIPTrainer, RoCLIPTrainingArguments, {**_ALL, "matching_start_epoch": 0}
    ),
    "safeclip_unimodal": Phase(
        "SafeCLIP, unimodal and risky", SafeCLIPTrainer, _SAFE, {"warmup_unimodal_epochs": 1000}
    ),
    "safeclip_cross": Phase(
        "SafeCLIP, cross", SafeCLIPTrainer, _SAFE, {"warmup_unimodal_epochs": 0, "warmup_cross_epochs": 1000}
    ),
    "safeclip_safe": Phase("SafeCLIP, safe", SafeBatches, _SAFE, {"warmup_unimodal_epochs": 1000}),
}


class FillPools(TrainerCallback):
    """Training starts with empty pools, and matches once they are full; a benchmark does not wait for that."""

    def __init__(self, trainer: Any, features: list[torch.Tensor]) -> None:
        self.trainer = trainer
        self.features = [side.to(trainer.args.device) for side in features]

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.pools.enqueue(*self.features)


def full_pools(size: int, dim: int) -> list[torch.Tensor]:
    """Features of nothing in particular for every slot of an image and of a text pool."""
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(size, dim, generator=generator)) for _ in range(2)]


def small_clip(image_size: int = 64) -> tuple[CLIPModel, CLIPProcessor]:
    """A model of 7 million parameters, of which a step in one thread takes some tenths of a second."""
    processor = build_processor(CAPTIONS, image_size=image_size)
    sizes: dict[str, int] = {"vision_width": 256, "vision_layers": 8, "text_width": 128, "text_layers": 3}
    return build_model(processor, patch_size=16, projection_dim=128, **sizes), processor


def large_clip(image_size: int = 64) -> tuple[CLIPModel, CLIPProcessor]:
    """
    A model of 35 million parameters: about 0.8 MFLOP a pixel and training step, between ViT-B/32 (0.5) and ViT-B/16
    (2.1) at 224 px, so that what the data cost weighs as it does in use.
    """
    processor = build_processor(CAPTIONS, image_size=image_size)
    sizes: dict[str, int] = {"vision_width": 512, "vision_layers": 10, "text_width": 256, "text_layers": 4}
    return build_model(processor, patch_size=16, projection_dim=256, **sizes), processor


def phase_trainer(
    name: str, output: str, model: CLIPModel, processor: CLIPProcessor, rows: Any, pool_size: int, **arguments: Any
) -> CLIPTrainer:
    """
    The trainer of a phase, with a copy of the model and with full pools.

    Args:
        name (`str`): Of `PHASES`.
        output (`str`): Its folder; nothing is saved.
        rows: Its `train_dataset`.
        pool_size (`int`): Pairs in its pools.
        **arguments: Training arguments.
    """
    phase = PHASES[name]
    pools = {phase.pooled: pool_size} if phase.pooled else {}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 10_000}
    trainer = phase.trainer(
        model=copy.deepcopy(model),
        args=phase.arguments(output, **{**quiet, **phase.given, **pools, **arguments}),
        train_dataset=rows,
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)
    if pools:
        features = full_pools(pool_size, model.config.projection_dim)
        trainer.add_callback(FillPools(trainer, features))
    return trainer
