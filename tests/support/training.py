"""Short training runs on a few digits, for the tests of the trainers, in this process and in launched ones."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, TrainerState

from hf_robust_clip import (
    CleanCLIPTrainer,
    CLIPTrainer,
    CLIPTrainingArguments,
    PARTrainer,
    RoCLIPTrainer,
    SafeCLIPTrainer,
)
from hf_robust_clip.data.digits import digit_processor, load_digit_pairs
from hf_robust_clip.data.scratch import build_model
from hf_robust_clip.trainers.defended import TRAINERS
from hf_robust_clip.trainers.trainer import STATE_FILE

ARGUMENTS: dict[type[CLIPTrainer], type[CLIPTrainingArguments]] = {cls: cls.args_class for cls in TRAINERS.values()}
#: What makes every phase and both kinds of epoch come up within three epochs.
SHORT: dict[type[CLIPTrainer], dict[str, Any]] = {
    CLIPTrainer: {},
    CleanCLIPTrainer: {},
    PARTrainer: {},
    RoCLIPTrainer: {"pool_size": 24, "matching_start_epoch": 1, "match_every_n_epochs": 2},
    SafeCLIPTrainer: {"unimodal_pool_size": 24, "warmup_unimodal_epochs": 1, "warmup_cross_epochs": 1},
}


@functools.cache
def digits(split: str = "train") -> datasets.Dataset:
    """Every digit of the split once; rendered once a process."""
    return load_digit_pairs(split, renderings=1)


@functools.cache
def _processor() -> CLIPProcessor:
    return digit_processor()


def small_model(seed: int = 0, dropout: float = 0.1) -> CLIPModel:
    """A CLIP for `digit_processor`. With dropout, so that resuming also has to restore the global generator."""
    model = build_model(
        _processor(), vision_width=32, vision_layers=2, text_width=32, text_layers=1, projection_dim=16, seed=seed
    )
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = dropout
    return model


def poisoned_pairs(rows: int) -> datasets.Dataset:
    """The first `rows` digits, every third of which counts as poisoned."""
    return digits().select(range(rows)).add_column("poisoned", [row % 3 == 0 for row in range(rows)])


def broken(rows: int = 24) -> datasets.Dataset:
    """The first digits, two of whose images do not decode."""
    data = digits().select(range(rows)).cast_column("image", datasets.Image(decode=False))
    table = data.to_dict()
    for row in (3, 17):
        table["image"][row] = {"bytes": b"no image", "path": None}
    return datasets.Dataset.from_dict(table, features=data.features).cast_column("image", datasets.Image())


def make_trainer(cls: type[CLIPTrainer], output_dir: Path, rows: int = 64, **overrides: Any) -> CLIPTrainer:
    """A trainer over the first `rows` digits; `overrides` are arguments of the trainer or of its arguments."""
    family = next(base for base in cls.__mro__ if base in SHORT)
    given = {name: overrides.pop(name) for name in inspect.signature(CLIPTrainer).parameters if name in overrides}
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **SHORT.get(family, {}),
    }
    arguments.update(overrides)
    if "model" not in given:
        given["model"] = small_model()
    if "train_dataset" not in given:
        given["train_dataset"] = digits().select(range(rows))
    if "processing_class" not in given:
        # Not a copy: that of a CLIP tokenizer decodes words with their endings.
        given["processing_class"] = digit_processor()
    return cls(args=cls.args_class(str(output_dir), **arguments), **given)


def train_and_resume(
    cls: type[CLIPTrainer], output_dir: Path, step: int, **overrides: Any
) -> tuple[CLIPTrainer, CLIPTrainer]:
    """One run to the end that saves at `step`, and one that resumes there; both trainers, after training."""
    whole = make_trainer(cls, output_dir, save_strategy="steps", save_steps=step, **overrides)
    whole.train()
    resumed = make_trainer(cls, output_dir / "resumed", **overrides)
    resumed.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    return whole, resumed


def outcome(trainer: CLIPTrainer) -> dict[str, Any]:
    """Weights, optimizer state, pools and splits, and what was logged."""
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "state": trainer.training_state(),
        "log": training_log(trainer),
    }


def assert_same_bits(first: CLIPTrainer, second: CLIPTrainer) -> None:
    """Weights, optimizer state, pools, splits and what was logged are equal to the bit."""
    assert_same_outcome(outcome(first), outcome(second))


def assert_same_outcome(first: dict[str, Any], second: dict[str, Any]) -> None:
    """What [`outcome`] gives is equal to the bit."""
    one, two = first["weights"], second["weights"]
    assert all(torch.equal(one[name], two[name]) for name in one)
    for number, state in first["optimizer"].items():
        assert all(torch.equal(value, second["optimizer"][number][name]) for name, value in state.items())
    assert first["log"] == second["log"]
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        torch.testing.assert_close(second["state"][name], value, rtol=0, atol=0, equal_nan=True)


def training_log(trainer: CLIPTrainer) -> list[dict[str, float]]:
    """What was logged at each training step, without what depends on the clock."""
    return [
        {name: value for name, value in entry.items() if name != "pairs_per_second"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def is_whole(checkpoint: Path) -> bool:
    """Whether everything that resuming reads is there and can be read."""
    try:
        for name in ("model.safetensors", STATE_FILE):
            load_file(checkpoint / name)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except Exception:  # whatever a torn file makes of its reader
        return False
    return True


def saved_steps(output_dir: Path) -> list[int]:
    """Those of its checkpoints, in order."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*"))
