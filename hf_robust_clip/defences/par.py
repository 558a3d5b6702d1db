"""PAR, Perturb and Recover: fine-tuning on clean pairs, away from the suspect model."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType

from ..arguments import IMAGE_PRESETS, CLIPTrainingArguments
from ..batch import Batch, Embeddings, encode_pairs
from ..losses import par_loss, repulsion, squared_distances
from ..methods import ANYTHING, Line, Method, Panel, Series, Statement
from ..models import SCALARS, base_weights, has_adapters, inference, is_adapter, without_adapters
from ..record import RunRecord
from ..wording import shortened, shown
from .base import REFERENCE, Defence

#: Learning rates of the paper's schedule as shares of its peak, 3e-5: half-way 3e-6, in the end 1e-9.
HALF_WAY, LAST = 0.1, 1e-9 / 3e-5
#: Schedules of the Trainer that go with that of the paper.
_CONSTANT = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
#: What the class token of a vision tower is called.
_CLASS_TOKENS = ("class_embedding", "cls_token")


@dataclass
class PARTrainingArguments(CLIPTrainingArguments):
    """
    Arguments of [`PARTrainer`]. The defaults are the recipe of the paper and of its released code (Singh, Croce, Hein,
    arXiv 2412.00727): 2 epochs over 250,000 clean pairs, batch 2,048 (512 on each of 4 GPUs), AdamW with betas 0.9 and
    0.98 and weight decay 1e-4, learning rate 3e-5. With `contrastive_chunk_size`, the batch fits one device.

    Args:
        repel_threshold (`float`, defaults to 2.15): Mean squared distance from the suspect model's embeddings, in
            [0, 4], up to which distance is rewarded, in images and in captions (tau). 0 is plain fine-tuning.
        repel_layers (`bool`, defaults to `False`): Whether the class token behind every layer of the vision tower is
            repelled as well, each up to `repel_threshold`. The form is ours, after table 8 of RVPT (arXiv 2412.20392).
        freeze_logit_scale (`bool`, defaults to `True`): Whether `logit_scale` keeps its value in training.
        paper_schedule (`bool`, defaults to `True`): Whether the learning rate falls as in the paper: in a line to a
            tenth over the first half of the steps, then in a cosine to a 30,000th. `False`: as `lr_scheduler_type`
            says, which otherwise can only warm up.
    """

    per_device_train_batch_size: int = field(default=512, metadata={"help": "Batch size per device for training."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Number of epochs over the clean pairs."})
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay; logit_scale is exempt."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta 2 of AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Schedule of the learning rate, beside paper_schedule."}
    )
    image_preset: str = field(default="par", metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}."})
    repel_threshold: float = field(
        default=2.15, metadata={"help": "Distance from the suspect model up to which distance is rewarded (tau)."}
    )
    repel_layers: bool = field(
        default=False, metadata={"help": "Repel the class token behind every layer of the vision tower as well."}
    )
    freeze_logit_scale: bool = field(default=True, metadata={"help": "Keep logit_scale as it is in training."})
    paper_schedule: bool = field(
        default=True, metadata={"help": "Lower the learning rate as in the paper, in place of lr_scheduler_type."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.repel_threshold <= 4:
            raise ValueError(f"repel_threshold must be in [0, 4], but is {shown(self.repel_threshold)}")
        if self.paper_schedule and self.lr_scheduler_type not in _CONSTANT:
            raise ValueError(
                f"lr_scheduler_type={shown(SchedulerType(self.lr_scheduler_type).value)} and paper_schedule=True are "
                "two schedules: set paper_schedule=False, or leave lr_scheduler_type at 'constant_with_warmup' or "
                "'constant'"
            )
        for name in ("contrastive_chunk_size", "accumulate_negatives"):
            if self.repel_layers and getattr(self, name):
                raise ValueError(_in_chunks(f"{name}={shown(getattr(self, name))}"))


class PAR(Defence):
    """
    Beside the CLIP loss, embeddings are driven away from those that the suspect model has of the same inputs, until
    they are far enough; what clean pairs teach comes back, a backdoor does not (Singh, Croce, Hein, arXiv 2412.00727).

    The suspect model is the encoder as [`attach`] finds it: of one with adapters, the model that they were put on,
    which costs no second copy; else one deep copy, in evaluation mode. A checkpoint holds a hash of its weights.

    Args:
        repel_threshold (`float`): The paper's tau, in [0, 4].
        repel_layers (`bool`): Whether to repel the class token behind every layer of the vision tower as well: less
            half the mean over layers of the mean squared distances of the normalised tokens, each up to the threshold.
        freeze_logit_scale (`bool`): Whether `logit_scale` is without gradient while training goes on.
        paper_schedule (`bool`): Whether learning rates are those of [`step_factor`].
    """

    method = Method(
        name="PAR",
        what="Fine-tuned with PAR (Perturb and Recover) on pairs taken to be clean: beside the loss of CLIP, "
        "embeddings are driven away from those of the suspect model, up to a threshold.",
        kind="fine-tuning",
        limits=(
            "It needs pairs that are clean, or synthetic: what poisons that are left among them do was not measured.",
            "It leaves something of large and of written triggers: on a ViT-B/32 triangles kept 15.9% attack success, "
            "and text 37.3%; after CleanCLIP it was 91.4% and 62.9% (arXiv 2412.00727).",
            "It does not stop BadCLIP, whose trigger is optimized: of a ResNet-50 it kept 30.4% attack success; after "
            "CleanCLIP it was 40.1% (arXiv 2412.00727).",
            "Its learning rate and its threshold decide what is removed, and what accuracy that costs.",
            "It was not made against words in captions as triggers; no defence in hf_robust_clip was.",
            ANYTHING,
        ),
        paper="Singh, Croce and Hein, CVPR 2026, arXiv 2412.00727",
        bibtex="""@inproceedings{singh2026perturb,
  title = {Perturb and Recover: Fine-tuning for Effective Backdoor Removal from {CLIP}},
  author = {Singh, Naman Deep and Croce, Francesco and Hein, Matthias},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2026},
  eprint = {2412.00727},
  archivePrefix = {arXiv}
}""",
    )
    arguments = PARTrainingArguments
    series = Series(
        heading="How far PAR went",
        caption="From the training log: mean squared distance of the embeddings from those of the suspect model, of "
        "the same images and captions, 0 to 4. Distance is rewarded up to the threshold.",
        panels=(
            Panel(
                "Squared distance from the suspect model",
                (
                    Line("image_distance", "images"),
                    Line("text_distance", "captions", "text"),
                    Line("layer_distance", "class tokens, mean over layers", "target"),
                ),
            ),
        ),
    )

    #: SHA-256 of the suspect weights `(32,)`, uint8, and the UTF-8 of their Hub id, or of the name of their folder.
    suspect: torch.Tensor | None
    suspect_name: torch.Tensor | None

    def __init__(
        self,
        repel_threshold: float = 2.15,
        repel_layers: bool = False,
        freeze_logit_scale: bool = True,
        paper_schedule: bool = True,
    ) -> None:
        super().__init__()
        self.repel_threshold, self.repel_layers = repel_threshold, repel_layers
        self.needs_gradient = frozenset({"vision", "text"})
        self.freeze_logit_scale, self.paper_schedule = freeze_logit_scale, paper_schedule
        self.register_buffer("suspect", None)
        self.register_buffer("suspect_name", None)
        # Out of sight of `state_dict` and of `modules`: no checkpoint holds it, and nothing trains it.
        self._copy: tuple[Any, ...] = ()
        self._tokens: ClassTokens | None = None
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attach(self, encoder: Any) -> None:
        if self.repel_layers:
            vision_layers(encoder)
        self._copy = () if _keeps_its_base(encoder) else (copy.deepcopy(encoder).eval().requires_grad_(False),)
        self.suspect = hash_of(base_weights(encoder))
        name = str(getattr(encoder.config, "_name_or_path", "") or "")
        # A folder's path says something of the machine, and checkpoints are pushed.
        shared = Path(name).resolve().name if os.path.exists(name) else name
        self.suspect_name = torch.frombuffer(bytearray(shared.encode() or b"?"), dtype=torch.uint8)

    @contextmanager
    def during_training(self, encoder: Any) -> Iterator[None]:
        """`logit_scale` is frozen, and the layers of the vision tower are listened to, where that was asked for."""
        trained = encoder.logit_scale.requires_grad
        with ExitStack() as stack:
            if self.repel_layers:
                self._tokens = stack.enter_context(ClassTokens(encoder))
            encoder.logit_scale.requires_grad_(trained and not self.freeze_logit_scale)
            stack.callback(encoder.logit_scale.requires_grad_, trained)
            try:
                yield
            finally:
                self._tokens = None

    def reference(self, encoder: Any, inputs: dict[str, torch.Tensor]) -> Embeddings:
        """What the suspect model makes of the same inputs."""
        listening = self._tokens
        tokens = listening.take() if listening is not None else []
        model = self._copy[0] if self._copy else encoder
        device = inputs["input_ids"].device
        if self._copy and model.logit_scale.device != device:  # with FSDP, the encoder was not there yet
            model.to(device)
        with inference(model), without_adapters(model):
            if listening is None:
                return encode_pairs(model, inputs)
            with ClassTokens(model) as frozen:
                embeddings = encode_pairs(model, inputs)
        self._layers = list(zip(tokens, frozen.take(), strict=True))
        listening.take()  # of the frozen pass, where it is the same tower
        return embeddings

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        reference = views[REFERENCE]
        (pairs,) = (view for name, view in views.items() if name != REFERENCE)
        terms = par_loss(
            *pairs, *reference, scale, threshold=self.repel_threshold, gather=self.gather, bias=batch.bias
        )
        for name, sides in zip(("image_distance", "text_distance"), zip(pairs, reference, strict=True), strict=True):
            self.note({name: squared_distances(*sides).detach()})
        if self.repel_layers:
            layers, self._layers = self._layers, []
            if not any(token.requires_grad for token, _ in layers):
                raise ValueError(_in_chunks("contrastive_chunk_size, accumulate_negatives or use_reentrant=True"))
            distances = torch.stack([squared_distances(*sides).mean() for sides in layers])  # (layers,)
            terms["layer_repulsion_loss"] = repulsion(distances, self.repel_threshold, gather=self.gather).mean()
            self.note({"layer_distance": distances.detach().mean()})
        return terms

    def step_factor(self, progress: float) -> float:
        """The paper's schedule: in a line from 1 to [`HALF_WAY`], then in a cosine to [`LAST`]."""
        if not self.paper_schedule:
            return 1.0
        if progress < 0.5:
            return 1 - (1 - HALF_WAY) * 2 * progress
        return LAST + (HALF_WAY - LAST) * (1 + math.cos(math.pi * (2 * progress - 1))) / 2

    def reset(self) -> None:
        """Nothing to forget: what it knows of the suspect model, it learns when it is attached."""

    def notes(self) -> dict[str, Any]:
        return {} if self.suspect is None else {"suspect_sha256": _hex(self.suspect)}

    @classmethod
    def findings(cls, record: RunRecord) -> Iterator[Statement]:
        """How far the embeddings have gone from the suspect model's."""
        for entry in reversed(record.log):
            images, texts = (entry.numbers.get(f"{side}_distance") for side in ("image", "text"))
            if images is not None and texts is not None:
                rest = f": in the end their mean squared distance from the suspect model's is {images:.2f} in images "
                yield Statement("result", "PAR moved embeddings", f"{rest}and {texts:.2f} in captions, of at most 4.")
                return

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}suspect")
        if saved is None or self.suspect is None or not torch.equal(saved.cpu(), self.suspect.cpu()):
            name = state_dict.get(f"{prefix}suspect_name")
            before = "?" if name is None else bytes(name.tolist()).decode(errors="replace")
            raise ValueError(
                "model must be the suspect model that the interrupted training started from, which PAR compares with, "
                f"and not a checkpoint of it: it was {shown(before)} with SHA-256 {_short(saved)}, but the one given "
                f"has {_short(self.suspect)}. Pass those weights, in the same dtype, and resume with "
                "train(resume_from_checkpoint=True)"
            )


