"""Whether a backdoor comes back: a cleaned model under plain fine-tuning on clean pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_robust_clip import AttackSuccessEvaluator, PoisonSuccessEvaluator, ZeroShotEvaluator
from hf_robust_clip.cli.rows import row_trainer

from .attack import Planted
from .material import Material
from .study import Study

#: Steps, and between how many of them the model is measured.
REBOUND = {"steps": 300, "every": 50}


def rebound(
    study: Study,
    model: Any,
    processor: Any,
    material: Material,
    planted: Planted,
    folder: Path,
    seed: int,
    learning_rate: float,
) -> dict[str, Any] | None:
    """
    Fine-tune a measured model plainly, on other clean pairs than it was cleaned on where the data has such.

    Args:
        study ([`Study`]): Gives the settings of plain fine-tuning.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): Cleaned; the model is changed.
        material ([`Material`]), planted ([`Planted`]): The pairs and what is measured.
        folder (`Path`): Of the trainer; nothing is kept in it.
        seed (`int`), learning_rate (`float`): Of the training.

    Returns:
        `dict`: `steps`, and as many `accuracy` and `success`, fractions in [0, 1]; `pairs`, `"other"` or `"same"`.
        `None` for an attack whose success is not a share of images.
    """
    evaluators = [
        evaluator
        for evaluator in planted.evaluators
        if isinstance(evaluator, AttackSuccessEvaluator | PoisonSuccessEvaluator | ZeroShotEvaluator)
    ]
    for evaluator in evaluators:
        if isinstance(evaluator, AttackSuccessEvaluator):
            evaluator.placebos = []
    if len(evaluators) < 2:
        return None
    pairs = material.later if material.later is not None else material.clean or material.pairs
    settings: dict[str, Any] = {
        "image_column": study.image_column,
        "caption_column": study.caption_column,
        **study.row_arguments("plain"),
        "learning_rate": learning_rate,
        "max_steps": REBOUND["steps"],
        "eval_strategy": "steps",
        "eval_steps": REBOUND["every"],
        "per_device_eval_batch_size": 256,
    }
    set_seed(seed)
    trainer = row_trainer(
        "clip",
        folder / "rebound",
        seed,
        settings,
        study.row_augmentation("plain"),
        model=model,
        train_dataset=pairs,
        processing_class=processor,
        evaluators=evaluators,
    )
    trainer.train()
    course = [entry for entry in trainer.state.log_history if f"eval_{planted.success}" in entry]
    return {
        "pairs": "same" if material.later is None else "other",
        "steps": [int(entry["step"]) for entry in course],
        "accuracy": [round(entry["eval_clean_accuracy"], 6) for entry in course],
        "success": [round(entry[f"eval_{planted.success}"], 6) for entry in course],
    }
