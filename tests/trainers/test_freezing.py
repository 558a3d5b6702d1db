"""A frozen tower does not train, keeps its evaluation mode, and costs no gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.families import altclip, chinese_clip, clip, processor_for, siglip, vision_text_dual_encoder
from support.training import assert_same_bits, make_trainer, small_model, train_and_resume
from torch import nn

from hf_robust_clip import (
    CleanCLIPTrainer,
    CLIPTrainer,
    Defence,
    RoCLIPTrainer,
    SafeCLIPTrainer,
)
from hf_robust_clip.trainers.defended import TRAINERS
from hf_robust_clip.trainers.freezing import freezing

TOWERS = ("vision", "text")


def changed(trainer: CLIPTrainer) -> set[str]:
    """The parameters that a training changed."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", [clip, siglip, altclip, chinese_clip, vision_text_dual_encoder])
def test_all_but_the_tower_trains(family: Any, tower: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = family()
    nn.init.constant_(model.logit_scale, 2.0)  # SigLIP's starts at its bound
    given: dict[str, Any] = {"model": model, "processing_class": processor_for(model)}
    names = changed(make_trainer(CLIPTrainer, tmp_path, freeze=tower, max_steps=1, **given))
    other = next(name for name in TOWERS if name != tower)
    assert not any(name.startswith(f"{tower}_model.") for name in names)
    assert any(name.startswith(f"{other}_model.") for name in names)
    projections = {name for name, _ in model.named_parameters() if name.endswith("_projection.weight") and "." in name}
    assert "logit_scale" in names
    assert {name for name in projections if not name.startswith("text_model")} <= names


@pytest.mark.parametrize(("checkpointing", "chunk"), [(False, None), (True, 3)])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_tower_is_encoded_without_gradient_and_in_evaluation_mode(
    tower: str, checkpointing: bool, chunk: int | None, tmp_path: Path
) -> None:
    model = small_model(dropout=0.5)
    seen: list[tuple[bool, bool]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((output.pooler_output.requires_grad, any(part.training for part in module.modules())))

    getattr(model, f"{tower}_model").register_forward_hook(note)
    options = {"gradient_checkpointing": checkpointing, "contrastive_chunk_size": chunk, "max_steps": 1}
    make_trainer(CLIPTrainer, tmp_path, model=model, freeze=tower, **options).train()
    assert set(seen) == {(False, False)}
    assert model.training and "forward" not in vars(getattr(model, f"{tower}_model"))


def test_running_statistics_stay(tmp_path: Path) -> None:
    """As those of a ResNet, which training mode would move without any gradient."""

    class Normalized(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.norm = layer, nn.BatchNorm1d(layer.normalized_shape[0])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = self.layer(hidden)
            return self.norm(hidden.flatten(0, -2)).view_as(hidden)

    model = small_model()
    model.vision_model.post_layernorm = Normalized(model.vision_model.post_layernorm)
    before = {name: value.clone() for name, value in model.vision_model.state_dict().items()}
    make_trainer(CLIPTrainer, tmp_path, model=model, freeze="vision", max_steps=2).train()
    assert all(torch.equal(value, before[name]) for name, value in model.vision_model.state_dict().items())


@pytest.mark.parametrize("cls", [CLIPTrainer, RoCLIPTrainer])
def test_resumed_equals_uninterrupted(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    assert_same_bits(*train_and_resume(cls, tmp_path, 4, rows=16, freeze="text"))


def test_chunks_have_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    states = []
    for chunk in (None, 3):
        model = small_model(dropout=0.0)
        options = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}), "contrastive_chunk_size": chunk}
        make_trainer(CLIPTrainer, tmp_path, model=model, freeze="vision", max_steps=2, **options).train()
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


def test_chunks_of_which_nothing_learns_but_the_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = siglip()
    model.text_model.requires_grad_(False)
    nn.init.constant_(model.logit_scale, 2.0)
    options = {"contrastive_chunk_size": 3, "max_steps": 2}
    names = changed(make_trainer(CLIPTrainer, tmp_path, model=model, freeze="vision", **options))
    assert names == {"logit_scale", "logit_bias"}


@pytest.mark.parametrize(
    ("cls", "given", "accepted"),
    [
        (CLIPTrainer, {}, set(TOWERS)),
        (CleanCLIPTrainer, {}, set()),
        (CleanCLIPTrainer, {"unimodal_weight": 0.0}, set(TOWERS)),
        (RoCLIPTrainer, {"matching": "image_to_text"}, {"text"}),
        (RoCLIPTrainer, {"matching": "cross"}, set()),
        (SafeCLIPTrainer, {}, set()),
    ],
)
def test_a_tower_that_a_defence_trains_is_not_to_be_frozen(
    cls: type[CLIPTrainer], given: dict[str, Any], accepted: set[str], tmp_path: Path
) -> None:
    for tower in TOWERS:
        if tower in accepted:
            model = make_trainer(cls, tmp_path, freeze=tower, **given).model
            assert not any(parameter.requires_grad for parameter in getattr(model, f"{tower}_model").parameters())
        else:
            with pytest.raises(ValueError, match=f"freeze='{tower}' does not go with {cls.defence_class.__name__}"):
                make_trainer(cls, tmp_path, freeze=tower, **given)


def test_a_defence_of_a_user_says_what_it_needs(tmp_path: Path) -> None:
    class Own(Defence):
        needs_gradient = frozenset({"vision"})

    with pytest.raises(ValueError, match=r"freeze='vision' does not go with Own.*accepted with it is 'none', 'text'"):
        make_trainer(CLIPTrainer, tmp_path, defence=Own(), freeze="vision")


@pytest.mark.parametrize("cls", TRAINERS.values())
def test_unknown_towers_are_refused(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="freeze must be one of 'vision', 'text', 'none', but is 'both'"):
        cls.args_class(str(tmp_path), freeze="both")


def test_adapters_on_a_frozen_tower_are_refused(tmp_path: Path) -> None:
    for given in (
        {"target_modules": ["q_proj"]},
        {"target_modules": r"text_model.*q_proj", "modules_to_save": ["vision_model.post_layernorm"]},
    ):
        with pytest.raises(ValueError, match="freeze='vision' would freeze the adapters on the vision tower"):
            make_trainer(CLIPTrainer, tmp_path, peft_config=LoraConfig(r=2, **given), freeze="vision")
    config = LoraConfig(r=2, target_modules=r"text_model.*q_proj", modules_to_save=["visual_projection"])
    names = changed(make_trainer(CLIPTrainer, tmp_path, peft_config=config, freeze="vision", max_steps=3))
    assert any("text_model" in name for name in names) and any("visual_projection" in name for name in names)
    assert not any("vision_model" in name for name in names)


def test_a_model_without_such_a_tower_is_refused(tmp_path: Path) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.zeros(()))

    with pytest.raises(ValueError, match=r"freeze='text' needs a model with a text_model, and Renamed has none"):
        freezing(Renamed(), "text", Defence())


def test_card_and_record_say_that_a_tower_was_frozen(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, freeze="vision", max_steps=1)
    trainer.train()
    trainer.create_model_card()
    assert trainer.record().defence["freeze"] == "vision"
    card = (tmp_path / "README.md").read_text()
    assert "**The vision tower was frozen**: what it knows, a backdoor included" in card
