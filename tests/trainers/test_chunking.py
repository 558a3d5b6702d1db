"""Encoding in chunks changes what a step holds in memory, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.recording import RecordedRoCLIP, RecordedSafeCLIP
from support.training import (
    SHORT,
    assert_same_bits,
    make_trainer,
    poisoned_pairs,
    small_model,
    train_and_resume,
    training_log,
)
from transformers import SiglipConfig, SiglipModel, TrainerCallback

from hf_robust_clip import (
    CleanCLIPTrainer,
    CLIPTrainer,
    CLIPTrainingArguments,
    ImageAugmentation,
    RoCLIPTrainer,
    SafeCLIPTrainer,
)
from hf_robust_clip.batch import Embeddings, cut, encode_pairs, split_views
from hf_robust_clip.data.digits import digit_processor
from hf_robust_clip.seeding import derive_seed, forked_rng
from hf_robust_clip.trainers.step import Step, _of_a_kind

ALL = pytest.mark.parametrize("cls", SHORT)
#: Steps so small that all of them are taken at the same weights.
STILL = {"learning_rate": 1e-12, "image_augmentation": "identity", "text_augmentation": "identity"}
#: All phases and kinds of step.
PHASES: dict[type[CLIPTrainer], dict[str, Any]] = {
    SafeCLIPTrainer: {"safe_threshold": 0.5, "safe_growth": 0.4, "safe_cap": 0.6, "num_train_epochs": 4}
}


class Gradients(TrainerCallback):
    """The gradients of each optimizer step, as one vector, before they are clipped."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))


def without_dropout() -> Any:
    model = small_model()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def run(cls: type[CLIPTrainer], folder: Path, **overrides: Any) -> tuple[list[torch.Tensor], CLIPTrainer]:
    gradients = Gradients()
    given = {
        "per_device_train_batch_size": 16,
        "max_grad_norm": 0.0,
        "model": without_dropout(),
        "callbacks": [gradients],
        "train_dataset": poisoned_pairs(64),
        **STILL,
        **PHASES.get(cls, {}),
        **overrides,
    }
    trainer = make_trainer(cls, folder, **given)
    trainer.train()
    return gradients.steps, trainer


