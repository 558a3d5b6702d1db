"""A pair that is contrasted with no other has a constant loss: refused in training, and of no evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import digits, make_trainer

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer
from hf_robust_clip.batch import encode_pairs
from hf_robust_clip.losses import clip_loss

ACCUMULATED = {"accumulate_negatives": True, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("cls", "options", "found"),
    [
        *((cls, {}, "batch_size=1 contrasts") for cls in (CLIPTrainer, CleanCLIPTrainer, RoCLIPTrainer)),
        (SafeCLIPTrainer, {}, "per_device_train_batch_size=1 contrasts each pair with no other"),
        (CLIPTrainer, {"gradient_accumulation_steps": 8}, "per_device_train_batch_size=1 contrasts"),
        (SafeCLIPTrainer, ACCUMULATED, "per_device_train_batch_size=1 contrasts"),
        (CLIPTrainer, {**ACCUMULATED, "rows": 9}, "train_dataset has 9 rows.*: add a row"),
        (
            CLIPTrainer,
            {"rows": 9, "per_device_train_batch_size": 8, "dataloader_drop_last": False},
            "train_dataset has 9 rows, so that the last step .* one pair with no other: leave out a row",
        ),
        (CLIPTrainer, {"train_dataset": digits().select(range(8)).to_iterable_dataset(), "max_steps": 1}, "=1 contr"),
    ],
)
def test_batches_of_one_pair_are_refused(
    cls: type[CLIPTrainer], options: dict[str, Any], found: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=found):
        make_trainer(cls, tmp_path, **{"per_device_train_batch_size": 1, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, **ACCUMULATED, "rows": 10},
        {"per_device_train_batch_size": 2, "contrastive_chunk_size": 1, "rows": 5},
        {"per_device_train_batch_size": 4, "dataloader_drop_last": False, "rows": 10},
        # The last batch has one row, and is contrasted with the batch before it.
        {**ACCUMULATED, "per_device_train_batch_size": 4, "dataloader_drop_last": False, "rows": 9},
    ],
)
def test_what_contrasts_every_pair_trains(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, num_train_epochs=1, **options)
    trainer.train()
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_a_batch_size_that_is_found_does_not_fall_to_one(tmp_path: Path) -> None:
    class OutOfMemory(CLIPTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("CUDA out of memory.")

    trainer = make_trainer(OutOfMemory, tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="per_device_train_batch_size=1 contrasts each pair with no other"):
        trainer.train()


def test_a_stream_leaves_out_a_last_batch_of_one_row(tmp_path: Path) -> None:
    stream = digits().select(range(9)).to_iterable_dataset()
    trainer = make_trainer(CLIPTrainer, tmp_path, train_dataset=stream, max_steps=6, dataloader_drop_last=False)
    trainer.args.logging_steps = 1
    trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("cls", [CleanCLIPTrainer, SafeCLIPTrainer])
def test_the_evaluation_loss_is_that_of_all_rows_at_once(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    test = digits("test").select(range(11))
    found = []
    for size, options in (
        (1, {}),
        (3, {"eval_accumulation_steps": 1}),
        (5, {"eval_do_concat_batches": False}),
        (64, {}),
    ):
        trainer = make_trainer(cls, tmp_path, eval_dataset=test, per_device_eval_batch_size=size, **options)
        found += [trainer.evaluate()["eval_loss"], trainer.predict(test).metrics["test_loss"]]
    (batch,) = trainer.get_eval_dataloader()  # of the last size
    with torch.no_grad():
        embeddings = encode_pairs(trainer.model.eval(), trainer._prepare_inputs(batch).inputs)
        expected = clip_loss(*embeddings, trainer.model.logit_scale.exp()).item()
    assert len(embeddings.image_embeds) == 11 and expected > 1
    assert found == pytest.approx([expected] * len(found), rel=1e-5)


def test_the_evaluation_loss_of_a_stream_is_that_of_its_rows(tmp_path: Path) -> None:
    test = digits("test").select(range(11))
    losses = [
        make_trainer(CLIPTrainer, tmp_path, eval_dataset=data, per_device_eval_batch_size=size).evaluate()["eval_loss"]
        for data, size in ((test, 8), (test.to_iterable_dataset(), 8), (test.to_iterable_dataset(), 5))
    ]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_an_evaluation_of_one_row_is_refused(tmp_path: Path) -> None:
    row = digits("test").select([0])
    with pytest.raises(ValueError, match=r"eval_dataset\['few'\] has one row"):
        make_trainer(CLIPTrainer, tmp_path, eval_dataset={"many": digits("test"), "few": row})
    for data in (row, row.to_iterable_dataset()):
        with pytest.raises(ValueError, match="eval_dataset has one row"):
            make_trainer(CLIPTrainer, tmp_path).evaluate(data)


def test_weights_of_zero_that_leave_no_loss_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip_weight and unimodal_weight are both 0"):
        make_trainer(CleanCLIPTrainer, tmp_path, clip_weight=0, unimodal_weight=0)
