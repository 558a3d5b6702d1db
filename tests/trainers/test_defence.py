"""A defence of one's own: an object that the trainer calls, whose buffers are its memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import siglip
from support.processes import Aligned
from support.training import assert_same_bits, digits, make_trainer, small_model, training_log
from torch import nn

from hf_robust_clip import CLIPTrainer, CLIPTrainingArguments, Defence, RoCLIPTrainer
from hf_robust_clip.batch import Batch
from hf_robust_clip.data.digits import digit_processor
from hf_robust_clip.defences import DEFENCES, CleanCLIP
from hf_robust_clip.losses import clip_loss, info_nce
from hf_robust_clip.models import scalars_of


class Trimmed(Defence):
    """Without the pairs of a batch that have fitted worst so far (arXiv 1810.11874)."""

    views = ("original", "augmented")

    def __init__(self, rows: int, trim: float = 0.25, start_epoch: int = 1) -> None:
        super().__init__()
        self.trim, self.start_epoch = trim, start_epoch
        self.register_buffer("fit", torch.full((rows,), math.nan))
        self.epochs: list[int] = []

    def forward(self, views: Any, scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        (images, texts), (images_2, texts_2) = views["original"], views["augmented"]
        losses = 0.5 * (
            info_nce(images, texts_2, scale, reduction="none") + info_nce(texts, images_2, scale, reduction="none")
        )
        seen, found = batch.everywhere(batch.rows, losses.detach())
        self.fit[seen] = torch.where(self.fit[seen].isnan(), found, 0.5 * (self.fit[seen] + found))
        kept = len(losses) - int(self.trim * len(losses)) * (self.epoch >= self.start_epoch)
        self.note({"kept": torch.tensor(float(kept))})
        return {"trimmed_loss": losses[self.fit[batch.rows].argsort(stable=True)[:kept]].mean()}

    def begin_epoch(self, epoch: int, score: Any) -> dict[str, float]:
        self.epochs.append(epoch)
        return {"similarity": float(score().similarities.mean())}

    def learning_rate_factor(self, epoch: int) -> float | None:
        return 0.25 if epoch == 0 else None

    def notes(self) -> dict[str, Any]:
        return {"visited": int((~self.fit.isnan()).sum())}


class Memory(nn.Module):
    """A module of a defence with a buffer that the first step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)