def assert_same_gradients(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    assert len(found) == len(expected) > 0
    # Where RoCLIP matches all rows with one entry, what is left of the gradient is what cancels.
    largest = max(step.norm() for step in expected)
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= tolerance * largest


def assert_same_logs(found: CLIPTrainer, expected: CLIPTrainer) -> None:
    for one, two in zip(training_log(found), training_log(expected), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"contrastive_chunk_size": 3}, {"accumulate_negatives": True, "gradient_accumulation_steps": 2}]
)
def test_cache_is_emptied_as_often_as_asked(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied = []
    for place in ("transformers.trainer", "hf_robust_clip.trainers.trainer"):
        monkeypatch.setattr(f"{place}.clear_device_cache", lambda: emptied.append(1))
    make_trainer(CLIPTrainer, tmp_path, max_steps=4, torch_empty_cache_steps=2, **options).train()
    assert len(emptied) == 2


@ALL
def test_gradients_and_logs_are_those_of_the_whole_batch(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    expected, whole = run(cls, tmp_path)
    for size in (5, 16):
        found, chunked = run(cls, tmp_path, contrastive_chunk_size=size)
        assert_same_gradients(found, expected)
        assert_same_logs(chunked, whole)
    terms = {name for entry in training_log(whole) for name in entry}
    assert cls is not RoCLIPTrainer or "image_match_loss" in terms
    assert cls is not SafeCLIPTrainer or {"image_to_text_loss", "unimodal_image_loss", "clip_loss"} <= terms


@pytest.mark.parametrize("cls", [CLIPTrainer, CleanCLIPTrainer])
def test_accumulated_batches_are_one(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    expected, whole = run(cls, tmp_path)
    for size in (None, 3):
        found, spanned = run(
            cls,
            tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            accumulate_negatives=True,
            contrastive_chunk_size=size,
        )
        assert_same_gradients(found, expected)
        assert_same_logs(spanned, whole)


def test_pools_take_in_accumulated_batches_as_one(tmp_path: Path) -> None:
    expected, whole = run(RoCLIPTrainer, tmp_path, matching="cross")
    found, spanned = run(
        RoCLIPTrainer,
        tmp_path,
        matching="cross",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        accumulate_negatives=True,
    )
    assert_same_gradients(found, expected)
    assert_same_logs(spanned, whole)
    for name, value in whole.training_state().items():
        torch.testing.assert_close(spanned.training_state()[name], value)


@pytest.mark.parametrize("cls", [CleanCLIPTrainer, SafeCLIPTrainer])
def test_without_spanning_accumulation_averages(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    expected, _ = run(cls, tmp_path, **given)
    found, _ = run(cls, tmp_path, **given, contrastive_chunk_size=3)
    assert_same_gradients(found, expected)


def test_a_last_step_of_fewer_batches_counts_as_many_as_it_has(tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "num_train_epochs": 1}
    expected, _ = run(CLIPTrainer, tmp_path, **given)
    found, _ = run(CLIPTrainer, tmp_path, **given, contrastive_chunk_size=3)
    assert len(expected) == 3  # of 3, 3 and 2 batches
    assert_same_gradients(found, expected)
    spanned, _ = run(CLIPTrainer, tmp_path, **given, accumulate_negatives=True)
    assert len(spanned) == 3


class EndsWithinAStep(TrainerCallback):
    """Ends the first epoch after the first batch of its second step."""

    ended = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and not self.ended:
            control.should_epoch_stop = self.ended = True


@pytest.mark.parametrize("spanned", [False, True])
def test_batches_of_a_step_that_was_not_made_are_no_part_of_the_next(spanned: bool, tmp_path: Path) -> None:
    given = {"rows": 32, "gradient_accumulation_steps": 2, "accumulate_negatives": spanned, "num_train_epochs": 2}
    trainer: Any = make_trainer(RecordedRoCLIP, tmp_path, callbacks=[EndsWithinAStep()], **given)
    checked = []
    note_gradient = trainer.watch.finite.note_gradient
    trainer.watch.finite.note_gradient = lambda *args: (
        checked.append(len(trainer.watch.finite._batches)),
        note_gradient(*args),
    )
    trainer.train()
    assert [len(step.rows) for step in trainer.steps] == ([16] * 3 if spanned else [8] * 7)
    assert checked == ([1] * 3 if spanned else [2] * 3)


def test_safe_pairs_are_not_contrasted_with_risky_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[set[bool]]] = []

    def noted(batches: Any, kind: Any) -> list[list[int]]:
        found = _of_a_kind(batches, kind)
        steps.append([{kind(batches[i]) for i in group} for group in found])
        assert sorted(i for group in found for i in group) == list(range(len(batches)))
        return found

    monkeypatch.setattr("hf_robust_clip.trainers.step._of_a_kind", noted)
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "accumulate_negatives": True}
    run(RecordedSafeCLIP, tmp_path, **PHASES[SafeCLIPTrainer], **given)
    assert all(len(kinds) == 1 for step in steps for kinds in step)
    assert any(len(step) == 2 for step in steps) and any(step == [{True}] for step in steps)


def test_what_is_drawn_for_a_chunk_is_drawn_again_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout and augmentation, the gradients are those of one graph through the same encodings."""
    cls = CleanCLIPTrainer
    given = {
        "image_augmentation": ImageAugmentation("strong"),
        "text_augmentation": "eda",
        "contrastive_chunk_size": 5,
    }
    found, chunked = run(cls, tmp_path, **{**given, "model": small_model()})

    def in_one_graph(
        step: Step,
        model: Any,
        encoder: Any,
        batches: Any,
        kind: Any,
        size: int,
        divisor: int,
        accelerator: Any,
        *_: Any,
    ) -> torch.Tensor:
        (batch,) = batches
        members = []
        for place, inputs in enumerate(cut(batch.inputs, len(step.views), size)):
            with forked_rng(derive_seed(batch.seed, place), step.device):
                embeddings = encode_pairs(model, step._stacked(inputs, step.views))
                members.append(split_views(step.views, step.views, embeddings))
        views = {
            view: Embeddings(*(torch.cat([chunk[view][side] for chunk in members]) for side in (0, 1)))
            for view in step.views
        }
        loss = step.loss(views, step.scalars(encoder)[0], batch) / divisor
        accelerator.backward(loss)
        return loss.detach()

    monkeypatch.setattr(Step, "chunked", in_one_graph)
    expected, whole = run(cls, tmp_path, **{**given, "model": small_model()})
    assert_same_gradients(found, expected)
    assert_same_logs(chunked, whole)
    without, _ = run(cls, tmp_path, **{**given, "image_augmentation": "identity", "model": small_model()})
    assert (found[0] - without[0]).norm() > 1e-3 * found[0].norm()


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    assert_same_bits(
        *train_and_resume(
            SafeCLIPTrainer,
            tmp_path,
            7,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            accumulate_negatives=True,
            contrastive_chunk_size=3,
        )
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_half_precision_and_gradient_checkpointing(bf16: bool, tmp_path: Path) -> None:
    given = {"bf16": bf16, "gradient_checkpointing": True}
    expected, _ = run(CleanCLIPTrainer, tmp_path, **given)
    found, _ = run(CleanCLIPTrainer, tmp_path, **given, contrastive_chunk_size=5)
    assert_same_gradients(found, expected, 0.03 if bf16 else 1e-6)


@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_frozen_towers_and_a_bias(loss_type: str, tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {
            **size,
            "vocab_size": len(digit_processor().tokenizer),
            "max_position_embeddings": 32,
            "projection_size": 32,
        }
        made = SiglipModel(SiglipConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 4}))
        made.text_model.requires_grad_(False)
        made.logit_scale.requires_grad_(False)
        return made

    given = {"loss_type": loss_type}
    expected, _ = run(CLIPTrainer, tmp_path, model=model(), **given)
    found, trainer = run(CLIPTrainer, tmp_path, model=model(), **given, contrastive_chunk_size=5)
    assert_same_gradients(found, expected)
    assert bool(trainer.model.logit_bias.any()) == (loss_type == "sigmoid")  # from 0


def test_one_chunk_after_the_other_is_held(tmp_path: Path) -> None:
    """No activation of a chunk is kept while the next is encoded."""
    alive: list[int] = []
    held: set[int] = set()

    def pack(tensor: torch.Tensor) -> Any:
        class Kept:
            def __init__(self) -> None:
                held.add(id(self))
                alive.append(len(held))

            def __del__(self) -> None:
                held.discard(id(self))

        return Kept(), tensor

    peaks = {}
    for size in (16, 4):
        alive.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1]):
            run(CLIPTrainer, tmp_path, contrastive_chunk_size=size, max_steps=1)
        peaks[size] = max(alive)
    assert peaks[4] <= peaks[16] * 1.2


@pytest.mark.parametrize("value", [0, -1, 2.5, "four"])
def test_wrong_sizes_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contrastive_chunk_size"):
        CLIPTrainingArguments(str(tmp_path), contrastive_chunk_size=value)
