"""CleanCLIP: fine-tuning on clean pairs that removes a backdoor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..arguments import IMAGE_PRESETS, TEXT_PRESETS, CLIPTrainingArguments
from ..batch import Batch, Embeddings
from ..losses import cleanclip_loss
from ..methods import ANYTHING, WORDS, Method
from ..wording import shown
from .base import Defence


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
                raise ValueError(f"{name} must be at least 0, but is {shown(getattr(self, name))}")
        if self.clip_weight == self.unimodal_weight == 0:
            raise ValueError(
                "clip_weight and unimodal_weight are both 0, so that nothing is trained: one must be above 0"
            )


class CleanCLIP(Defence):
    """
    Beside the CLIP loss, each image and each caption learns to recognise an augmented copy of itself, which unties the
    trigger from the target's captions (Bansal et al., ICCV 2023, arXiv 2303.03323, equation 3).

    Args:
        clip_weight, unimodal_weight (`float`): The paper's lambda 1 and lambda 2, at least 0.
    """

    method = Method(
        name="CleanCLIP",
        what="Fine-tuned with CleanCLIP on pairs taken to be clean: to the loss of CLIP it adds self-supervision "
        "within images and within captions, which loosens what a trigger has tied together.",
        kind="fine-tuning",
        limits=(
            "It needs clean pairs: poisons that are left among them undo it (arXiv 2311.14948).",
            "It does not clean models that were pre-trained with a self-supervised term as well, however it is tuned "
            "(arXiv 2311.14948).",
            "It is weak against structured triggers: stripes, triangles, text (arXiv 2412.00727).",
            "It does not stop BadCLIP, whose trigger is optimized: 99.8% attack success became 89.7% "
            "(arXiv 2412.20392).",
            "It leaves something, and costs accuracy: on a ViT-B/32 the success of the patch went from 82.7% to "
            "23.8%, zero-shot accuracy from 63.0% to 57.9%, in a third party's re-run (RVPT, arXiv 2412.20392, table "
            "1).",
            WORDS.format("75%"),
            ANYTHING,
        ),
        paper="Bansal et al., ICCV 2023, arXiv 2303.03323",
        bibtex="""@inproceedings{bansal2023cleanclip,
  title = {{CleanCLIP}: Mitigating Data Poisoning Attacks in Multimodal Contrastive Learning},
  author = {Bansal, Hritik and Singhi, Nishad and Yang, Yu and Yin, Fan and Grover, Aditya and Chang, Kai-Wei},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2023},
  eprint = {2303.03323},
  archivePrefix = {arXiv}
}""",
    )
    arguments = CleanCLIPTrainingArguments
    views = ("original", "augmented")

    def __init__(self, clip_weight: float = 1.0, unimodal_weight: float = 1.0) -> None:
        super().__init__()
        self.clip_weight, self.unimodal_weight = clip_weight, unimodal_weight
        self.needs_gradient = frozenset({"vision", "text"} if unimodal_weight else ())

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return cleanclip_loss(
            *views["original"],
            *views["augmented"],
            scale,
            clip_weight=self.clip_weight,
            unimodal_weight=self.unimodal_weight,
            gather=self.gather,
            bias=batch.bias,
        )