class Mean(Defence):
    """With buffers, its own and a module's, that are made in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)
        self.memory = Memory()

    def forward(self, views: Any, scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        (pairs,) = views.values()
        found = pairs.image_embeds.detach().mean(dim=0)
        for holder in (self, self.memory):
            holder.mean = found if holder.mean is None else 0.9 * holder.mean + 0.1 * found
        return {"clip_loss": self.contrast(*pairs, scale, batch)}


def trimmed(folder: Path, rows: int = 32, **overrides: Any) -> CLIPTrainer:
    return make_trainer(CLIPTrainer, folder, rows=rows, defence=Trimmed(rows), **overrides)


def test_it_is_trained_with_logged_saved_and_resumed(tmp_path: Path) -> None:
    whole = trimmed(tmp_path, save_strategy="steps", save_steps=6)
    whole.train()
    assert whole.defence.epochs == [0, 1, 2] and not whole.defence.fit.isnan().any()
    logs = training_log(whole)
    assert [entry["kept"] for entry in logs] == [8.0] * 4 + [6.0] * 8
    assert all(entry["trimmed_loss"] > 0 for entry in logs)
    assert [entry["learning_rate"] for entry in logs][:4] == [2.5e-4] * 4
    assert sum("similarity" in entry for entry in whole.state.log_history) == 3
    assert whole.record().details.model_extra == {"visited": 32}
    resumed = trimmed(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_bits(whole, resumed)


def test_a_second_training_begins_with_the_memory_of_a_first(tmp_path: Path) -> None:
    trainer = trimmed(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.defence.fit.isnan().sum() == 16
    trainer.defence.reset()
    assert trainer.defence.fit.isnan().all()


def test_a_buffer_that_is_made_in_training_is_memory_as_well(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (make_trainer(CLIPTrainer, tmp_path, defence=Mean(), **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(whole, resumed)
    assert torch.equal(whole.defence.mean, resumed.defence.mean)
    assert torch.equal(whole.defence.memory.mean, resumed.defence.memory.mean)
    made = whole.defence.state_dict()
    assert set(made) == {"mean", "memory.mean"}
    for forget in (whole.defence.reset, lambda: whole.defence.load_state_dict({})):  # saved before they were made
        whole.defence.load_state_dict(made)
        forget()
        assert whole.defence.mean is whole.defence.memory.mean is None


def test_chunks_change_nothing_of_it(tmp_path: Path) -> None:
    options = {"text_augmentation": "identity", "image_augmentation": "identity", "max_steps": 2}
    one, two = (trimmed(tmp_path, **options, **given) for given in ({}, {"contrastive_chunk_size": 3}))
    for trainer in (one, two):
        for module in trainer.model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        trainer.train()
    torch.testing.assert_close(one.defence.fit, two.defence.fit, equal_nan=True)


@pytest.mark.parametrize("family", [small_model, siglip])
def test_a_loss_without_the_scalars_gives_them_a_gradient_of_zero(family: Any, tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, defence=Aligned(), model=family())
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(value.grad == 0 for value in scalars_of(trainer.model).values())


def test_what_is_not_a_defence_is_refused(tmp_path: Path) -> None:
    for wrong in (CleanCLIP, "cleanclip", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="defence must be a Defence"):
            make_trainer(CLIPTrainer, tmp_path, defence=wrong)
    with pytest.raises(NotImplementedError, match="Defence defines no forward"):
        make_trainer(CLIPTrainer, tmp_path, defence=Defence()).train()


def test_phases_need_epochs_and_a_schedule_of_steps(tmp_path: Path) -> None:
    stream = digits().select(range(16)).to_iterable_dataset()
    trainer = make_trainer(CLIPTrainer, tmp_path, train_dataset=stream, max_steps=1, defence=Trimmed(16))
    with pytest.raises(ValueError, match="train_dataset has no length, and Trimmed has learning rates by its epochs"):
        trainer.train()
    trainer = trimmed(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch", eval_dataset=digits())
    with pytest.raises(ValueError, match="lr_scheduler_type='reduce_lr_on_plateau' does not work with Trimmed"):
        trainer.train()


def test_a_defence_that_ships_can_be_passed_as_well(tmp_path: Path) -> None:
    passed = make_trainer(CLIPTrainer, tmp_path, defence=CleanCLIP(unimodal_weight=0.5), max_steps=2)
    passed.train()
    assert {"clip_loss", "unimodal_image_loss"} <= training_log(passed)[0].keys()
    assert set(DEFENCES) >= {"clip", "cleanclip", "roclip", "safeclip"}


def test_args_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(RoCLIPTrainer, tmp_path)
    assert CLIPTrainer(trainer.model, processing_class=digit_processor()).args.output_dir == "tmp_trainer"
    assert isinstance(trainer.args, CLIPTrainingArguments)


@pytest.mark.parametrize("blocks", [1 << 24, 20])
def test_info_nce_of_each_query(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_robust_clip.losses._MAX_LOGITS", blocks)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.nn.functional.normalize(torch.randn(9, 5, generator=generator), dim=1) for _ in range(2))
    each = info_nce(queries, keys, 7.0, reduction="none")
    assert each.shape == (9,)
    torch.testing.assert_close(each.mean(), info_nce(queries, keys, 7.0))
    torch.testing.assert_close(clip_loss(queries, keys, 7.0), 0.5 * (each.mean() + info_nce(keys, queries, 7.0)))
    with pytest.raises(ValueError, match="reduction must be"):
        info_nce(queries, keys, 7.0, reduction="sum")