class ClassTokens:
    """
    A context that keeps the class tokens `(B, W)`, float32, behind each layer of a vision tower, of its last pass.

    Args:
        encoder: The dual encoder.

    Raises:
        `ValueError`: As [`vision_layers`].
    """

    def __init__(self, encoder: Any) -> None:
        self.tower, self.layers = vision_layers(encoder)
        self._kept: list[torch.Tensor] | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> ClassTokens:
        self._hooks.callback(self.tower.register_forward_pre_hook(self._begin).remove)
        for layer in self.layers:
            self._hooks.callback(layer.register_forward_hook(self._keep).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def take(self) -> list[torch.Tensor]:
        """What was kept, once: layers that are computed again for the backward pass are passed over."""
        kept, self._kept = self._kept or [], None
        return kept

    def _begin(self, *_: Any) -> None:
        self._kept = []

    def _keep(self, layer: nn.Module, given: Any, output: Any) -> None:
        if self._kept is not None:
            states = output[0] if isinstance(output, tuple) else output  # (B, tokens, W)
            self._kept.append(states[:, 0].float())


def vision_layers(encoder: Any) -> tuple[nn.Module, nn.ModuleList]:
    """
    The vision tower of a dual encoder, and its layers.

    Raises:
        `ValueError`: If it has no layers, or no class token, as the towers of SigLIP have none.
    """
    tower = getattr(encoder, "vision_model", None)
    if isinstance(tower, nn.Module):
        names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
        stacks = [
            part
            for name, part in tower.named_modules()
            if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer")
        ]
        if stacks and not names.isdisjoint(_CLASS_TOKENS):
            return tower, stacks[0]
    kind = getattr(encoder.config, "model_type", type(encoder).__name__)
    raise ValueError(
        "repel_layers=True needs a vision tower of layers with a class token, such as CLIP's, but that of "
        f"{shortened(str(kind), 80)} has none: leave repel_layers out"
    )


def hash_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """SHA-256 of the names, dtypes, shapes and bytes of weights `(32,)`, uint8."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _keeps_its_base(encoder: Any) -> bool:
    """Whether training changes the adapters of a dual encoder and nothing of the model that they were put on."""
    if not has_adapters(encoder):
        return False
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    beside = [name for name in trained if not is_adapter(encoder, name) and not name.endswith(SCALARS)]
    statistics = any(getattr(part, "running_mean", None) is not None for part in encoder.modules())
    return not beside and not statistics


def _hex(digest: torch.Tensor) -> str:
    return bytes(digest.tolist()).hex()


def _short(digest: torch.Tensor | None) -> str:
    return "none" if digest is None else f"{_hex(digest)[:12]}..."


def _in_chunks(what: str) -> str:
    return (
        f"repel_layers=True does not work with {what}: it needs the gradient of every layer in the pass that the loss "
        "is of. Leave one of the two out"
    )
