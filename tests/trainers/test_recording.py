"""What a trainer's record says of its run, whole or in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.training import digits, make_trainer, poisoned_pairs, small_model

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CleanCLIPTrainer,
    CLIPTrainer,
    LinearProbeEvaluator,
    PoisonSuccessEvaluator,
    RetrievalEvaluator,
    RoCLIPTrainer,
    SafeCLIPTrainer,
    TextQueryEvaluator,
    WordTrigger,
    ZeroShotEvaluator,
)
from hf_robust_clip.data.digits import CLASS_NAMES, digit_processor
from hf_robust_clip.describing import describe_evaluator
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.record import RUN_FILE, Data, RunRecord
from hf_robust_clip.telling import render_card
from hf_robust_clip.trainers import trainer as trainer_module


def evaluators() -> list[Any]:
    test = digits("test").select(range(40))
    return [
        ZeroShotEvaluator(test, CLASS_NAMES),
        AttackSuccessEvaluator(test, BlendedTrigger(), "six", CLASS_NAMES),
    ]


@pytest.mark.parametrize("cls", [CLIPTrainer, CleanCLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer])
def test_before_and_after_are_what_evaluate_returned(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(cls, tmp_path, evaluators=evaluators(), train_dataset=poisoned_pairs(64), seed=3)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.record().after is None
    after = trainer.evaluate()
    trainer.save_model()
    record = RunRecord.load(tmp_path)
    assert record.before is not None and record.after is not None
    assert record.before == {name: before[f"eval_{name}"] for name in record.before}
    assert record.after == {name: after[f"eval_{name}"] for name in record.after}
    assert {"clean_accuracy", "attack_success_rate"} <= record.after.keys()
    assert record.after_step == record.steps == record.planned_steps == trainer.state.max_steps > 0
    assert record.trainer == cls.__name__
    assert record.data is not None and record.data.poisons == 22
    assert record.environment.seed == 3 and record.environment.seconds > 0
    assert bool(record.details.splits) is (cls is SafeCLIPTrainer)
    assert record.model.parameters == sum(value.numel() for value in trainer.model.parameters())
    assert record.model.name is None


def test_evaluations_in_training_count_as_well(tmp_path: Path) -> None:
    trainer = make_trainer(
        CLIPTrainer, tmp_path, evaluators=evaluators(), eval_strategy="epoch", eval_on_start=True, num_train_epochs=2
    )
    trainer.train()
    record = trainer.record()
    assert [entry.step for entry in record.course] == [0, 8, 16]
    assert record.before == record.course[0].numbers
    assert record.after == record.course[2].numbers
    assert record.after_step == 16


def test_of_the_best_model_its_own_evaluation_counts(tmp_path: Path) -> None:
    trainer = make_trainer(
        CLIPTrainer,
        tmp_path,
        evaluators=evaluators(),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_clean_accuracy",
        learning_rate=0.02,
    )
    trainer.train()
    record = trainer.record()
    assert record.after_step == trainer.state.best_global_step
    assert record.after == trainer.run_evaluators()


def test_resumed_run_remembers_the_figures_before_and_the_time(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, evaluators=evaluators(), save_strategy="epoch")
    trainer.evaluate()
    trainer.train()
    earlier = RunRecord.load(tmp_path / "checkpoint-16")
    resumed = make_trainer(CLIPTrainer, tmp_path / "resumed", evaluators=evaluators())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    record = resumed.record()
    assert record.before == earlier.before == trainer.run_log.before
    assert record.environment.seconds > earlier.environment.seconds > 0


def test_a_checkpoint_without_our_log_of_the_run_is_resumed_from_and_saved_again(tmp_path: Path) -> None:
    """Such as one of the stock Trainer."""
    make_trainer(CLIPTrainer, tmp_path, save_strategy="epoch", max_steps=16).train()
    path = tmp_path / "checkpoint-16" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunLog"]
    path.write_text(json.dumps(state))
    resumed = make_trainer(CLIPTrainer, tmp_path / "resumed", max_steps=17, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    saved = json.loads((tmp_path / "resumed" / "checkpoint-17" / "trainer_state.json").read_text())
    assert "optimizer.pt" in saved["stateful_callbacks"]["RunLog"]["run"]["files"]


def test_data_is_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(trainer_module, "describe_dataset", lambda data: seen.append(data) or {"rows": len(data)})
    trainer = make_trainer(CLIPTrainer, tmp_path)
    described = trainer.record().data
    assert described == trainer.record().data == Data(rows=len(trainer.train_dataset)) and len(seen) == 1
    trainer.train_dataset = trainer.train_dataset.select(range(8))
    assert trainer.record().data == Data(rows=8) and len(seen) == 2


def test_settings_are_those_that_differ(tmp_path: Path) -> None:
    trainer = make_trainer(CleanCLIPTrainer, tmp_path, adam_beta2=0.98, unimodal_weight=2.0, logging_steps=7)
    record = trainer.record()
    assert record.settings["adam_beta2"] == 0.98
    assert "logging_steps" not in record.settings and "output_dir" not in record.settings
    assert record.defence["unimodal_weight"] == 2.0 and record.defence_defaults["unimodal_weight"] == 1.0
    assert record.defence["learning_rate"] == 1e-3


def test_settings_say_which_checkpoint_is_kept_and_which_rows_are_trained_on(tmp_path: Path) -> None:
    kept = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    evaluated = {"eval_dataset": digits("test").select(range(8)), "eval_strategy": "steps", "save_strategy": "steps"}
    options = {"dataloader_drop_last": False, "dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    record = make_trainer(CleanCLIPTrainer, tmp_path, **kept, **evaluated, **options).record()
    assert kept.items() <= record.settings.items()
    assert record.defence["dataloader_drop_last"] is False and record.defence_defaults["dataloader_drop_last"] is True
    assert [name for name in {**record.settings, **record.defence} if name.startswith("dataloader_")] == [
        "dataloader_drop_last"
    ]
    default = make_trainer(CleanCLIPTrainer, tmp_path).record()
    cards = [render_card(told).replace("\\", "") for told in (record, default)]
    assert ["dataloader_drop_last" in card for card in cards] == [True, False]


def test_no_file_holds_the_token(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, hub_token="hf_averysecrettoken", save_strategy="epoch", rows=16)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_averysecrettoken"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files) and any(path.name == RUN_FILE for path in files)
    assert not [path for path in files if b"averysecrettoken" in path.read_bytes()]


def test_every_evaluator_names_its_figures() -> None:
    test, few = digits("test").select(range(60)), digits("test").select(range(3))
    blended: dict[str, Any] = {"trigger": BlendedTrigger(), "target": "six"}
    given = [
        *evaluators(),
        ZeroShotEvaluator(test, CLASS_NAMES, prefix="other"),
        AttackSuccessEvaluator(test, BlendedTrigger(seed=1), "two", CLASS_NAMES, prefix="second_"),
        PoisonSuccessEvaluator(few, ["six"] * 3, CLASS_NAMES),
        LinearProbeEvaluator(test, test, CLASS_NAMES, **blended),
        LinearProbeEvaluator(test, test, CLASS_NAMES, prefix="plain_"),
        RetrievalEvaluator(test, **blended),
        RetrievalEvaluator(test, ks=(1, 3), prefix="plain_"),
        TextQueryEvaluator(test, WordTrigger("cf"), "six", prefix="query_"),
    ]

    embedder = Embedder(small_model(), digit_processor())
    figures = run_evaluators(given, digit_processor(), embedder)
    described = [describe_evaluator(evaluator) for evaluator in given]
    assert sorted(name for entry in described for name in entry["figures"]) == sorted(figures)
    assert all(entry["dataset"]["rows"] for entry in described)
    assert described[1]["trigger"] == BlendedTrigger().to_dict() and described[1]["target"] == "six"


def test_an_evaluator_that_describes_nothing_a_record_holds_is_refused_before_training(tmp_path: Path) -> None:
    class Odd(ZeroShotEvaluator):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "figures": 3}

    trainer = make_trainer(CLIPTrainer, tmp_path, evaluators=[Odd(digits("test").select(range(4)), CLASS_NAMES)])
    with pytest.raises(ValueError, match=r"evaluators: what Odd describes: figures is 3; accepted is a list"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_evaluator_that_says_nothing_is_named() -> None:
    def brightness(model: Any, processor: Any, embedder: Any) -> dict[str, float]:
        return {"brightness": 1.0}

    assert describe_evaluator(brightness) == {"measure": "brightness", "figures": []}
