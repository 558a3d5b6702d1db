"""PAR: the suspect model stays what it was and costs no second copy where there is one already; what is repelled."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file
from support.families import chinese_clip, processor_for, siglip, vision_text_dual_encoder
from support.training import assert_same_bits, digits, make_trainer, small_model, train_and_resume, training_log

from hf_robust_clip import CLIPTrainer, PARTrainer, PARTrainingArguments
from hf_robust_clip.batch import encode_pairs
from hf_robust_clip.data.digits import digit_processor
from hf_robust_clip.defences.par import PAR, hash_of
from hf_robust_clip.models import base_weights
from hf_robust_clip.record import RunRecord
from hf_robust_clip.trainers.trainer import STATE_FILE


def lora(**settings: Any) -> LoraConfig:
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["visual_projection"]}
    return LoraConfig(**{**given, "lora_dropout": 0.1, **settings})


def unfrozen() -> Any:
    """Adapters on a model of which a part is trained itself."""
    from peft import get_peft_model

    model = get_peft_model(small_model(), lora(modules_to_save=None))
    model.text_projection.requires_grad_(True)
    return model


def inputs() -> dict[str, torch.Tensor]:
    rows, processor = digits("test").select(range(6)), digit_processor()
    given = processor(images=list(rows["image"]), text=list(rows["caption"]), padding=True, return_tensors="pt")
    return {name: given[name] for name in ("pixel_values", "input_ids", "attention_mask")}


@torch.no_grad()
def embeddings(model: Any) -> torch.Tensor:
    return torch.cat(encode_pairs(model.eval(), inputs()))


def flags_of(model: Any) -> list[bool]:
    trained = [parameter.requires_grad for parameter in model.parameters()]
    return trained + [module.training for module in model.modules()]


# ---- The suspect model ----

#: Arguments of a trainer -> whether the suspect model is a copy.
SUSPECTS: dict[str, tuple[dict[str, Any], bool]] = {
    "whole": ({}, True),
    "adapters": ({"peft_config": lora()}, False),
    "adapters that are not low-rank": ({"peft_config": lora(use_dora=True)}, False),
    "adapters and biases": ({"peft_config": lora(bias="all")}, True),
    "adapters and a projection": ({"model": unfrozen}, True),
}


@pytest.mark.parametrize("kind", SUSPECTS)
def test_the_suspect_model_stays_what_it_was(kind: str, tmp_path: Path) -> None:
    given, copied = SUSPECTS[kind]
    given = {name: value() if name == "model" else value for name, value in given.items()}
    expected = embeddings(small_model())
    trainer: Any = make_trainer(PARTrainer, tmp_path, max_steps=3, save_strategy="steps", save_steps=3, **given)
    trainer.train()
    assert bool(trainer.defence._copy) == copied
    model = trainer.model.train()
    flags = flags_of(model)
    found = torch.cat(trainer.step.reference(model, inputs()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.allclose(embeddings(model), expected, atol=1e-3)
    model.train()
    assert flags_of(model) == flags and not found.requires_grad
    # Nothing of it is saved, and nothing trains it.
    assert not list(trainer.defence.parameters())
    state = load_file(tmp_path / "checkpoint-3" / STATE_FILE)
    assert state.keys() == {"bad_rows", "suspect", "suspect_name"} and state["suspect"].shape == (32,)
    assert state["suspect"].dtype == torch.uint8


def test_statistics_that_training_changes_are_copied(tmp_path: Path) -> None:
    model = small_model()
    model.visual_projection = torch.nn.Sequential(torch.nn.BatchNorm1d(32), model.visual_projection)
    suspect = embeddings(copy.deepcopy(model))
    trainer: Any = make_trainer(PARTrainer, tmp_path, max_steps=2, model=model, peft_config=lora(modules_to_save=None))
    trainer.train()
    torch.testing.assert_close(torch.cat(trainer.step.reference(trainer.model, inputs())), suspect)


def test_the_suspect_model_is_encoded_as_the_model_is(tmp_path: Path) -> None:
    """In half precision where training is, also of a model that has been trained in it before."""
    plain = make_trainer(CLIPTrainer, tmp_path, max_steps=1, bf16=True)
    plain.train()
    trainer: Any = make_trainer(PARTrainer, tmp_path, max_steps=2, bf16=True, model=plain.model)
    seen: list[torch.dtype] = []
    frozen = trainer.defence._copy[0]
    frozen.visual_projection.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    trainer.train()
    assert set(seen) == {torch.bfloat16} and len(seen) == 2
    assert all(torch.equal(value, frozen.state_dict()[name]) for name, value in before.items())
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.float32}


def test_a_hash_is_of_names_types_shapes_and_bytes_and_of_no_adapter(tmp_path: Path) -> None:
    adapted: Any = make_trainer(PARTrainer, tmp_path, max_steps=2, peft_config=lora())
    whole: Any = make_trainer(PARTrainer, tmp_path)
    assert torch.equal(adapted.defence.suspect, whole.defence.suspect)
    adapted.train()
    assert torch.equal(hash_of(base_weights(adapted.model)), whole.defence.suspect)
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    changed = torch.tensor([1.0, 2.0]).view(torch.int32)
    changed[1] ^= 1
    others = (
        {**weights, "a": changed.view(torch.float32)},
        {**weights, "a": weights["a"].view(torch.int32)},
        {**weights, "a": weights["a"][:, None]},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
    )
    hashes = {bytes(hash_of(given).tolist()) for given in (weights, *others)}
    assert len(hashes) == 1 + len(others)
    assert torch.equal(hash_of(weights), hash_of(dict(reversed(weights.items()))))


def test_a_defence_is_attached_anew(tmp_path: Path) -> None:
    defence: Any = PAR()
    for seed in range(2):
        model = small_model(seed=seed)
        expected = embeddings(copy.deepcopy(model))
        trainer = make_trainer(CLIPTrainer, tmp_path, model=model, defence=defence, max_steps=1)
        trainer.train()
        torch.testing.assert_close(torch.cat(trainer.step.reference(model, inputs())), expected, rtol=0, atol=0)


# ---- Resuming ----


@pytest.mark.parametrize(
    "options", [{"peft_config": lora()}, {"repel_layers": True, "gradient_accumulation_steps": 2}]
)
def test_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    assert_same_bits(*train_and_resume(PARTrainer, tmp_path, step=3, rows=40, **options))


def test_another_suspect_model_is_refused(tmp_path: Path) -> None:
    suspect = tmp_path / "suspect"
    small_model().save_pretrained(suspect)
    options: dict[str, Any] = {"rows": 16, "save_strategy": "steps", "save_steps": 1}
    make_trainer(PARTrainer, tmp_path / "out", model=str(suspect), max_steps=1, **options).train()
    half = small_model().to(torch.bfloat16).float()
    for model in (small_model(seed=1), half, str(tmp_path / "out" / "checkpoint-1")):
        other = make_trainer(PARTrainer, tmp_path / "out", model=model, max_steps=2, **options)
        with pytest.raises(ValueError, match=r"model must be the suspect model that .* it was 'suspect'") as raised:
            other.train(resume_from_checkpoint=True)
        assert len(str(raised.value)) <= 600 and "\n" not in str(raised.value)
    again = make_trainer(PARTrainer, tmp_path / "out", model=str(suspect), max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    record = RunRecord.load(tmp_path / "out" / "checkpoint-2")
    state = load_file(tmp_path / "out" / "checkpoint-2" / STATE_FILE)
    assert record.details.model_extra == {"suspect_sha256": bytes(state["suspect"].tolist()).hex()}


# ---- What is trained ----


def test_logit_scale_is_frozen_while_training_goes_on(tmp_path: Path) -> None:
    model = small_model()
    model.logit_scale.data.fill_(5.0)  # above what max_logit_scale would leave
    trainer = make_trainer(PARTrainer, tmp_path, model=model, max_steps=2)
    for _ in range(2):
        trainer.train()
        assert model.logit_scale.item() == 5 and model.logit_scale.requires_grad
    seen: list[bool] = []

    def fail(*_: Any) -> dict[str, float]:
        seen.append(model.logit_scale.requires_grad)
        raise RuntimeError("in training")

    failing = make_trainer(PARTrainer, tmp_path, model=model, evaluators=[fail], eval_strategy="steps", eval_steps=1)
    with pytest.raises(RuntimeError, match="in training"):
        failing.train()
    assert seen == [False] and model.logit_scale.requires_grad
    trained = make_trainer(PARTrainer, tmp_path, max_steps=2, freeze_logit_scale=False)
    before = trained.model.logit_scale.item()
    trained.train()
    assert trained.model.logit_scale.item() != before
    # One that was frozen before stays so.
    model.logit_scale.requires_grad_(False)
    make_trainer(PARTrainer, tmp_path, model=model, max_steps=1).train()
    assert not model.logit_scale.requires_grad


def test_embeddings_go_further_than_by_plain_fine_tuning(tmp_path: Path) -> None:
    far = {}
    for threshold in (0.0, 2.15):
        trainer = make_trainer(PARTrainer, tmp_path, model=small_model(dropout=0.0), repel_threshold=threshold)
        trainer.train()
        log = training_log(trainer)
        assert log[0]["image_distance"] == log[0]["text_distance"] == 0
        far[threshold] = log[-1]["image_distance"] + log[-1]["text_distance"]
        for entry in log[1:]:
            for side in ("image", "text"):
                distance = entry[f"{side}_distance"]
                expected = -0.5 * distance if distance <= threshold else 0.0
                assert entry[f"{side}_repulsion_loss"] == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert far[2.15] > far[0.0] > 0
    findings = list(PAR.findings(trainer.record()))
    assert [found.head for found in findings] == ["PAR moved embeddings"]
    assert f"{log[-1]['image_distance']:.2f} in images" in findings[0].text


@pytest.mark.parametrize(
    "given",
    [
        {"contrastive_chunk_size": 3},
        {"accumulate_negatives": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ],
)
def test_gradients_in_chunks_are_those_of_the_whole_batch(given: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for options in ({}, given):
        trainer = make_trainer(
            PARTrainer,
            tmp_path,
            model=small_model(dropout=0.0),
            max_steps=1,
            image_augmentation="identity",
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}),
            **{"per_device_train_batch_size": 16, **options},
        )
        # Away from the suspect model, so that there is something to repel.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer.train()
        assert training_log(trainer)[0]["image_repulsion_loss"] < -0.01
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


def test_the_reference_is_of_the_same_augmented_inputs(tmp_path: Path) -> None:
    model = small_model(dropout=0.0)
    trainer = make_trainer(PARTrainer, tmp_path, model=model, max_steps=1, learning_rate=0.0, text_augmentation="eda")
    trainer.train()
    (log,) = training_log(trainer)
    assert log["image_distance"] == log["text_distance"] == 0


# ---- The schedule ----


def test_learning_rates_are_those_of_the_paper(tmp_path: Path) -> None:
    """Also on a stream, which has no epochs."""
    pairs = digits().select(range(32))
    for dataset in (pairs, pairs.to_iterable_dataset()):
        trainer: Any = make_trainer(PARTrainer, tmp_path, train_dataset=dataset, max_steps=8, learning_rate=3e-5)
        trainer.train()
        rates = [entry["learning_rate"] for entry in training_log(trainer)]
        halfway, last = 3e-6, 1e-9
        # Each is logged after the step, as what the next one has; the last one is the end of the schedule.
        line = [3e-5 - (3e-5 - halfway) * step / 4 for step in range(4)]
        curve = [last + (halfway - last) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
        assert rates == pytest.approx([*line, *curve], rel=1e-5)
        assert trainer.lr_scheduler.get_last_lr() == pytest.approx([last] * 2)


def test_a_schedule_of_the_trainer_takes_its_place(tmp_path: Path) -> None:
    arguments = PARTrainingArguments(str(tmp_path), lr_scheduler_type="cosine", paper_schedule=False, use_cpu=True)
    assert arguments.lr_scheduler_type == "cosine"
    with pytest.raises(ValueError, match="lr_scheduler_type='cosine' and paper_schedule=True are two schedules"):
        PARTrainingArguments(str(tmp_path), lr_scheduler_type="cosine", use_cpu=True)
    rates = {}
    for name, given in (
        ("plain", {"paper_schedule": False}),
        ("warmed up", {"warmup_steps": 2}),
        ("linear", {"paper_schedule": False, "lr_scheduler_type": "linear"}),
    ):
        trainer = make_trainer(PARTrainer, tmp_path, max_steps=4, **given)
        trainer.train()
        rates[name] = [entry["learning_rate"] / 1e-3 for entry in training_log(trainer)]
    assert rates["plain"] == pytest.approx([1, 1, 1, 1])
    assert rates["linear"] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates["warmed up"][:3] == pytest.approx([0, 0.5 * 0.55, 0.1])


@pytest.mark.parametrize("wrong", [-0.1, 4.5, math.nan])
def test_a_threshold_is_a_squared_distance(wrong: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"repel_threshold must be in \[0, 4\], but is"):
        PARTrainingArguments(str(tmp_path), use_cpu=True, repel_threshold=wrong)


# ---- Every layer ----


@pytest.mark.parametrize("make", [small_model, chinese_clip, vision_text_dual_encoder])
def test_class_tokens_of_every_layer_are_repelled(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    suspect = copy.deepcopy(model).eval()
    trainer: Any = make_trainer(
        PARTrainer,
        tmp_path,
        model=model,
        processing_class=processor_for(model),
        repel_layers=True,
        image_preset="identity",
        max_steps=2,
        learning_rate=0.02,
    )
    seen: list[Any] = []
    whole = trainer.step.whole

    def watched(model: Any, encoder: Any, batch: Any) -> torch.Tensor:
        seen[:] = copy.deepcopy(encoder.state_dict()), batch.inputs["pixel_values"]
        found: torch.Tensor = whole(model, encoder, batch)
        return found

    trainer.step.whole = watched
    trainer.train()
    state, pixels = seen
    now = copy.deepcopy(suspect)
    now.load_state_dict(state)
    with torch.no_grad():
        sides = [
            tower(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
            for tower in (now.vision_model, suspect.vision_model)
        ]
    distances = [
        (F.normalize(one[:, 0], dim=1) - F.normalize(two[:, 0], dim=1)).square().sum(dim=1).mean()
        for one, two in zip(*sides, strict=True)
    ]
    assert len(distances) == 2 and min(distances) > 0
    log = training_log(trainer)[-1]
    assert log["layer_distance"] == pytest.approx(float(sum(distances) / 2), rel=1e-4)
    assert log["layer_repulsion_loss"] == pytest.approx(-float(sum(distances)) / 4, rel=1e-4)
    # Nothing listens any more.
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.vision_model.modules())


def test_layers_that_are_computed_again_are_repelled_alike(tmp_path: Path) -> None:
    logs = []
    for given in ({}, {"gradient_checkpointing": True}):
        trainer = make_trainer(
            PARTrainer, tmp_path, model=small_model(dropout=0.0), repel_layers=True, max_steps=3, **given
        )
        trainer.train()
        logs.append(training_log(trainer))
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    assert logs[0][-1]["layer_distance"] > 0


def test_layers_are_refused_where_they_cannot_be_repelled(tmp_path: Path) -> None:
    model = siglip()
    with pytest.raises(ValueError, match=r"repel_layers=True needs a vision tower .* but that of siglip has none"):
        make_trainer(PARTrainer, tmp_path, model=model, processing_class=processor_for(model), repel_layers=True)
    for given in ({"contrastive_chunk_size": 4}, {"accumulate_negatives": True}):
        (name,) = given
        with pytest.raises(ValueError, match=f"repel_layers=True does not work with {name}="):
            make_trainer(PARTrainer, tmp_path, repel_layers=True, **given)
        passed = make_trainer(CLIPTrainer, tmp_path, defence=PAR(repel_layers=True), **given)
        before = [parameter.clone() for parameter in passed.model.parameters()]
        with pytest.raises(ValueError, match="repel_layers=True does not work with contrastive_chunk_size"):
            passed.train()
        assert all(map(torch.equal, before, passed.model.parameters()))


def test_other_families_are_cleaned(tmp_path: Path) -> None:
    model = siglip()
    trainer = make_trainer(PARTrainer, tmp_path, model=model, processing_class=processor_for(model), max_steps=2)
    trainer.train()
    assert training_log(trainer)[-1]["image_distance"] > 0
    # Only to measure, there is no suspect model to be copied.
    idle: Any = make_trainer(PARTrainer, tmp_path, train_dataset=None, eval_dataset=digits("test").select(range(8)))
    assert idle.evaluate()["eval_loss"] > 0 and not idle.defence._copy and idle.record().trainer == "PARTrainer"
