"""CleanCLIP: fine-tuning on clean pairs that removes a backdoor."""

from __future__ import annotations

from typing import Any

import torch

from ..losses import cleanclip_loss
from .arguments import CleanCLIPTrainingArguments
from .base import CLIPTrainer, Embeddings


class CleanCLIPTrainer(CLIPTrainer):
    """
    Fine-tune a suspected CLIP on clean pairs so that a backdoor loses its hold: beside the CLIP loss, each image and
    each caption learns to recognise an augmented copy of itself, which unties the trigger from the target's captions
    (Bansal et al., ICCV 2023, arXiv 2303.03323).

    It needs pairs that are clean: poisons that are left among them undo it, and so does pre-training with a
    self-supervised term (arXiv 2311.14948). It is weak against structured triggers (stripes, triangles, text; arXiv
    2412.00727) and against BadCLIP (arXiv 2412.20392). Measure, with
    [`AttackSuccessEvaluator`], and do not resume the optimizer of the poisoned checkpoint: pass its weights.

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder.
        args ([`CleanCLIPTrainingArguments`]): The paper's recipe by default.
        image_augmentation, text_augmentation: `None`: the presets of `args`, `"cleanclip"` and `"eda"`.
        Others: As of [`CLIPTrainer`].
    """

    views = ("original", "augmented")
    args_class = CleanCLIPTrainingArguments
    args: CleanCLIPTrainingArguments

    def loss_components(
        self, views: dict[str, Embeddings], scale: torch.Tensor, inputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        plain, augmented = views["original"], views["augmented"]
        return cleanclip_loss(
            plain.image_embeds,
            plain.text_embeds,
            augmented.image_embeds,
            augmented.text_embeds,
            scale,
            clip_weight=self.args.clip_weight,
            unimodal_weight=self.args.unimodal_weight,
            gather=self.args.gather_across_devices,
        )
