"""A run that is resumed from any of its checkpoints ends in the same bits as one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import assert_same_bits, make_trainer, train_and_resume

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer


@pytest.mark.parametrize("cls", [CLIPTrainer, CleanCLIPTrainer])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [3, 8], ids=["mid-epoch", "boundary"])
def test_resumed_equals_uninterrupted(cls: type[CLIPTrainer], workers: int, step: int, tmp_path: Path) -> None:
    # 64 pairs in batches of 8: eight steps an epoch, three epochs.
    whole, resumed = train_and_resume(cls, tmp_path, step, dataloader_num_workers=workers)
    assert_same_bits(whole, resumed)


def test_resumed_within_accumulation_and_persistent_workers(tmp_path: Path) -> None:
    whole, resumed = train_and_resume(
        CleanCLIPTrainer,
        tmp_path,
        step=3,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=4,
    )
    assert_same_bits(whole, resumed)


def test_views_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    weights = []
    for workers in (0, 2):
        trainer = make_trainer(CleanCLIPTrainer, tmp_path / str(workers), dataloader_num_workers=workers)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_epochs_draw_different_views_and_seeds_different_runs(tmp_path: Path) -> None:
    trainers = [make_trainer(CleanCLIPTrainer, tmp_path / str(seed), seed=seed, max_steps=2) for seed in (0, 1)]
    for trainer in trainers:
        trainer.train()
    first, second = (trainer.model.state_dict() for trainer in trainers)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    make_trainer(CLIPTrainer, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    other = make_trainer(CleanCLIPTrainer, tmp_path, max_steps=4)
    with pytest.raises(ValueError, match="its trainer was CLIPTrainer, but is CleanCLIPTrainer"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpoint_of_another_dataset_length_is_refused(tmp_path: Path) -> None:
    make_trainer(CLIPTrainer, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    other = make_trainer(CLIPTrainer, tmp_path, rows=32, max_steps=4)
    with pytest.raises(ValueError, match="number of rows of train_dataset was 64, but is 32"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_save_only_model_leaves_no_training_state(tmp_path: Path) -> None:
    make_trainer(CLIPTrainer, tmp_path, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"optimizer.pt", "robust_clip_state.safetensors"}
