"""Scores are the cosines of the pairs as the model sees them in evaluation, one for each row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import broken, digits, make_trainer

from hf_robust_clip import SafeCLIPTrainer
from hf_robust_clip.data.digits import digit_processor

ROWS = 19


def by_hand(trainer: Any, images: Any, captions: Any) -> np.ndarray:
    """Cosines from the model's own forward pass, un-augmented."""
    model = trainer.model.eval()
    inputs = digit_processor()(images=list(images), text=list(captions), return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs)
    return torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds).numpy()


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return make_trainer(SafeCLIPTrainer, tmp_path, rows=ROWS)


def test_scores_are_the_cosines_of_the_pairs_as_they_are(trainer: Any) -> None:
    data = trainer.train_dataset
    scores = trainer.score_pairs(epoch=2)
    assert scores.similarities.dtype == np.float32
    np.testing.assert_allclose(scores.similarities, by_hand(trainer, data["image"], data["caption"]), atol=1e-5)


def test_scores_do_not_depend_on_batches_or_workers(trainer: Any) -> None:
    trainer.args.per_device_eval_batch_size = ROWS
    whole = trainer.score_pairs(epoch=2).similarities
    trainer.args.per_device_eval_batch_size = 5
    trainer.args.dataloader_num_workers = 2
    np.testing.assert_allclose(trainer.score_pairs(epoch=2).similarities, whole, atol=1e-6)


@pytest.mark.parametrize("augmented", [False, True])
def test_global_generators_and_modes_are_left_alone(augmented: bool, trainer: Any) -> None:
    trainer.model.train()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    trainer.score_pairs(epoch=2, augmented=augmented)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1][1])
    assert random.getstate() == states[2]
    assert all(module.training for module in trainer.model.modules())
    trainer.model.eval()
    trainer.score_pairs(epoch=2, augmented=augmented)
    assert not any(module.training for module in trainer.model.modules())


def test_augmented_scores_are_drawn_anew_each_epoch(trainer: Any) -> None:
    plain = trainer.score_pairs(epoch=2).similarities
    drawn = [trainer.score_pairs(epoch=epoch, augmented=True).similarities for epoch in (2, 2, 3)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2], atol=1e-4)
    assert not np.allclose(drawn[0], plain, atol=1e-4)


def test_unusable_rows_have_no_score(tmp_path: Path) -> None:
    data = broken().add_column("poisoned", [True] * 12 + [False] * 12)
    trainer = make_trainer(SafeCLIPTrainer, tmp_path, train_dataset=data, on_bad_row="skip")
    scores = trainer.score_pairs(epoch=0)
    usable = [row for row in range(24) if row not in (3, 17)]
    assert np.flatnonzero(np.isnan(scores.similarities)).tolist() == [3, 17]
    kept = digits().select(usable)
    expected = by_hand(trainer, kept["image"], kept["caption"])
    np.testing.assert_allclose(scores.similarities[usable], expected, atol=1e-5)
    assert scores.poisoned.tolist() == [row < 12 and row != 3 for row in range(24)]


def test_poison_flags_are_those_of_the_dataset(tmp_path: Path) -> None:
    flags = [row % 5 == 1 for row in range(ROWS)]
    data = digits().select(range(ROWS)).add_column("poisoned", flags)
    assert make_trainer(SafeCLIPTrainer, tmp_path, train_dataset=data).score_pairs(0).poisoned.tolist() == flags


def test_poison_flags_are_unknown_without_the_column(trainer: Any) -> None:
    assert trainer.score_pairs(epoch=0).poisoned is None


@pytest.mark.parametrize("epoch", [2, 3])
def test_of_several_captions_the_one_of_this_epochs_training_is_scored(epoch: int, tmp_path: Path) -> None:
    rows = digits().select(range(32))
    captions = [[caption, f"{number} in grey"] for number, caption in enumerate(rows["caption"])]
    data = rows.remove_columns("caption").add_column("caption", captions)
    trainer = make_trainer(SafeCLIPTrainer, tmp_path, train_dataset=data, text_augmentation="identity")
    trainer.data_collator.set_epoch(epoch)
    drawn: dict[int, str] = {}
    for batch in trainer.get_train_dataloader():
        texts = trainer.processing_class.tokenizer.batch_decode(
            batch["input_ids"][: len(batch["row_index"])], skip_special_tokens=True
        )
        drawn |= dict(zip(batch["row_index"].tolist(), texts, strict=True))
    seen = sorted(drawn)
    assert len({drawn[row].endswith("in grey") for row in seen}) == 2
    expected = by_hand(trainer, data.select(seen)["image"], [drawn[row] for row in seen])
    np.testing.assert_allclose(trainer.score_pairs(epoch).similarities[seen], expected, atol=1e-5)


def test_half_precision_scores_are_close(tmp_path: Path) -> None:
    full = make_trainer(SafeCLIPTrainer, tmp_path, rows=ROWS)
    half = make_trainer(SafeCLIPTrainer, tmp_path, rows=ROWS, bf16=True)
    half.model = half.accelerator.prepare_model(half.model)  # as train() does
    one, two = (trainer.score_pairs(epoch=0).similarities for trainer in (full, half))
    np.testing.assert_allclose(one, two, atol=0.02)
    assert not np.array_equal(one, two)
