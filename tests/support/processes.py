"""Trainings of a few steps that are the same in one process and in several."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig

from hf_robust_clip import (
    CleanCLIPTrainer,
    CLIPTrainer,
    Defence,
    PARTrainer,
    RoCLIPTrainer,
    SafeCLIPTrainer,
    UnbindTrainer,
)
from support.families import siglip
from support.training import make_trainer, small_model

WORLD = 2
#: From the second split on, between a third and two thirds of the pairs are safe.
SPLIT = {"safe_threshold": 0.5, "safe_growth": 0.4, "safe_cap": 0.6}
#: What a few steps take that are the same in one process and in two: the last ones match, or are of both kinds.
TRAINERS: dict[type[CLIPTrainer], dict[str, Any]] = {
    CLIPTrainer: {"rows": WORLD * 8, "max_steps": 1, "learning_rate": 1.0},
    CleanCLIPTrainer: {"rows": WORLD * 8, "max_steps": 1, "learning_rate": 1.0},
    PARTrainer: {"rows": WORLD * 8 * 3, "max_steps": 3, "learning_rate": 0.01, "paper_schedule": False},
    # One perturbation: which image has which is drawn by a process for its own batch.
    UnbindTrainer: {
        "rows": WORLD * 8 * 3,
        "max_steps": 3,
        "learning_rate": 0.01,
        "adversary": "universal",
        "families": "warp=1",
        "redraw": 0.0,
    },
    RoCLIPTrainer: {
        "rows": WORLD * 8 * 3,
        "max_steps": 3,
        "pool_size": 20,
        "matching_start_epoch": 0,
        "matching": "cross",
        "learning_rate": 0.01,
    },
    SafeCLIPTrainer: {
        "rows": WORLD * 8 * 5,
        "max_steps": 8,
        "unimodal_pool_size": 20,
        "warmup_unimodal_epochs": 0,
        "warmup_cross_epochs": 0,
        **SPLIT,
        "learning_rate": 0.01,
    },
}
#: SigLIP, whose loss is the sigmoid one, and a tower that is not trained: in two processes as in one.
OTHERS: dict[str, tuple[type[CLIPTrainer], dict[str, Any]]] = {
    **{f"SigLIP, {cls.__name__}": (cls, {"family": siglip}) for cls in TRAINERS},
    **{f"{tower} frozen": (CLIPTrainer, {"freeze": tower}) for tower in ("vision", "text")},
    "vision frozen, SigLIP": (CLIPTrainer, {"freeze": "vision", "family": siglip}),
}


class Aligned(Defence):
    """A loss that leaves the scale out."""

    def forward(self, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        return {"align_loss": 1 - views["original"].similarities.mean()}


def group_threads() -> list[str]:
    """The threads of process groups in this process, where the system names threads as files."""
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def few_steps(
    cls: type[CLIPTrainer],
    output: Path,
    batch: int,
    checkpoint: Path | None = None,
    family: Callable[[], Any] = small_model,
    **overrides: Any,
) -> CLIPTrainer:
    """After steps of plain SGD without augmentation of images; captions are keyed by row."""
    torch.manual_seed(0)
    given = {**TRAINERS[next(base for base in cls.__mro__ if base in TRAINERS)], **overrides}
    trainer = make_trainer(
        cls,
        output,
        per_device_train_batch_size=batch,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        weight_decay=0.0,
        image_augmentation="identity",
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": given["learning_rate"]}),
        model=family(),
        **given,
    )
    for module in trainer.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def state_of(trainer: CLIPTrainer) -> dict[str, torch.Tensor]:
    """Weights, pools and splits; call it on all ranks."""
    parameters = dict(trainer.model.named_parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(parameters.values()))
    else:
        whole = contextlib.nullcontext()
    with whole:
        weights = {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in parameters.items()}
    return {**weights, **trainer.training_state()}


def assert_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    for name, value in expected.items():
        if name not in ("splits.table", "splits.counts"):
            torch.testing.assert_close(
                # Engines keep the scalars in one dimension.
                *(found[name].reshape(value.shape), value),
                rtol=1e-6,
                atol=2e-6,
                msg=lambda m, n=f"{what}, {name}": f"{n}: {m}",
                check_dtype=False,
            )


def suspects() -> dict[str, dict[str, Any]]:
    """What PAR compares with, and where: adapters turned off, and every layer."""
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["text_projection"])
    return {"PAR, adapters": {"peft_config": adapters}, "PAR, layers": {"repel_layers": True}}


def ranks_agree(trainer: CLIPTrainer) -> bool:
    """Whether weights, pools and splits are the same on all ranks, to the bit."""
    digest = hashlib.sha256()
    for name, value in sorted(state_of(trainer).items()):
        digest.update(name.encode() + value.detach().numpy().tobytes())
    return len(set(gather_object([digest.hexdigest()]))) == 1
