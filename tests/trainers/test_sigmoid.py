"""A model with a bias is trained with SigLIP's loss: bias and scale learn, are saved, and keep what they had."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file
from support.families import siglip
from support.training import assert_same_bits, digits, make_trainer, training_log
from transformers import AutoModel, SiglipModel

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, Defence, SafeCLIPTrainer, ZeroShotEvaluator
from hf_robust_clip.batch import encode_pairs
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.losses import clip_loss, info_nce, sigmoid_loss
from hf_robust_clip.trainers.defended import TRAINERS


def seeded(scale: float = 117.0, bias: float = -12.9) -> Any:
    """A SigLIP with the scale and the bias of released ones."""
    torch.manual_seed(0)
    model = siglip()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
        model.logit_bias.fill_(bias)
    return model


@pytest.mark.parametrize("cls", TRAINERS.values())
@pytest.mark.parametrize("loss_type", ["auto", "softmax"])
def test_the_bias_learns_with_the_sigmoid_loss(cls: type[CLIPTrainer], loss_type: str, tmp_path: Path) -> None:
    trainer = make_trainer(cls, tmp_path, 16, model=seeded(10.0, -10.0), loss_type=loss_type)
    trainer.train()
    assert (trainer.model.logit_bias.item() != -10.0) == (loss_type != "softmax")
    assert all(("logit_bias" in entry) == (loss_type != "softmax") for entry in training_log(trainer))
    assert trainer.record().defence["loss_type"] == ("softmax" if loss_type == "softmax" else "sigmoid")


def test_models_without_a_bias_keep_the_softmax_loss(tmp_path: Path) -> None:
    assert not make_trainer(CLIPTrainer, tmp_path).step.sigmoid
    with pytest.raises(ValueError, match=r"loss_type='sigmoid' needs a model with a logit_bias.*CLIPModel has none"):
        make_trainer(CLIPTrainer, tmp_path, loss_type="sigmoid")
    with pytest.raises(ValueError, match="loss_type must be one of 'auto', 'softmax', 'sigmoid', but is 'hinge'"):
        make_trainer(CLIPTrainer, tmp_path, loss_type="hinge")


@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_the_loss_of_a_batch_and_of_an_evaluation(loss_type: str, tmp_path: Path) -> None:
    """Those of the functions, of all rows at once whatever the batches."""
    data = digits().select(range(21))
    given: dict[str, Any] = {"eval_dataset": data, "per_device_eval_batch_size": 4, "max_steps": 1}
    trainer = make_trainer(
        CLIPTrainer, tmp_path, 8, model=seeded(20.0, -5.0), loss_type=loss_type, learning_rate=0.0, **given
    )
    model = trainer.model.eval()

    def expected(rows: int) -> float:
        inputs = trainer._prepare_inputs(trainer._eval_collator([data[row] for row in range(rows)])).inputs
        with torch.no_grad():
            sides = encode_pairs(model, inputs)
            if loss_type == "softmax":
                return clip_loss(*sides, model.logit_scale.exp()).item()
            return sigmoid_loss(*sides, model.logit_scale.exp(), model.logit_bias).item()

    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected(21), rel=1e-5)
    loss = expected(8)
    trainer.train()
    assert training_log(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-5)


class Own(Defence):
    """As a user wrote it before there was a bias."""

    def forward(self, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        (pairs,) = views.values()
        return {"own_loss": info_nce(*pairs, scale, gather=self.gather)}


class OwnContrast(Own):
    def forward(self, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        (pairs,) = views.values()
        return {"own_loss": self.contrast(*pairs, scale, batch)}


@pytest.mark.parametrize("chunk", [None, 3])
def test_defences_of_a_user(chunk: int | None, tmp_path: Path) -> None:
    biases = []
    for defence in (Own(), OwnContrast()):
        trainer = make_trainer(
            CLIPTrainer, tmp_path, model=seeded(), defence=defence, contrastive_chunk_size=chunk, max_steps=2
        )
        trainer.train()
        biases.append(trainer.model.logit_bias.item() != pytest.approx(-12.9))
    assert biases == [False, True]


def test_bias_and_scale_have_no_weight_decay(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, model=seeded())
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert decayed and not {"logit_scale", "logit_bias"} & set(decayed)


def test_a_scale_above_the_bound_is_its_own_bound(tmp_path: Path) -> None:
    """It may fall, and grow back to where it was; one that starts below is bounded as ever."""
    trainer = make_trainer(CLIPTrainer, tmp_path, model=seeded(117.0), max_logit_scale=50.0)
    scale = trainer.model.logit_scale
    start = scale.item()
    for given, expected in ((start, start), (math.log(40.0), math.log(40.0)), (9.0, start), (-1.0, 0.0)):
        scale.data.fill_(given)
        trainer.on_optimizer_step()
        assert scale.item() == pytest.approx(expected, rel=1e-7)
    trainer = make_trainer(CLIPTrainer, tmp_path, model=seeded(20.0), max_logit_scale=50.0)
    trainer.model.logit_scale.data.fill_(9.0)
    trainer.on_optimizer_step()
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(50.0))


def test_a_resumed_scale_has_the_bound_of_the_model_that_training_started_from(tmp_path: Path) -> None:
    started = make_trainer(
        CLIPTrainer, tmp_path, model=seeded(117.0), save_strategy="steps", save_steps=2, max_steps=2
    )
    started.train()
    checkpoint = tmp_path / "checkpoint-2"
    resumed = make_trainer(CLIPTrainer, tmp_path, model=seeded(90.0), max_steps=2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed.model.logit_scale.data.fill_(9.0)
    resumed.on_optimizer_step()
    assert resumed.model.logit_scale.exp().item() == pytest.approx(117.0, rel=1e-5)


@pytest.mark.parametrize("cls", [CLIPTrainer, SafeCLIPTrainer])
def test_resumed_equals_uninterrupted(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    def model() -> Any:
        made = seeded(10.0, -10.0)
        made.config.vision_config.attention_dropout = made.config.text_config.attention_dropout = 0.1
        return made

    whole = make_trainer(cls, tmp_path, model=model(), save_strategy="steps", save_steps=11)
    whole.train()
    resumed = make_trainer(cls, tmp_path / "resumed", model=model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))
    assert_same_bits(whole, resumed)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)


def test_the_bias_is_trained_and_saved_beside_adapters(tmp_path: Path) -> None:
    seeded(10.0, -10.0).save_pretrained(tmp_path / "base")
    model = SiglipModel.from_pretrained(tmp_path / "base")
    output = tmp_path / "run"
    trainer = make_trainer(CLIPTrainer, output, model=model, peft_config=lora(), save_strategy="steps", save_steps=11)
    trainer.train()
    trainer.save_model()
    names = set(load_file(output / "adapter_model.safetensors"))
    others = {name.rpartition(".")[2] for name in names if "lora_" not in name}
    assert others == {"logit_scale", "logit_bias"}
    trained = trainer.model.logit_bias.item()
    assert trained != -10.0
    base = SiglipModel.from_pretrained(tmp_path / "base")
    assert AutoModel.from_pretrained(output).logit_bias.item() == trained
    assert PeftModel.from_pretrained(base, str(output)).logit_bias.item() == trained
    resumed = make_trainer(
        CLIPTrainer, tmp_path / "resumed", model=SiglipModel.from_pretrained(tmp_path / "base"), peft_config=lora()
    )
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-11"))
    assert_same_bits(trainer, resumed)


def test_a_frozen_bias_stays_frozen_beside_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = seeded()
    model.logit_bias.requires_grad_(False)
    trainer = make_trainer(CLIPTrainer, tmp_path, model=model, peft_config=lora(), max_steps=2)
    before = trainer.model.logit_bias.item()
    trainer.train()
    assert trainer.model.logit_bias.item() == before
    assert "logit_bias is frozen" in caplog.text and "logit_scale is frozen" not in caplog.text


def colored(rows: int, seed: int) -> datasets.Dataset:
    """Noisy images of eight colors, each with a word."""
    draw = np.random.default_rng(seed)
    labels = np.arange(rows) % 8
    means = np.array(list(itertools.product((40, 215), repeat=3)))[labels][:, None, None]
    noise = draw.normal(0, 60, (rows, 16, 16, 3)) + draw.normal(0, 40, (rows, 1, 1, 3))
    images = [Image.fromarray(pixels) for pixels in (means + noise).clip(0, 255).astype(np.uint8)]
    return datasets.Dataset.from_dict(
        {"image": images, "caption": [CLASS_NAMES[label] for label in labels], "label": labels.tolist()}
    )


@functools.cache
def converged() -> dict[str, torch.Tensor]:
    """The weights of a SigLIP that has learned the words of the colors with its own loss."""
    model = seeded(10.0, -3.0)
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"train_dataset": colored(128, 0), "per_device_train_batch_size": 16}
        schedule = {"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 10, "num_train_epochs": 12}
        make_trainer(CLIPTrainer, Path(folder), model=model, **given, **schedule).train()
    return model.state_dict()


@pytest.mark.parametrize("cls, rate", [(CLIPTrainer, None), (CleanCLIPTrainer, None), (CLIPTrainer, 1.0)])
def test_fine_tuning_at_the_default_rate_keeps_what_a_model_knows(
    cls: type[CLIPTrainer], rate: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Within the standard error of its accuracy on the test images; a rate that does not is warned of."""
    model = seeded()
    model.load_state_dict(converged())
    defaults = cls.args_class(str(tmp_path))
    given: dict[str, Any] = {"eval_on_start": True, "eval_strategy": "epoch", "num_train_epochs": 1}
    trainer = make_trainer(
        cls,
        tmp_path,
        model=model,
        train_dataset=colored(128, 0),
        evaluators=ZeroShotEvaluator(colored(200, 1), CLASS_NAMES[:8], templates=("{}",)),
        learning_rate=defaults.learning_rate if rate is None else rate,
        per_device_train_batch_size=defaults.per_device_train_batch_size,
        **given,
    )
    trainer.train()
    name = "eval_clean_accuracy"
    before, after = (entry[name] for entry in trainer.state.log_history if name in entry)
    assert before > 0.8
    kept = after >= before - math.sqrt(before * (1 - before) / 200)
    assert kept == (rate is None)
    assert ("clean_accuracy fell from" in caplog.text) == (rate is not None)
