"""The demo's trainers, and what they noted down while they trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from ..augment.images import ImageAugmentation
from ..trainers.defended import TRAINERS
from ..trainers.trainer import CLIPTrainer
from .demo_recipe import Recipe
from .progress import follow

EVALUATION_BATCH = 256
#: The models that start from the poisoned one, on clean pairs; the others start anew, on poisoned pairs.
FINE_TUNED = ("finetuned", "cleanclip")
#: What is kept of RoCLIP's log of an epoch; the last four are there in epochs with matching steps only.
MATCHING_FIELDS = (
    "clean_pair_similarity",
    "poisoned_pair_similarity",
    "distinct_matches",
    "largest_match_share",
    "match_similarity",
    "poisoned_match_adversarial",
)


def make_trainer(name: str, recipe: Recipe, folder: Path, seed: int, **shared: Any) -> CLIPTrainer:
    """
    The trainer of one of the demo's models.

    Args:
        name (`str`): Of the model, as in `DEFENCES`.
        recipe ([`Recipe`]): The numbers.
        folder (`Path`): The trainer's output folder.
        seed (`int`): Of training.
        **shared: What the trainer gets beside its arguments and augmentations: model, data, evaluators.
    """
    settings = _settings(name, recipe, folder, seed)
    shared = {**shared, "image_augmentation": _image_augmentation(name, recipe)}
    if name == "cleanclip":
        settings["unimodal_weight"] = recipe.unimodal_weight
    elif name == "roclip":
        settings |= {
            "pool_size": recipe.roclip_pool_size,
            "steps_per_matching_epoch": recipe.roclip_matching_steps,
            "matching_start_epoch": _matching_start(recipe, len(shared["train_dataset"])),
            "match_every_n_epochs": recipe.roclip_match_every_n_epochs,
            "matching": recipe.roclip_matching,
            "adversarial_phrase": recipe.target,
        }
    elif name == "safeclip":
        settings |= {
            "warmup_unimodal_epochs": recipe.safeclip_warmup_unimodal_epochs,
            "warmup_cross_epochs": recipe.safeclip_warmup_cross_epochs,
            "warmup_cross_learning_rate": recipe.safeclip_warmup_cross_learning_rate,
            "safe_threshold": recipe.safeclip_threshold,
            "safe_growth": recipe.safeclip_growth,
            "safe_cap": recipe.safeclip_cap,
            "unimodal_pool_size": recipe.safeclip_pool_size,
        }
    trainer_class = TRAINERS.get(name, CLIPTrainer)
    trainer = trainer_class(args=trainer_class.args_class(**settings), **shared)
    trainer.remove_callback(PrinterCallback)  # prints each log as a dictionary
    # What the steps print tells enough, unless one takes minutes.
    follow(trainer, {"eval_clean_accuracy": "clean", "eval_attack_success_rate": "ASR"}, indent="  ", brief=True)
    return trainer


def _matching_start(recipe: Recipe, pairs: int) -> int:
    """RoCLIP's first matching epoch, counted in what it alternates in."""
    if recipe.roclip_matching_steps is None:
        return recipe.roclip_matching_start_epoch
    steps = recipe.roclip_matching_start_epoch * (pairs // recipe.batch_size)
    return round(steps / recipe.roclip_matching_steps)


def _settings(name: str, recipe: Recipe, folder: Path, seed: int) -> dict[str, Any]:
    fine_tuning = name in FINE_TUNED
    text_presets = {"cleanclip": recipe.text_preset, "poisoned": "identity", "finetuned": "identity"}
    return {
        "output_dir": str(folder),
        "num_train_epochs": recipe.finetune_epochs if fine_tuning else recipe.pretrain_epochs,
        "learning_rate": recipe.finetune_learning_rate if fine_tuning else recipe.pretrain_learning_rate,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": EVALUATION_BATCH,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": recipe.adam_beta2,
        "warmup_steps": recipe.warmup_steps,
        "lr_scheduler_type": "cosine",
        "text_preset": text_presets.get(name, recipe.defence_text_preset),
        "eval_strategy": "epoch",
        "eval_on_start": True,
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def _image_augmentation(name: str, recipe: Recipe) -> ImageAugmentation | None:
    if name in ("poisoned", "finetuned"):
        return None
    prefix = "image" if name == "cleanclip" else "defence_image"
    preset, flip, noise, noise_std = (
        getattr(recipe, f"{prefix}_{field}") for field in ("preset", "flip", "noise", "noise_std")
    )
    return ImageAugmentation(preset, flip=flip, noise=noise, noise_std=noise_std)


def matching_record(log_history: list[dict[str, float]]) -> list[dict[str, Any]]:
    """RoCLIP's epochs, from 1: whether it had matching steps, and what its log says of pairs and matches."""
    return [
        {
            "epoch": round(entry["epoch"]),
            "matching": "match_similarity" in entry,
            **{name: _finite(entry[name]) for name in MATCHING_FIELDS if name in entry},
        }
        for entry in log_history
        if "loss" in entry
    ]


def _finite(value: float) -> float | None:
    """The value, or `None` where JSON has no number for it."""
    return float(value) if math.isfinite(value) else None
