"""A training that destroys what the model knows is warned of once, and one that has yet to learn is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.training import SHORT, digits, make_trainer, training_log

from hf_robust_clip import CLIPTrainer, ZeroShotEvaluator
from hf_robust_clip.batch import Embeddings, encode_pairs
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES
from hf_robust_clip.trainers import step as step_module
from hf_robust_clip.trainers.collapse import CollapseWatch


def test_measure_is_the_mean_cosine_of_different_rows() -> None:
    sides = [F.normalize(torch.randn(7, 5), dim=1) for _ in range(2)]
    measured = CollapseWatch.measure(Embeddings(*sides))
    for value, side in zip(measured.values(), sides, strict=True):
        different = ~torch.eye(7, dtype=torch.bool)
        torch.testing.assert_close(value, (side @ side.T)[different].mean())
    assert CollapseWatch.measure(Embeddings(*(side[:1] for side in sides))) == {}


@pytest.mark.parametrize(
    "course, expected",
    [
        ([(1, 0.999), (10, 0.6), (20, 0.995)], "At step 20 the images of a batch"),
        ([(1, 0.999), (24, 0.999)], ""),  # has yet to learn
        ([(1, 0.999), (25, 0.999), (50, 0.999)], "At step 25 the images of a batch"),
        ([(1, 0.5), (50, 0.98)], ""),
    ],
)
def test_embeddings_all_alike(
    course: list[tuple[int, float]], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = CollapseWatch()
    for step, alike in course:
        means = {"image_alike": alike, "text_alike": 0.3, "loss": 1.0}
        watch.look(means, step, 100)
        assert means == {"loss": 1.0}
    assert expected in caplog.text and caplog.text.count("nearly the same embedding") == bool(expected)


@pytest.mark.parametrize("cls", SHORT)
def test_a_collapsed_tower_is_seen_in_training(
    cls: type[CLIPTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(cls, tmp_path, max_steps=4)

    def collapsed(model: Any, inputs: dict[str, Any]) -> Any:
        embeddings = encode_pairs(model, inputs)
        return embeddings._replace(text_embeds=0 * embeddings.text_embeds + embeddings.text_embeds[:1])

    monkeypatch.setattr(step_module, "encode_pairs", collapsed)
    trainer.train()
    assert "the captions of a batch have nearly the same embedding" in caplog.text
    assert "look whether the captions differ" in caplog.text
    if cls is CLIPTrainer:  # a second training is warned of by itself
        caplog.clear()
        trainer.train()
        assert "the captions of a batch have nearly the same embedding" in caplog.text
    assert not any("alike" in name for entry in training_log(trainer) for name in entry)


@pytest.mark.parametrize(
    "figures, warned",
    [
        ([(0, 0.9), (10, 0.6), (20, 0.2)], True),
        ([(0, 0.9), (10, 0.8), (20, 0.2)], False),  # later ones are the user's to judge
        ([(0, 0.12), (10, 0.08)], False),  # chance
        ([(10, 0.9), (20, 0.1)], False),  # not measured before training
    ],
)
def test_accuracy_that_falls_at_once(
    figures: list[tuple[int, float]], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = CollapseWatch()
    for step, accuracy in figures:
        watch.judge({"clean_accuracy": accuracy, "attack_success_rate": 0.5}, step)
    watch.judge({"attack_success_rate": 0.5}, 30)
    assert ("destroys what the model knew" in caplog.text) == warned


def test_each_training_is_warned_of_by_what_was_measured_before_it(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch()
    watch.judge({"clean_accuracy": 0.9}, 0)
    for after in (0.6, 0.3):
        watch.begin()
        watch.look({"text_alike": 0.999}, 50, 100)
        watch.judge({"clean_accuracy": after}, 100)
    assert caplog.text.count("the captions of a batch have nearly the same embedding") == 2
    assert "fell from 90.0% to 60.0%" in caplog.text and "fell from 60.0% to 30.0%" in caplog.text


@pytest.mark.parametrize("before", ["run_evaluators", "eval_on_start"])
def test_a_learning_rate_that_destroys_the_model(
    before: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = digits("test").select(range(40))
    options: dict[str, Any] = {"num_train_epochs": 1, "eval_strategy": "epoch", "learning_rate": 1e6}
    trainer = make_trainer(
        CLIPTrainer,
        tmp_path,
        evaluators=[ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES)],
        eval_on_start=before == "eval_on_start",
        stop_on_non_finite=False,
        **options,
    )
    # As if it knew the digits.
    judge = trainer.watch.collapse.judge
    trainer.watch.collapse.judge = lambda figures, step: judge(figures if step else {"clean_accuracy": 0.9}, step)  # type: ignore[method-assign]
    if before == "run_evaluators":
        trainer.run_evaluators()
    trainer.train()
    assert "clean_accuracy fell from 90.0%" in caplog.text
