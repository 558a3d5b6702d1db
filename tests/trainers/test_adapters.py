"""Adapters: what is trained beside them is saved and comes back, alone, resumed and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.training import assert_same_bits, digits, make_trainer, small_model, train_and_resume
from transformers import AutoModel, CLIPModel

from hf_robust_clip import (
    CleanCLIPTrainer,
    CLIPTrainer,
    CLIPTrainingArguments,
    PARTrainer,
    RoCLIPTrainer,
    SafeCLIPTrainer,
    ZeroShotEvaluator,
)
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.trainers.adapters import add_adapters, check_adapters

PROJECTIONS = ["visual_projection", "text_projection"]
TRAINERS = (CLIPTrainer, CleanCLIPTrainer, PARTrainer, RoCLIPTrainer, SafeCLIPTrainer)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": PROJECTIONS, **settings})


def embeddings(model: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embedder = Embedder(model, processor)
    return embedder.embed_images(digits("test").select(range(20)), "image"), embedder.embed_texts(CLASS_NAMES)


def assert_same_model(one: Any, two: Any, processor: Any) -> None:
    """Embeddings equal to 1e-6, and the same scale."""
    for first, second in zip(embeddings(one, processor), embeddings(two, processor), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert torch.equal(one.logit_scale, two.logit_scale)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The folder of the model that adapters are for, which their files name."""
    folder = tmp_path / "base"
    small_model().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("cls", TRAINERS)
def test_every_loader_finds_all_that_was_trained(cls: type[CLIPTrainer], base: str, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(base)
    trainer = make_trainer(cls, tmp_path / "run", model=model, peft_config=lora())
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "modules_to_save" in name or name.endswith("logit_scale") for name in changed)
    for part in ("lora_A", "lora_B", "visual_projection", "text_projection", "logit_scale"):
        assert any(part in name for name in changed) == (part != "logit_scale" or cls is not PARTrainer), part
    trainer.save_model()
    processor = trainer.processing_class
    assert_same_model(
        trainer.model, PeftModel.from_pretrained(CLIPModel.from_pretrained(base), trainer.args.output_dir), processor
    )
    assert_same_model(trainer.model, AutoModel.from_pretrained(trainer.args.output_dir), processor)
    loaded = CLIPModel.from_pretrained(base)
    loaded.load_adapter(trainer.args.output_dir)
    assert_same_model(trainer.model, loaded, processor)


def test_file_has_nothing_of_the_base_but_what_was_trained(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, peft_config=lora(modules_to_save=None))
    trainer.save_model()
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {name for name in names if "lora_" not in name} == {"base_model.model.logit_scale"}
    assert not (tmp_path / "model.safetensors").exists()


def test_scale_that_was_frozen_stays_frozen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    model.logit_scale.requires_grad_(False)
    trainer = make_trainer(CLIPTrainer, tmp_path, model=model, peft_config=lora(), max_steps=2)
    before = trainer.model.logit_scale.item()
    trainer.train()
    assert trainer.model.logit_scale.item() == before
    assert "logit_scale is frozen" in caplog.text


def test_pushing_adapters_of_a_local_base_warns(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = add_adapters(CLIPModel.from_pretrained(base), lora(), 0)

    def warnings(**given: Any) -> list[str]:
        caplog.clear()
        check_adapters(model, CLIPTrainingArguments(output_dir=str(tmp_path), hub_strategy="end", **given))
        return [message for message in caplog.messages if base in message]

    assert warnings() == warnings(push_to_hub=True, merge_adapters=True) == []
    assert len(warnings(push_to_hub=True)) == 1 and "nobody else can load them" in caplog.text


@pytest.mark.parametrize("cls", [CLIPTrainer, SafeCLIPTrainer])
def test_resumed_equals_uninterrupted(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    whole, resumed = train_and_resume(cls, tmp_path, 11, peft_config=lora())
    assert_same_bits(whole, resumed)


def test_best_model_has_the_best_scale(tmp_path: Path) -> None:
    trainer = make_trainer(
        CLIPTrainer,
        tmp_path,
        peft_config=lora(),
        learning_rate=0.05,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_clean_accuracy",
        evaluators=[ZeroShotEvaluator(digits("test").select(range(50)), CLASS_NAMES)],
    )
    trainer.train()
    best = load_file(Path(str(trainer.state.best_model_checkpoint)) / "adapter_model.safetensors")
    assert torch.equal(trainer.model.logit_scale, best["base_model.model.logit_scale"])


def test_merged_model_needs_neither_peft_nor_its_base(base: str, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(base)
    output = tmp_path / "run"
    trainer = make_trainer(
        CLIPTrainer, output, model=model, peft_config=lora(), merge_adapters=True, save_strategy="epoch"
    )
    trainer.train()
    output.joinpath("adapter_config.json").write_text("{}")  # of an earlier run
    trainer.save_model()
    assert not list(output.glob("adapter_*"))
    loaded = CLIPModel.from_pretrained(output)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert_same_model(trainer.model, loaded, trainer.processing_class)
    assert isinstance(trainer.model, PeftModel)
    checkpoint = output / "checkpoint-8"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()


def test_adapters_follow_the_seed(tmp_path: Path) -> None:
    states = [make_trainer(CLIPTrainer, tmp_path, peft_config=lora()).model.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"merge_adapters": True}, "merge_adapters=True, but there are none"),
        (
            {"merge_adapters": True, "peft_config": lora(), "push_to_hub": True, "hub_strategy": "every_save"},
            "merge_adapters=True with hub_strategy='every_save'",
        ),
        ({"peft_config": lora(modules_to_save=["logit_scale"])}, "logit_scale is trained and saved without it"),
        ({"peft_config": lora(modules_to_save=["projection"])}, "has 'projection' in modules_to_save"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(CLIPTrainer, tmp_path, **given)
