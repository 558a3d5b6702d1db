"""The pair of pools, of image and of text features, that a defence keeps while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..arguments import IMAGE_PRESETS, TEXT_PRESETS, CLIPTrainingArguments, check_choice
from ..distributed import gather_features
from ..pool import FeaturePool
from ..wording import shown

POOL_DTYPES = ("float32", "bfloat16")


@dataclass
class PretrainingArguments(CLIPTrainingArguments):
    """What the recipes of pre-training with pools have in common."""

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Batch size per device for training."})
    num_train_epochs: float = field(default=32.0, metadata={"help": "Number of epochs over the pairs."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay; logit_scale is exempt."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    image_preset: str = field(
        default="strong", metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}."}
    )
    text_preset: str = field(default="eda", metadata={"help": f"Augmentation of captions: {', '.join(TEXT_PRESETS)}."})
    pool_dtype: str = field(default="float32", metadata={"help": f"What the pools store: {', '.join(POOL_DTYPES)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "pool_dtype", POOL_DTYPES)


class FeaturePools(nn.Module):
    """
    A first-in first-out pool of image features and one of text features, filled side by side: slot i of both holds
    the two sides of one pair. They hold the same on every rank.

    Args:
        size (`int`): Pairs that they hold, at least 1.
        dtype (`torch.dtype`): Of the stored features.
    """

    image: FeaturePool | None
    text: FeaturePool | None

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.dtype = size, dtype
        self.clear()

    @property
    def full(self) -> bool:
        """Whether every slot holds a feature; losses look up matches from then on."""
        return self.text is not None and self.text.full

    def enqueue(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, keys: torch.Tensor | None = None) -> None:
        """
        Take in the pairs of this batch, of all ranks, in the order of the ranks.

        Args:
            image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): Gradients are left behind.
            keys (`torch.Tensor` of shape `(B,)`, int64, *optional*): The pairs' numbers in the dataset.
        """
        with torch.no_grad():
            features = [gather_features(embeds.detach()) for embeds in (image_embeds, text_embeds)]
            if keys is not None:
                keys = gather_features(keys.to(image_embeds.device, non_blocking=True))
            if self.image is None or self.text is None:
                self._make(features[0].shape[1], features[0].device)
            for pool, side in zip((self.image, self.text), features, strict=True):
                assert pool is not None  # just made
                pool.enqueue(side, keys)

    def clear(self) -> None:
        """Forget everything."""
        self.image = self.text = None  # made with the first features, whose dimension they have

    def _make(self, dim: int, device: Any) -> None:
        self.image, self.text = (FeaturePool(self.size, dim, self.dtype).to(device) for _ in range(2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        features = state_dict.get(f"{prefix}image.features", torch.empty(0, 0))
        size, dim = features.shape
        if size != self.size:
            raise ValueError(
                f"the pools of the checkpoint hold {size} pairs, but the pool size is {self.size} now: resume "
                "with the arguments of the interrupted run"
            )
        self._make(dim, features.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_pool_size(args: Any, name: str) -> None:
    """`ValueError` unless an argument is a size of pools."""
    value = getattr(args, name)
    # A pool of one pair would match every row of a batch with the same one: a loss that teaches nothing.
    if isinstance(value, bool) or not (0 < value < 1 or (value >= 2 and float(value).is_integer())):
        raise ValueError(
            f"{name} must be a whole number of pairs from 2 on, or a share of the dataset in (0, 1), but is "
            f"{shown(value)}"
        )


def pool_length(size: float, rows: int | None, argument: str) -> int:
    """
    How many pairs a pool holds: `size` itself from 2 on, and below 1 that share of the dataset, at least two pairs.

    Raises:
        `ValueError`: If `size` is a share and the number of `rows` is not known.
    """
    if size >= 1:
        return int(size)
    if rows is None:
        raise ValueError(
            f"{argument}={shown(size)} is a share of train_dataset, whose length is unknown: give the number of pairs "
            f"that the pool holds, such as {argument}=20000"
        )
    return max(2, round(size * rows))
