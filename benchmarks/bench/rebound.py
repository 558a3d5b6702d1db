"""Whether a backdoor comes back: a cleaned model under plain fine-tuning on clean pairs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_robust_clip import AttackSuccessEvaluator, PoisonSuccessEvaluator, ZeroShotEvaluator
from hf_robust_clip.cli.measuring import device_of
from hf_robust_clip.cli.rows import row_trainer
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.trainers.checkpoints import checkpoints_in

from .attack import Planted
from .material import Material
from .study import Study, digest

#: Steps, and between how many of them the model is measured.
REBOUND = {"steps": 300, "every": 50}


def rebound(
    study: Study,
    cleaned: Path,
    material: Material,
    planted: Planted,
    seed: int,
    learning_rate: float,
    keep: bool = False,
) -> dict[str, Any] | None:
    """
    Fine-tune a cleaned model plainly, on other clean pairs than it was cleaned on where the data has such.

    Args:
        study ([`Study`]): Gives the settings of plain fine-tuning.
        cleaned (`Path`): The folder of the model and its processor.
        material ([`Material`]), planted ([`Planted`]): The pairs and what is measured.
        seed (`int`), learning_rate (`float`): Of the training.
        keep (`bool`): Whether the checkpoints stay in the folder, for what else is measured of them.

    Returns:
        `dict`: `steps`, and as many `accuracy` and `success`, fractions in [0, 1]; `pairs`, `"other"` or `"same"`.
        `None` for an attack whose success is not a share of images.
    """
    measured = AttackSuccessEvaluator | PoisonSuccessEvaluator | ZeroShotEvaluator
    evaluators = [evaluator for evaluator in planted.evaluators if isinstance(evaluator, measured)]
    for evaluator in evaluators:
        if isinstance(evaluator, AttackSuccessEvaluator):
            evaluator.placebos = []
    if len(evaluators) < 2:
        return None
    folder = cleaned / f"rebound-{digest([REBOUND, learning_rate])}"
    processor = load_processor(cleaned, None)
    if len(checkpoints_in(folder)) < REBOUND["steps"] // REBOUND["every"]:
        _train(study, load_dual_encoder(cleaned), processor, material, folder, seed, learning_rate)
    course: dict[str, Any] = {"steps": [], "accuracy": [], "success": []}
    for checkpoint in checkpoints_in(folder):
        model = load_dual_encoder(checkpoint).to(device_of(None))
        figures = run_evaluators(evaluators, processor, Embedder(model, processor, batch_size=256))
        course["steps"].append(int(checkpoint.name.split("-")[1]))
        course["accuracy"].append(round(figures["clean_accuracy"], 6))
        course["success"].append(round(figures[planted.success], 6))
    if not keep:
        shutil.rmtree(folder)
    return {"pairs": "same" if material.later is None else "other", **course}


def _train(
    study: Study, model: Any, processor: Any, material: Material, folder: Path, seed: int, learning_rate: float
) -> None:
    """Leave the checkpoints of plain fine-tuning in a folder."""
    settings: dict[str, Any] = {
        "image_column": study.image_column,
        "caption_column": study.caption_column,
        **study.row_arguments("plain"),
        "learning_rate": learning_rate,
        "max_steps": REBOUND["steps"],
        "save_strategy": "steps",
        "save_steps": REBOUND["every"],
        "save_only_model": True,
    }
    pairs = material.later if material.later is not None else material.clean or material.pairs
    set_seed(seed)
    parts = {"model": model, "train_dataset": pairs, "processing_class": processor}
    row_trainer("clip", folder, seed, settings, study.row_augmentation("plain"), **parts).train()
