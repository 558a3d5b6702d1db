"""A loss or a gradient that is not finite stops training before it does harm, and says where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SHORT, broken, make_trainer, poisoned_pairs

from hf_robust_clip import CLIPTrainer, RoCLIPTrainer
from hf_robust_clip.trainers import finite
from hf_robust_clip.trainers.finite import FILE, NonFiniteError


def spoil(trainer: CLIPTrainer, row: int, value: float = float("nan")) -> None:
    """From its next visit on, the image embedding of a row is not finite."""
    loss = trainer.step.loss

    def of_spoiled(views: Any, scale: torch.Tensor, batch: Any) -> torch.Tensor:
        hit = (batch.rows == row)[:, None]
        spoiled = {
            name: view._replace(image_embeds=torch.where(hit, value, view.image_embeds))
            for name, view in views.items()
        }
        return loss(spoiled, scale, batch)

    trainer.step.loss = of_spoiled


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text())


@pytest.mark.parametrize("cls", SHORT)
def test_a_row_whose_embedding_is_not_finite_is_named(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(cls, tmp_path, train_sampling_strategy="sequential", max_steps=8)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    spoil(trainer, row=5)
    with pytest.raises(NonFiniteError, match=r"step \d: .*_loss.* not finite. The embeddings of rows 5 are not"):
        trainer.train()
    report = written(tmp_path)
    assert [5] in report["rows_with_embeddings_not_finite"]
    assert 5 in report["rows"][0] and len(report["rows"][0]) == 8
    assert report["step"] == trainer.state.global_step + 1
    assert set(report["not_finite"]) == {n for batch in report["terms"] for n, v in batch.items() if v == "nan"}
    assert report["parameters_not_finite"] == []
    if report["step"] == 1:  # the update was not made
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_what_the_message_advises_can_be_done(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": 16, "lr_scheduler_type": "constant"}
    trainer = make_trainer(CLIPTrainer, tmp_path, save_strategy="steps", save_steps=1, **options)
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: spoil(trainer, row=5) if trainer.state.global_step else None)
    with pytest.raises(NonFiniteError, match=r"anew with the newest as model, .* or resume it"):
        trainer.train()
    newest = str(max(tmp_path.glob("checkpoint-*")))
    changed = {**options, "learning_rate": 1e-5, "max_grad_norm": 1e-3}
    anew = make_trainer(CLIPTrainer, tmp_path / "anew", model=newest, **{**changed, "rows": 15}, max_steps=1)
    anew.train()
    assert anew.state.log_history[0]["learning_rate"] == 1e-5
    resumed = make_trainer(CLIPTrainer, tmp_path / "resumed", **changed)
    resumed.train(resume_from_checkpoint=newest)
    assert resumed.state.log_history[-2]["learning_rate"] == 1e-3  # that of the checkpoint


def test_a_gradient_that_is_not_finite_is_enough(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2)
    weight = trainer.model.visual_projection.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="step 1: 'gradient_norm' not finite"):
        trainer.train()
    report = written(tmp_path)
    assert len(report["rows"]) == 2  # batches


@pytest.mark.parametrize("given", [{"contrastive_chunk_size": 3}, {"accumulate_negatives": True}])
def test_in_chunks_too(given: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, gradient_accumulation_steps=2, **given)
    spoil(trainer, row=5)
    with pytest.raises(NonFiniteError, match="The embeddings of rows 5 are not"):
        trainer.train()


def test_on_an_accelerator_it_is_seen_later_but_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = finite.FiniteCheck.check
    monkeypatch.setattr(finite.FiniteCheck, "check", lambda self, lag=None: check(self, 2 if lag == 0 else 0))
    trainer = make_trainer(CLIPTrainer, tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    monkeypatch.setattr(trainer, "loss_components", lambda *_: {"clip_loss": torch.tensor(float("nan"))})
    with pytest.raises(NonFiniteError, match="step 1: 'clip_loss'"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_rows_of_a_stream_have_no_numbers(tmp_path: Path) -> None:
    stream = poisoned_pairs(16).to_iterable_dataset()
    trainer = make_trainer(RoCLIPTrainer, tmp_path, train_dataset=stream, max_steps=2, steps_per_matching_epoch=2)
    trainer.loss_components = lambda *_: {"clip_loss": torch.tensor(float("inf"))}  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="clip_loss"):
        trainer.train()
    assert written(tmp_path)["rows"] == [None]


def test_nothing_is_written_of_a_training_that_goes_well(tmp_path: Path) -> None:
    make_trainer(CLIPTrainer, tmp_path, train_dataset=broken(), on_bad_row="skip", max_steps=2).train()
    assert not (tmp_path / FILE).exists()
