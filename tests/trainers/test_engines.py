"""DeepSpeed, with every stage of ZeRO: two processes train as one, resume, measure, save and push as ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load, load_file
from support.engines import deepspeed, zero
from support.processes import OTHERS, SPLIT, TRAINERS, assert_state, few_steps, ranks_agree, state_of, suspects
from support.stand_in import HubStandIn
from support.training import digits, make_trainer, small_model, training_log
from transformers import CLIPModel

from hf_robust_clip import CLIPTrainer, PARTrainer, RoCLIPTrainer, SafeCLIPTrainer, ZeroShotEvaluator
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_processor
from hf_robust_clip.distributed import leave_group

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make test-engines` installs it")

REPOSITORY = "tester/by-deepspeed"


class Bounded(CLIPTrainer):
    """Its scale starts above its bound, falls to it at the first step, and goes on from there."""

    def on_train_begin(self) -> None:
        super().on_train_begin()
        self._first_logit_scale = 0.0


#: Trainings that are the same in one process and in two: the trainer, and arguments; batches of 8 on each of two.
RUNS: dict[str, tuple[type[CLIPTrainer], dict[str, Any]]] = {
    **{cls.__name__: (cls, {}) for cls in TRAINERS},
    **OTHERS,
    **{name: (PARTrainer, given) for name, given in suspects().items()},
    "bounded": (Bounded, {"max_logit_scale": 7.4, "rows": 48, "max_steps": 3, "learning_rate": 0.01}),
    "accumulated": (CLIPTrainer, {"gradient_accumulation_steps": 2, "rows": 64, "max_steps": 2}),
}
SMOKE = ("CLIPTrainer", "CleanCLIPTrainer")
#: What DeepSpeed cannot do, what is said of it, and the stage.
REFUSED: list[tuple[dict[str, Any], str, int]] = [
    ({"contrastive_chunk_size": 3}, "contrastive_chunk_size=3 does not work with DeepSpeed", 2),
    ({"accumulate_negatives": True}, "accumulate_negatives=True does not work with DeepSpeed", 2),
    ({**suspects()["PAR, adapters"], "merge_adapters": True}, "merge_adapters=True does not work with FSDP or", 2),
    ({"optimizer": {"type": "AdamW"}}, "'optimizer', {'type': 'AdamW'}, which would decay logit_scale as well", 2),
    ({"scheduler": {"type": "WarmupLR"}}, "'scheduler', {'type': 'WarmupLR'}, which would replace", 2),
    ({"eval_dataset": digits("test").select(range(4))}, "evaluate() does not work with DeepSpeed before train()", 2),
    ({"stage3_gather_16bit_weights_on_model_save": False}, "would save models without weights: set it to true", 3),
]


def run(name: str, output: Path, batch: int, **more: Any) -> CLIPTrainer:
    cls, given = RUNS[name]
    return few_steps(cls, output / name, batch // given.get("gradient_accumulation_steps", 1), **{**given, **more})


def assert_runs(found: Path, names: Any, output: Path) -> None:
    for name in names:
        assert_state(torch.load(found / f"{name}.pt"), state_of(run(name, output, 16)), name)


def launch(script: str, mode: str, output: Path, **environment: str) -> None:
    """Run a file as a script in several processes, as `torchrun` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command[3:3] = ["--standalone"]
    paths = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*command, script, mode, str(output)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_a_first_look_at_zero_2(tmp_path: Path) -> None:
    launch(__file__, "look", tmp_path, DS_ACCELERATOR="cpu")
    assert_runs(tmp_path, SMOKE, tmp_path / "one")
    assert_saved(tmp_path / "two", torch.load(tmp_path / "CleanCLIPTrainer.pt"))


@pytest.mark.engines
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_trainer_with_every_stage(stage: int, tmp_path: Path) -> None:
    with HubStandIn() as hub:
        environment = {**hub.environment(tmp_path / "home"), "DS_ACCELERATOR": "cpu"}
        launch(__file__, str(stage), tmp_path, **environment)
        pushed = load(hub.files(REPOSITORY)["model.safetensors"])
    assert_runs(tmp_path, RUNS, tmp_path / "one")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["resumed_equals_uninterrupted"] == {"SafeCLIPTrainer": True, "RoCLIPTrainer": True, "PAR": True}
    assert report["figures"] == report["figures_after"]
    assert report["again"].startswith("ValueError: train() works once with DeepSpeed")
    assert len(report["refused"]) == len(REFUSED)
    for found, (_, expected, at_stage) in zip(report["refused"], REFUSED, strict=True):
        assert at_stage != stage or (found.startswith("ValueError") and expected in found and len(found) < 600)
    state = torch.load(tmp_path / "saved.pt")
    assert_saved(tmp_path / "two" / "saved", state)
    assert pushed["logit_scale"].shape == ()
    assert all(torch.equal(pushed[name], state[name].reshape(value.shape)) for name, value in pushed.items())
    for checkpoint in (tmp_path / "two" / "SafeCLIPTrainer").glob("checkpoint-*"):
        assert load_file(checkpoint / "model.safetensors")["logit_scale"].shape == ()
    for folder in ("last", "checkpoint-3"):
        adapters = load_file(tmp_path / "two" / "PAR" / folder / "adapter_model.safetensors")
        assert torch.equal(adapters["base_model.model.logit_scale"], small_model().logit_scale.detach())


