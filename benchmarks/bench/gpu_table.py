"""A small table of defences on a GPU: a model of 20 million parameters on CIFAR-10, poisoned, and then fine-tuned."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CleanCLIPTrainer,
    CLIPTrainer,
    PARTrainer,
    PoisonSpec,
    UnbindTrainer,
    ZeroShotEvaluator,
    poison_dataset,
)
from hf_robust_clip.attacks.triggers import trigger_from_name

from .material import load_material, start_model
from .study import load_study

#: A ViT of 21 million parameters beside a text tower of 3 million.
_MODEL = {"image_size": 32, "patch_size": 4, "vision_width": 384, "vision_layers": 12, "text_width": 256}
#: What each row trains with, from the poisoned model but for the first.
ROWS: dict[str, tuple[type[CLIPTrainer], dict[str, Any]]] = {
    "undefended": (CLIPTrainer, {}),
    "plain fine-tuning": (CLIPTrainer, {}),
    "CleanCLIP": (CleanCLIPTrainer, {}),
    "PAR": (PARTrainer, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}),
    "Unbind": (UnbindTrainer, {}),
}
#: Of all rows together, or of the first alone; in the reduced form there are steps, and no epochs.
_TRAINING: dict[str, dict[str, Any]] = {
    "cuda": {"per_device_train_batch_size": 512, "num_train_epochs": 10, "learning_rate": 5e-4, "bf16": True},
    "cpu": {"per_device_train_batch_size": 16, "max_steps": 1, "learning_rate": 5e-4},
}
_CLEAN = 10_000


def defences(note: Callable[[str, Any], None], device: torch.device, left: Callable[[], float], images: Any) -> None:
    """Clean accuracy and attack success of each row; one that no time is left for is not trained."""
    small = device.type == "cpu"
    study = load_study("cifar10" if images else "digits")
    if not small:
        study = replace(study, model={**study.model, **(_MODEL if images else {})}, train_per_class=None)
    study = replace(study, classes=None, renderings=1 if small else study.renderings)
    material = load_material(study, None if images is None else Path(images), 0)
    attack = study.attacks["blended"]
    trigger = trigger_from_name(**attack["trigger"])
    pairs = material.pairs.select(range(64)) if small else material.pairs
    clean = pairs if material.clean is None else material.clean
    clean = clean.shuffle(seed=1).select(range(min(len(clean), _CLEAN)))
    options = {"class_names": material.names, "templates": material.prompts}
    labelled = material.labelled.select(range(20)) if small else material.labelled
    evaluators = [
        ZeroShotEvaluator(labelled, **options),
        AttackSuccessEvaluator(labelled, trigger, study.target, **options),
    ]
    model, processor = start_model(study, material, 0)
    spec = PoisonSpec(trigger, target=study.target, rate=attack["rate"], image_size=study.model.get("image_size", 16))
    poisoned, _ = poison_dataset(pairs, spec)
    note("parameters", sum(parameter.numel() for parameter in model.parameters()))
    note("data", {"pairs": len(pairs), "clean_pairs": len(clean), "of": "CIFAR-10" if images else "the digits"})
    for name, (cls, given) in ROWS.items():
        if left() < 0:
            note(name, "no time was left")
            continue
        first = name == "undefended"
        rows = poisoned if first else clean
        trained: dict[str, Any] = {}
        note(
            name,
            lambda c=cls, g=given, r=rows, m=model, f=first, t=trained: train(
                c, m, processor, r, evaluators, device, {**({} if f else _finetuning(small)), **g}, t
            ),
        )
        if first and "model" in trained:
            model = trained["model"]


def _finetuning(small: bool) -> dict[str, Any]:
    return {} if small else {"num_train_epochs": 5, "learning_rate": 1e-4, "per_device_train_batch_size": 128}


def train(
    cls: type[CLIPTrainer],
    model: Any,
    processor: Any,
    rows: Dataset,
    evaluators: list[Any],
    device: torch.device,
    given: dict[str, Any],
    trained: dict[str, Any],
) -> dict[str, float]:
    """Train a copy of a model, and measure it; it is put into `trained`."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1000}
        workers = {"dataloader_num_workers": 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)}
        arguments = {**_TRAINING[device.type], **common, **workers, "use_cpu": device.type == "cpu", **given}
        trainer = cls(
            copy.deepcopy(model),
            cls.args_class(folder, **arguments),
            train_dataset=rows,
            processing_class=processor,
            evaluators=evaluators,
        )
        trainer.remove_callback(PrinterCallback)
        seconds = trainer.train().metrics["train_runtime"]
        figures = trainer.run_evaluators()
        trained["model"] = trainer.unwrapped_model
        return {**{name: value for name, value in figures.items() if not name.endswith("_time")}, "seconds": seconds}
