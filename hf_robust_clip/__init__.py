"""Train and fine-tune CLIP models that resist data poisoning and backdoors, on the Hugging Face stack."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: Public name -> module that defines it. Modules load when a name is first used: importing the trainers takes seconds.
_PUBLIC = {
    "AttackSuccessEvaluator": "evaluation.attack_success",
    "BlendedTrigger": "attacks.triggers",
    "CLIPDataCollator": "data.collator",
    "CLIPTrainer": "trainers.base",
    "CLIPTrainingArguments": "trainers.arguments",
    "CleanCLIPTrainer": "trainers.cleanclip",
    "CleanCLIPTrainingArguments": "trainers.arguments",
    "FeaturePool": "pool",
    "ImageAugmentation": "augment.images",
    "LinearProbeEvaluator": "evaluation.linear_probe",
    "PairSimilarityCallback": "callbacks",
    "PatchTrigger": "attacks.triggers",
    "PoisonSpec": "attacks.spec",
    "PoisonSuccessEvaluator": "evaluation.poison_success",
    "RetrievalEvaluator": "evaluation.retrieval",
    "RoCLIPTrainer": "trainers.roclip",
    "RoCLIPTrainingArguments": "trainers.arguments",
    "SafeCLIPTrainer": "trainers.safeclip",
    "SafeCLIPTrainingArguments": "trainers.arguments",
    "SinusoidTrigger": "attacks.triggers",
    "TextAugmentation": "augment.text",
    "TextQueryEvaluator": "evaluation.text_query",
    "WarpTrigger": "attacks.triggers",
    "WordTrigger": "attacks.text_triggers",
    "ZeroShotEvaluator": "evaluation.zero_shot",
    "fit_similarity_mixture": "mixture",
    "newest_checkpoint": "trainers.checkpoints",
    "poison_dataset": "attacks.poisoning",
    "poison_stream": "attacks.streaming",
    "prepare_dataset": "data.preparing",
    "replay_manifest": "attacks.poisoning",
    "targeted_specs": "attacks.spec",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