def assert_saved(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The folder has a model that loads, with these weights."""
    weights = CLIPModel.from_pretrained(folder).state_dict()
    assert weights["logit_scale"].shape == ()
    assert all(torch.equal(value, state[name].reshape(value.shape)) for name, value in weights.items())


def refusal(given: dict[str, Any], stage: int, output: Path) -> str:
    """What is said before the first step."""
    options = zero(stage)
    config = options["deepspeed"]
    for name in ("optimizer", "scheduler"):
        if name in given:
            config[name] = given.pop(name)
    for name in [name for name in given if name.startswith("stage3_")]:
        config["zero_optimization"][name] = given.pop(name)
    return error_of(lambda: make_trainer(PARTrainer, output, **given, **options).evaluate())


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def save_runs(names: Any, output: Path, stage: int) -> None:
    for name in names:
        trainer = run(name, output / "two", 8, **zero(stage))
        assert ranks_agree(trainer), name
        state = state_of(trainer)
        if trainer.is_world_process_zero():
            torch.save(state, output / f"{name}.pt")
        if name == SMOKE[-1]:
            trainer.save_model(str(output / "two"))


def resumed(output: Path, stage: int) -> dict[str, bool]:
    """Whether what was interrupted ends as what was not."""
    evaluator = ZeroShotEvaluator(digits("test").select(range(21)), CLASS_NAMES, templates=CAPTION_TEMPLATES)
    measured: dict[str, Any] = {"evaluators": [evaluator], "eval_strategy": "epoch"}
    adapters = suspects()["PAR, adapters"]
    found = {}
    for name, cls, step, given in (
        ("SafeCLIPTrainer", SafeCLIPTrainer, 10, {"num_train_epochs": 4, **SPLIT, **measured}),
        ("RoCLIPTrainer", RoCLIPTrainer, 6, {"num_train_epochs": 2}),
        ("PAR", PARTrainer, 3, {"num_train_epochs": 2, **adapters}),
    ):
        folder = output / "two" / name
        whole = make_trainer(cls, folder, save_strategy="steps", save_steps=step, **given, **zero(stage))
        whole.train()
        again = make_trainer(cls, folder / "resumed", **given, **zero(stage))
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        one, two = state_of(whole), state_of(again)
        same = all(torch.equal(value.nan_to_num(), two[key].nan_to_num()) for key, value in one.items())
        found[name] = same and training_log(whole) == training_log(again)
        whole.save_model(str(folder / "last"))
    return found


def stage_of(output: Path, stage: int) -> None:
    """What two processes do with one stage, in one launch."""
    refused = [refusal(dict(given), at_stage, output / "refused") for given, _, at_stage in REFUSED]
    save_runs(RUNS, output, stage)
    report: dict[str, Any] = {"refused": refused, "resumed_equals_uninterrupted": resumed(output, stage)}
    evaluator = ZeroShotEvaluator(digits("test").select(range(21)), CLASS_NAMES, templates=CAPTION_TEMPLATES)
    folder, options = output / "model", zero(stage)
    if PartialState().is_main_process:
        small_model().save_pretrained(folder)
        digit_processor().save_pretrained(folder)
    PartialState().wait_for_everyone()
    trainer = make_trainer(
        CLIPTrainer,
        output / "two" / "saved",
        **{"model": str(folder), "processing_class": None, "evaluators": [evaluator], "eval_strategy": "epoch"},
        **{"eval_dataset": digits("test").select(range(21)), "num_train_epochs": 2, "push_to_hub": True},
        **{"eval_on_start": True},
        **{"hub_model_id": REPOSITORY, "save_strategy": "epoch"},
        **options,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    figures = trainer.evaluate()
    names = ("eval_loss", "eval_clean_top5_accuracy")
    report |= {"figures": [logged[name] for name in names], "figures_after": [figures[name] for name in names]}
    assert len(set(gather_object([repr(report["figures"])]))) == 1
    trainer.push_to_hub()
    report["again"] = error_of(trainer.train)
    state = state_of(trainer)
    if trainer.is_world_process_zero():
        torch.save(state, output / "saved.pt")
        (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    with deepspeed():
        if sys.argv[1] == "look":
            save_runs(SMOKE, Path(sys.argv[2]), 2)
        else:
            stage_of(Path(sys.argv[2]), int(sys.argv[1]))
    leave_group()
