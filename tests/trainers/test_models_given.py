"""What a trainer is given: wrapped models are saved under their own names, and what cannot train is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.training import digits, make_trainer, small_model

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, ZeroShotEvaluator
from hf_robust_clip.data.collator import CLIPDataCollator
from hf_robust_clip.data.digits import CLASS_NAMES, digit_processor
from hf_robust_clip.models import load_dual_encoder


def compiled_tower() -> Any:
    model = small_model()
    model.vision_model = torch.compile(model.vision_model)
    return model


def compiled_layers() -> Any:
    model = small_model()
    model.vision_model.encoder.layers[1] = torch.compile(model.vision_model.encoder.layers[1])
    return model


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        (lambda: torch.compile(small_model()), True),
        (compiled_tower, True),
        (compiled_layers, True),
        (lambda: compile_regions(small_model()), False),
        (lambda: torch.nn.DataParallel(small_model()), False),
    ],
    ids=["compiled", "compiled tower", "compiled layer", "compiled regions", "DataParallel"],
)
def test_a_wrapped_model_is_saved_under_its_own_names(
    make: Any, compiled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        CLIPTrainer, tmp_path, rows=16, model=make(), max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model()
    assert ("was given compiled" in caplog.text) == compiled
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert load_file(folder / "model.safetensors").keys() == small_model().state_dict().keys()
        assert torch.equal(load_dual_encoder(folder).logit_scale, trainer.model.logit_scale)
    assert trainer.record().model.name == make_trainer(CLIPTrainer, tmp_path).record().model.name


@pytest.mark.parametrize("outside", [True, False])
def test_adapters_of_a_compiled_model_load_again(outside: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    small_model().save_pretrained(base)
    config = LoraConfig(target_modules=["q_proj"])
    model = load_dual_encoder(base)
    model = torch.compile(get_peft_model(model, config)) if outside else get_peft_model(torch.compile(model), config)
    trainer = make_trainer(CLIPTrainer, tmp_path / "run", rows=16, model=model, max_steps=1)
    trainer.train()
    trainer.save_model()
    load_dual_encoder(tmp_path / "run")
    assert isinstance(trainer.model, PeftModel)


def frozen() -> Any:
    return small_model().requires_grad_(False)


def frozen_adapters(tmp_path: Path) -> Any:
    small_model().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["visual_projection"])
    get_peft_model(load_dual_encoder(tmp_path / "base"), config).save_pretrained(tmp_path / "adapters")
    return str(tmp_path / "adapters")


def larger_images() -> Any:
    processor = digit_processor()
    processor.image_processor.size = {"shortest_edge": 32}
    processor.image_processor.crop_size = {"height": 32, "width": 32}
    return processor


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": frozen()}, "no parameter of the model is trained"),
        (
            {"peft_config": LoraConfig(target_modules=["q_proj"], inference_mode=True)},
            "the model are frozen",
        ),
        ({"peft_config": LoraConfig(target_modules=["nothing"])}, "LoraConfig does not go with CLIPModel: .*nothing"),
        ({"peft_config": {"r": 4}}, "peft_config=dict does not go with CLIPModel"),
        (
            {"peft_config": LoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")},
            "peft_type='LORA' and task_type='FEATURE_EXTRACTION'",
        ),
        ({"peft_config": PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)}, "PREFIX_TUNING"),
        ({"max_length": 200}, "max_length=200 is longer than the model's 16"),
        ({"processing_class": larger_images()}, "makes images of 32 x 32, but the model takes 16 x 16"),
        ({"data_collator": CLIPDataCollator(larger_images(), views=("augmented",))}, "makes images of 32 x 32"),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_step(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(CLIPTrainer, tmp_path / "run", rows=16, **given)
    assert len(str(caught.value)) <= 600 and not (tmp_path / "run").exists()


def test_adapters_loaded_frozen_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the adapters on the model are frozen"):
        make_trainer(CLIPTrainer, tmp_path, rows=16, model=frozen_adapters(tmp_path))


def test_evaluators_have_their_own_processor_tried(tmp_path: Path) -> None:
    test = digits("test").select(range(10))
    given = {"processing_class": larger_images(), "data_collator": CLIPDataCollator(digit_processor())}
    make_trainer(CLIPTrainer, tmp_path, rows=16, **given)
    with pytest.raises(ValueError, match="makes images of 32 x 32"):
        make_trainer(CLIPTrainer, tmp_path, rows=16, evaluators=[ZeroShotEvaluator(test, CLASS_NAMES)], **given)


def test_a_frozen_model_can_be_evaluated(tmp_path: Path) -> None:
    test = digits("test").select(range(10))
    evaluators = [ZeroShotEvaluator(test, CLASS_NAMES)]
    trainer = make_trainer(CLIPTrainer, tmp_path, model=frozen(), train_dataset=None, evaluators=evaluators)
    assert 0 <= trainer.evaluate()["eval_clean_accuracy"] <= 1


@pytest.mark.parametrize("adapters", [False, True])
def test_a_checkpoint_of_other_weights_is_refused(adapters: bool, tmp_path: Path) -> None:
    given = {"peft_config": LoraConfig(target_modules=["q_proj"])} if adapters else {}
    trainer = make_trainer(CLIPTrainer, tmp_path, rows=16, max_steps=1, save_strategy="steps", save_steps=1, **given)
    trainer.train()
    weights = next((tmp_path / "checkpoint-1").glob("*model.safetensors"))
    state = {f"_orig_mod.{name}": value.clone() for name, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing.*'_orig_mod\.' in their names was put there by"):
        make_trainer(CLIPTrainer, tmp_path / "run", rows=16, max_steps=2, **given).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_the_trial_leaves_the_generators_alone(tmp_path: Path) -> None:
    states = []
    for tried in (False, True):
        torch.manual_seed(3)
        model = small_model()
        with pytest.MonkeyPatch.context() as patch:
            if not tried:
                patch.setattr("hf_robust_clip.trainers.trainer.check_fit", lambda *_: None)
            make_trainer(CleanCLIPTrainer, tmp_path, rows=16, model=model)
        states.append((torch.get_rng_state(), model.training))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]
