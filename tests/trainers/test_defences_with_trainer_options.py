"""The defences with what people set on a Trainer: evaluation, checkpoints, precision, adapters, batch size."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from support.training import assert_same_bits, digits, make_trainer, small_model, training_log
from transformers import CLIPModel

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer, ZeroShotEvaluator
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES

BOTH = pytest.mark.parametrize("cls", [RoCLIPTrainer, SafeCLIPTrainer])
#: Every kind of step within a few: for RoCLIP they match from the second on; SafeCLIP splits in its third epoch.
BRIEF: dict[type[CLIPTrainer], dict[str, Any]] = {
    RoCLIPTrainer: {"rows": 16, "pool_size": 8, "matching": "cross", "max_steps": 4},
    SafeCLIPTrainer: {"rows": 24, "unimodal_pool_size": 8, "safe_threshold": 0.5, "max_steps": 6},
}


def brief(cls: type[CLIPTrainer], output_dir: Path, **overrides: Any) -> Any:
    return make_trainer(cls, output_dir, **{**BRIEF[cls], **overrides})


def last_phase_ran(trainer: Any) -> bool:
    names = {name for entry in training_log(trainer) for name in entry}
    if isinstance(trainer, RoCLIPTrainer):
        return "image_match_loss" in names
    return len(trainer.splits.records) == 1


@BOTH
def test_evaluation_changes_nothing_and_chooses_the_best_checkpoint(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    plain = brief(cls, tmp_path)
    plain.train()
    test = digits("test").select(range(12))
    watched = brief(
        cls,
        tmp_path / "watched",
        evaluators=[ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES)],
        eval_dataset=test,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="clean_accuracy",
    )
    watched.train()
    assert training_log(watched) == training_log(plain)
    assert last_phase_ran(watched)
    evaluations = [entry for entry in watched.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == (2 if cls is RoCLIPTrainer else 3)
    assert watched.state.best_metric == max(entry["eval_clean_accuracy"] for entry in evaluations)


@BOTH
def test_only_the_model_is_saved_if_told_so(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    brief(cls, tmp_path, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-2" / "robust_clip_state.safetensors").exists()


@BOTH
def test_bfloat16_keeps_losses_and_pools_in_float32(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    full = brief(cls, tmp_path)
    full.train()
    half = brief(cls, tmp_path, bf16=True)
    half.train()
    assert last_phase_ran(half)
    assert half.pools.image.features.dtype == torch.float32
    norms = half.pools.image.features.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-5)
    one, two = training_log(full)[0]["loss"], training_log(half)[0]["loss"]
    assert one == pytest.approx(two, rel=2e-2)
    assert one != two


@BOTH
def test_gradient_checkpointing_changes_nothing(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    plain = brief(cls, tmp_path)
    plain.train()
    saving = brief(cls, tmp_path, gradient_checkpointing=True)
    saving.train()
    for one, two in zip(training_log(plain), training_log(saving), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


@BOTH
def test_second_training_begins_anew_from_the_weights_of_the_first(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    twice = brief(cls, tmp_path)
    twice.train()
    weights = {name: value.clone() for name, value in twice.model.state_dict().items()}
    moments = copy.deepcopy(twice.optimizer.state_dict())
    generator = torch.get_rng_state()
    twice.train()
    anew = brief(cls, tmp_path, model=small_model())
    anew.model.load_state_dict(weights)
    anew.create_optimizer()
    anew.optimizer.load_state_dict(moments)
    torch.set_rng_state(generator)
    anew.train()
    assert training_log(twice) == training_log(anew)
    one, two = twice.training_state(), anew.training_state()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0, equal_nan=True)


@BOTH
def test_fraction_of_an_epoch(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    trainer = brief(cls, tmp_path, max_steps=-1, num_train_epochs=2.5)
    trainer.train()
    assert trainer.state.global_step == 5
    assert last_phase_ran(trainer)


@BOTH
def test_steps_beyond_the_epochs_go_on_with_more_epochs(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    trainer = brief(cls, tmp_path, max_steps=9, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 9
    assert trainer.state.epoch == 4.5
    if cls is SafeCLIPTrainer:
        assert [record.epoch for record in trainer.splits.records] == [2, 3, 4]


@BOTH
def test_smaller_batches_after_running_out_of_memory(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    class Tight(cls):  # type: ignore[misc, valid-type]
        def loss_components(self, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
            terms = super().loss_components(views, scale, batch)
            if len(views[self.views[0]].image_embeds) > 8 and self.state.global_step == 1:
                raise RuntimeError("CUDA out of memory.")
            return terms

    pool = "pool_size" if cls is RoCLIPTrainer else "unimodal_pool_size"
    options = {**BRIEF[cls], "rows": 24, "max_steps": 5, pool: 20, "per_device_train_batch_size": 9}
    trainer = make_trainer(Tight, tmp_path, auto_find_batch_size=True, **options)
    trainer.train()
    assert trainer.state.train_batch_size == 8
    assert trainer.state.global_step == 5
    log = training_log(trainer)
    assert len(log) == 5
    assert all(math.isfinite(entry["loss"]) for entry in log)
    if cls is RoCLIPTrainer:
        assert [entry["pool_fill"] for entry in log[:3]] == [8 / 20, 16 / 20, 1.0]


@BOTH
def test_evaluation_before_training(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    trainer = brief(cls, tmp_path, eval_dataset=digits("test").select(range(8)), eval_on_start=True)
    assert trainer.pools.image is None and not trainer.pools.full
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.training_state().keys() == {"bad_rows"}
    trainer.train()
    assert last_phase_ran(trainer)


@pytest.fixture
def fresh_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes decide once whether they compile, and note it in their environment."""
    for name in ("BACKEND", "MODE", "USE_REGIONAL_COMPILATION"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_compiled_encoders_train_alike(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "model": undropped()}
    plain = make_trainer(CleanCLIPTrainer, tmp_path, **options)
    plain.train()
    AcceleratorState._reset_state(True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {**options, "model": undropped(), "torch_compile": True, "torch_compile_backend": "eager"}
    compiled = make_trainer(CleanCLIPTrainer, tmp_path, **options)
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same_bits(plain, compiled)
    compiled.save_model(str(tmp_path / "saved"))
    saved = CLIPModel.from_pretrained(tmp_path / "saved")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)


def undropped() -> CLIPModel:
    """Without dropout, which compilers draw in another order."""
    model = small_model()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model
