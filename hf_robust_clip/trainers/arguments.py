"""The arguments of the trainers, beside those of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..augment.images import PRESETS as IMAGE_PRESETS
from ..augment.text import TextAugmentation
from ..data.rows import ON_BAD_ROW

TEXT_PRESETS = ("identity", *TextAugmentation.presets)


@dataclass
class CLIPTrainingArguments(TrainingArguments):
    """
    Arguments of [`CLIPTrainer`], and of all trainers here. Those of `transformers.TrainingArguments` apply, with one
    other default: `dataloader_drop_last=True`, since a contrastive loss over the few rows of a last batch is another
    loss.

    `gradient_accumulation_steps` averages the gradients of small batches; it adds **no** negatives, so it is not the
    same as a larger batch.

    Args:
        image_column (`str`, defaults to `"image"`): Column of the datasets with the image.
        caption_column (`str`, defaults to `"caption"`): Column with the caption, or a list of them to draw from.
        max_length (`int`, *optional*): Longest caption in tokens. `None`: what the model's text tower takes.
        image_preset (`str`, defaults to `"identity"`): Augmentation of images: `"identity"`, `"weak"`,
            `"cleanclip"`, `"strong"` or `"autoaugment"`. The trainer's `image_augmentation` goes before it.
        text_preset (`str`, defaults to `"identity"`): Augmentation of captions: `"identity"`, `"light"` or `"eda"`.
            The trainer's `text_augmentation` goes before it.
        gather_across_devices (`bool`, defaults to `True`): Whether the rows of all processes are negatives.
        max_logit_scale (`float`, defaults to 100): Upper bound of `exp(logit_scale)`, at least 1; the lower is 1.
        on_bad_row (`str`, defaults to `"raise"`): What to do about an image that does not decode or a caption that is
            no string: `"raise"`, or `"skip"`: train on the next usable row instead, and list the rows at the end.
    """

    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last batch where it is smaller than the others."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the datasets with the image."})
    caption_column: str = field(
        default="caption", metadata={"help": "Column of the datasets with the caption, or a list of captions."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest caption in tokens; by default what the model takes."}
    )
    image_preset: str = field(
        default="identity", metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}."}
    )
    text_preset: str = field(
        default="identity", metadata={"help": f"Augmentation of captions: {', '.join(TEXT_PRESETS)}."}
    )
    gather_across_devices: bool = field(default=True, metadata={"help": "Use the rows of all processes as negatives."})
    max_logit_scale: float = field(default=100.0, metadata={"help": "Upper bound of exp(logit_scale), at least 1."})
    on_bad_row: str = field(
        default="raise", metadata={"help": "What to do about an unusable row: 'raise', or 'skip' and list it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, accepted in (
            ("image_preset", IMAGE_PRESETS),
            ("text_preset", TEXT_PRESETS),
            ("on_bad_row", ON_BAD_ROW),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, accepted))}, but is {getattr(self, name)!r}"
                )
        if self.max_logit_scale < 1:
            raise ValueError(f"max_logit_scale must be at least 1, but is {self.max_logit_scale!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be None or at least 2 tokens, but is {self.max_length!r}")
        # Without an accelerator nothing is pinned, and torch says so at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        # B x B logits of several batches cannot be concatenated, and nothing here reads them.
        self.prediction_loss_only = True
        # Dispatching cuts batches along their first dimension, which for the texts is views x rows.
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            accelerator_config.dispatch_batches = False


@dataclass
class CleanCLIPTrainingArguments(CLIPTrainingArguments):
    """
    Arguments of [`CleanCLIPTrainer`]. The defaults are the paper's recipe (Bansal et al., arXiv 2303.03323, appendix):
    10 epochs over about 100,000 clean pairs, batch 64, learning rate 1e-5 with 50 warm-up steps and a cosine, AdamW
    with weight decay 0.1. A higher learning rate removes more of the backdoor and costs more clean accuracy.

    Args:
        clip_weight (`float`, defaults to 1): Weight of the CLIP loss, at least 0 (lambda 1).
        unimodal_weight (`float`, defaults to 1): Weight of the self-supervision within images and within captions, at
            least 0 (lambda 2). 0 is plain fine-tuning.
    """

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size per device for training."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Number of epochs over the clean pairs."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay; logit_scale is exempt."})
    warmup_steps: float = field(default=50, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    image_preset: str = field(
        default="cleanclip", metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}."}
    )
    text_preset: str = field(default="eda", metadata={"help": f"Augmentation of captions: {', '.join(TEXT_PRESETS)}."})
    clip_weight: float = field(default=1.0, metadata={"help": "Weight of the CLIP loss (lambda 1)."})
    unimodal_weight: float = field(default=1.0, metadata={"help": "Weight of the self-supervision (lambda 2)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_weight", "unimodal_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, but is {getattr(self, name)!r}")
