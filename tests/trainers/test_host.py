"""A step never waits for the device to learn a value, but where a look-up in a pool must."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SHORT, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

import hf_robust_clip
from hf_robust_clip import CLIPTrainer, CLIPTrainingArguments, SafeCLIPTrainer

PACKAGE = Path(hf_robust_clip.__file__).parent
#: What hands a value of a tensor, or a size that depends on values, to Python.
WAITING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.masked_select", "aten.equal")


class Waits(TorchDispatchMode):
    """Counts such operations by the file of ours, or of the Trainer, that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(operation).startswith(WAITING):
            for frame in reversed(traceback.extract_stack()):
                path = Path(frame.filename)
                if PACKAGE in path.parents or path.name in ("trainer.py", "masking_utils.py"):
                    self.files[path.name] = self.files.get(path.name, 0) + 1
                    break
        return operation(*args, **(kwargs or {}))


# The step in chunks is one for all trainers; SafeCLIP's has both kinds of batches, and looks up.
@pytest.mark.parametrize(
    ("cls", "given"),
    [*((cls, {}) for cls in SHORT), (SafeCLIPTrainer, {"contrastive_chunk_size": 3})],
    ids=[*(cls.__name__ for cls in SHORT), "SafeCLIPTrainer, in chunks"],
)
def test_nothing_waits_for_the_device(
    cls: type[CLIPTrainer], given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits()
    step = Trainer.training_step if not given else cls.training_step
    owner = Trainer if not given else CLIPTrainer

    def counted(*args: Any, **kwargs: Any) -> Any:
        with waits:
            return step(*args, **kwargs)

    monkeypatch.setattr(owner, "training_step", counted)
    trainer = make_trainer(cls, tmp_path, rows=32, logging_steps=100, image_augmentation="weak", **given)
    trainer.train()
    # transformers looks whether a mask of the captions masks anything.
    waits.files.pop("masking_utils.py", None)
    # Two pools are made, in the first step.
    assert waits.files.pop("pool.py", 0) <= 4 < trainer.state.global_step
    assert not waits.files


def test_a_loss_that_is_not_finite_is_logged_where_training_goes_on(tmp_path: Path) -> None:
    class Broken(CLIPTrainer):
        def loss_components(self, views: Any, scale: Any, batch: Any) -> Any:
            terms = super().loss_components(views, scale, batch)
            return {name: term * float("nan") for name, term in terms.items()}

    trainer = make_trainer(Broken, tmp_path, max_steps=2, stop_on_non_finite=False)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss != loss for loss in losses)
    assert trainer.record().to_json().count('"loss": null') == 2


@pytest.mark.parametrize("accelerator", [True, False])
def test_batches_move_to_the_device_without_waiting(
    accelerator: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    for given, expected in (({}, accelerator), ({"accelerator_config": {"even_batches": False}}, False)):
        args = CLIPTrainingArguments(str(tmp_path), **given)
        assert (args.accelerator_config.non_blocking, args.dataloader_pin_memory) == (expected, accelerator)
