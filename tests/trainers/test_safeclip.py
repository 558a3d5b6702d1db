"""SafeCLIP: its phases and their learning rates, which loss each batch gets, and the split from epoch to epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.recording import Queue, RecordedSafeCLIP, Step, clip, info_nce, nearest
from support.streaming import TorchStream
from support.training import broken, digits, make_trainer, poisoned_pairs, small_model, training_log

from hf_robust_clip import SafeCLIPTrainer, SafeCLIPTrainingArguments, fit_similarity_mixture
from hf_robust_clip.defences import SafeCLIP
from hf_robust_clip.defences.base import PairScores

ROWS, BATCH, POOL = 48, 8, 20
#: Five epochs of five steps: unimodal, CLIP, and three with a split.
STEPS, EPOCHS = 5, 5


@pytest.fixture(scope="module")
def scores() -> dict[int, PairScores]:
    """What the pairs scored in each epoch of `run`."""
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scores: dict[int, PairScores]) -> Any:
    """A trained trainer."""
    trainer = make_trainer(
        RecordedSafeCLIP,
        tmp_path_factory.mktemp("run"),
        train_dataset=poisoned_pairs(ROWS),
        num_train_epochs=EPOCHS,
        unimodal_pool_size=POOL,
        warmup_steps=3,
        warmup_unimodal_learning_rate=4e-4,
        safe_threshold=0.5,
        safe_growth=0.1,
    )

    score_pairs = trainer.score_pairs

    def spy(epoch: int, augmented: bool) -> PairScores:
        scores[epoch] = score_pairs(epoch, augmented)
        return scores[epoch]

    trainer.score_pairs = spy
    trainer.train()
    return trainer


def unimodal_terms(run: Any, number: int) -> dict[str, float]:
    """By hand: a second view against the nearest neighbour of the first, or the first while pools fill."""
    step, queue = run.steps[number], None
    if number * BATCH >= POOL:
        queue = Queue.before(run.steps, number, POOL, "first")
    terms = {}
    for side, name in enumerate(("image", "text")):
        first, second = step.views["first"][side], step.views["second"][side]
        keys = first if queue is None else queue[side][nearest(first, queue[side])]
        terms[f"unimodal_{name}_loss"] = info_nce(second, keys, step.scale) / 2
    return terms


def cross_terms(step: Step) -> dict[str, float]:
    (images, texts), (images_2, texts_2) = step.views["first"], step.views["second"]
    return {
        "image_to_text_loss": info_nce(images, texts_2, step.scale) / 2,
        "text_to_image_loss": info_nce(texts, images_2, step.scale) / 2,
    }


# ---- Phases ----


def test_learning_rates_of_the_phases_are_one_schedule(run: Any) -> None:
    expected = []
    for step in range(STEPS * EPOCHS):
        cosine = (1 + math.cos(math.pi * (step - 3) / (STEPS * EPOCHS - 3))) / 2
        schedule = step / 3 if step < 3 else cosine
        expected.append({0: 4e-4 * schedule, 1: 1e-5}.get(step // STEPS, 1e-3 * schedule))
    assert run.learning_rates == pytest.approx(expected, rel=1e-9)


def test_learning_rate_of_the_unimodal_warmup_is_that_of_the_rest_by_default(tmp_path: Path) -> None:
    trainer = make_trainer(
        RecordedSafeCLIP, tmp_path, max_steps=8, lr_scheduler_type="constant", warmup_cross_learning_rate=3e-6
    )
    trainer.train()
    assert trainer.learning_rates == pytest.approx([1e-3] * 7 + [3e-6])


def test_learning_rates_of_the_warmup_are_kept_to_with_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = small_model()
    groups = [{"params": model.vision_model.parameters(), "lr": 2e-3}, {"params": model.text_model.parameters()}]
    options: dict[str, Any] = {"rows": 24, "lr_scheduler_type": "constant", "learning_rate": 7e-4}
    options |= {"warmup_unimodal_learning_rate": 4e-4, "warmup_cross_learning_rate": 6e-6}
    trainer = make_trainer(
        RecordedSafeCLIP, tmp_path, model=model, optimizers=(torch.optim.SGD(groups, lr=1e-3), None), **options
    )
    trainer.train()
    assert trainer.learning_rates == pytest.approx([4e-4] * 2 + [6e-6] * 2 + [2e-3] * 2)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([2e-3, 1e-3])


def test_pairs_are_split_in_each_epoch_after_the_warmup(run: Any) -> None:
    assert [safe is None for safe in run.safe] == [True, True, False, False, False]
    assert [record.epoch for record in run.splits.records] == [2, 3, 4]


def test_no_warmup_splits_at_once(tmp_path: Path) -> None:
    trainer = make_trainer(RecordedSafeCLIP, tmp_path, warmup_unimodal_epochs=0, warmup_cross_epochs=0, max_steps=2)
    trainer.train()
    assert [record.epoch for record in trainer.splits.records] == [0]


def test_batches_are_all_safe_or_all_risky(run: Any) -> None:
    kinds = []
    for step in run.steps[2 * STEPS :]:
        kinds.append(set(run.safe[step.epoch][step.rows].tolist()))
    assert all(len(kind) == 1 for kind in kinds)
    assert {True} in kinds and {False} in kinds


def test_no_row_comes_twice_in_an_epoch(run: Any) -> None:
    for epoch in range(EPOCHS):
        rows = [row for step in run.steps if step.epoch == epoch for row in step.rows]
        assert len(set(rows)) == len(rows) == STEPS * BATCH


def test_each_batch_gets_the_loss_of_its_kind(run: Any) -> None:
    for number, step in enumerate(run.steps):
        if step.epoch == 1:
            expected = {"clip_loss": clip(*step.views["first"], step.scale)}
        elif step.epoch >= 2 and run.safe[step.epoch][step.rows[0]]:
            expected = cross_terms(step)
        else:
            expected = unimodal_terms(run, number)
        assert step.terms == pytest.approx(expected, rel=1e-4), (number, step.epoch)


def test_without_pools_a_views_own_copy_is_its_positive(tmp_path: Path) -> None:
    trainer = make_trainer(RecordedSafeCLIP, tmp_path, unimodal_pool_size=0, max_steps=3)
    trainer.train()
    assert trainer.pools is None
    for step in trainer.steps:
        expected = {
            f"unimodal_{name}_loss": info_nce(step.views["second"][side], step.views["first"][side], step.scale) / 2
            for side, name in enumerate(("image", "text"))
        }
        assert step.terms == pytest.approx(expected, rel=1e-4)


def test_kinds_stay_in_step_when_a_callback_ends_epochs_early(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class TwoStepsAnEpoch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step % 2 == 0

    options: dict[str, Any] = {"warmup_unimodal_epochs": 0, "safe_threshold": 0.5, "num_train_epochs": 4}
    trainer = make_trainer(RecordedSafeCLIP, tmp_path, callbacks=[TwoStepsAnEpoch()], **options)
    trainer.train()
    routed = [step for step in trainer.steps if step.epoch > 0]
    assert len(routed) == 6
    for step in routed:
        safe = trainer.safe[step.epoch][step.rows]
        assert safe.all() == safe.any() == ("image_to_text_loss" in step.terms)


def test_loader_made_in_training_leaves_the_kinds_alone(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class MakesALoader(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.get_train_dataloader()

    options: dict[str, Any] = {"warmup_unimodal_epochs": 0, "warmup_cross_epochs": 0, "safe_threshold": 0.5}
    trainer = make_trainer(RecordedSafeCLIP, tmp_path, callbacks=[MakesALoader()], max_steps=9, **options)
    trainer.train()
    for step in trainer.steps:
        safe = trainer.safe[step.epoch][step.rows]
        assert safe.all() == safe.any() == ("image_to_text_loss" in step.terms)


# ---- Split ----


def test_first_split_is_by_threshold_and_later_ones_grow(run: Any, scores: dict[int, PairScores]) -> None:
    similarities = scores[2].similarities
    first = fit_similarity_mixture(similarities, seed=0) >= 0.5
    assert 0 < first.sum() < 0.8 * ROWS
    assert run.safe[2].tolist() == first.tolist()
    for epoch in (3, 4):
        count = min(round(first.sum() + 0.1 * (epoch - 2) * ROWS), int(0.85 * ROWS))
        top = np.argsort(-scores[epoch].similarities, kind="stable")[:count]
        assert np.flatnonzero(run.safe[epoch]).tolist() == sorted(top.tolist())


def test_records_are_logged(run: Any) -> None:
    logged = [entry for entry in run.state.log_history if "split_safe_share" in entry]
    assert len(logged) == 3
    for entry, record in zip(logged, run.splits.records, strict=True):
        for name, value in record._asdict().items():
            assert entry[f"split_{name}"] == value
    assert not any(name.startswith("split_") for entry in training_log(run) for name in entry)


def test_what_is_not_known_is_not_logged(tmp_path: Path) -> None:
    trainer = make_trainer(SafeCLIPTrainer, tmp_path, warmup_unimodal_epochs=0, warmup_cross_epochs=0, max_steps=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "split_safe_share" in entry)
    assert not {"split_auroc", "split_poisons_in_safe_set", "split_safe_set_poison_rate"} & entry.keys()


def test_split_is_a_column_that_fits_the_dataset(run: Any) -> None:
    joined = datasets.concatenate_datasets([run.train_dataset, run.split], axis=1)
    assert joined.column_names == [*run.train_dataset.column_names, "safe"]
    assert joined.features["safe"].dtype == "bool"
    assert joined["safe"][:] == run.safe[4].tolist()
    assert joined["label"][:] == run.train_dataset["label"][:]


def test_no_split_before_the_first(tmp_path: Path) -> None:
    trainer = make_trainer(SafeCLIPTrainer, tmp_path)
    assert trainer.split is None
    assert trainer.splits.records == []


def test_unusable_rows_are_risky_and_never_in_a_safe_batch(tmp_path: Path) -> None:
    trainer = make_trainer(
        RecordedSafeCLIP,
        tmp_path,
        train_dataset=broken(32),
        on_bad_row="skip",
        warmup_unimodal_epochs=0,
        warmup_cross_epochs=0,
        safe_threshold=0.5,
        num_train_epochs=1,
    )
    trainer.train()
    assert not trainer.splits.safe[[3, 17]].any()
    assert trainer.splits.safe.any()
    for step in trainer.steps:
        if "image_to_text_loss" in step.terms:
            assert trainer.splits.safe[step.rows].all()


# ---- Warnings ----


def test_training_that_never_splits_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(SafeCLIPTrainer, tmp_path, rows=24, num_train_epochs=2).train()
    assert "Training ends after epoch 2, before the first split into safe and risky pairs" in caplog.text


def test_training_that_splits_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(SafeCLIPTrainer, tmp_path, rows=24, warmup_unimodal_epochs=0, num_train_epochs=2).train()
    assert "before the first split" not in caplog.text


@pytest.mark.parametrize(
    "similarities, threshold, word",
    [(np.full(64, 0.25), 0.9, "no"), (np.random.default_rng(0).normal(0.3, 0.1, 64), 1e-306, "every")],
)
@pytest.mark.filterwarnings("ignore:all 64 similarities")
def test_split_without_two_kinds_is_warned_of(
    similarities: np.ndarray,
    threshold: float,
    word: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    defence = SafeCLIP(64, safe_threshold=threshold, safe_cap=1.0)
    defence._split(2, lambda augmented: PairScores(similarities.astype(np.float32), None), BATCH)
    assert f"The split of epoch 2 calls {word} pair safe" in caplog.text


@pytest.mark.parametrize("cap, told", [(0.2, True), (0.25, False)])
def test_safe_set_that_fills_no_batch_is_warned_of(
    cap: float, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"warmup_unimodal_epochs": 0, "warmup_cross_epochs": 0, "num_train_epochs": 1}
    trainer = make_trainer(
        SafeCLIPTrainer, tmp_path, per_device_train_batch_size=16, safe_threshold=0.1, safe_cap=cap, **options
    )
    trainer.train()
    assert trainer.splits.records[0].safe_share > 0
    found = [statement.text for statement in SafeCLIP.findings(trainer.record())]
    assert ("The safe set of epoch 0 holds fewer pairs than a batch of all processes, 16" in caplog.text) == told
    assert any("fewer pairs than a batch safe in epoch 1, in which no image learned" in text for text in found) == told


def test_split_of_one_group_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    defence = SafeCLIP(6000, safe_threshold=0.5)
    # Of one mean, some more spread than the others.
    one = np.concatenate([generator.normal(0.3, 0.02, 3000), generator.normal(0.3, 0.1, 3000)])
    two = np.concatenate([generator.normal(0.1, 0.05, 3000), generator.normal(0.4, 0.05, 3000)])
    for epoch, similarities in enumerate((two, one)):
        defence._split(epoch, lambda augmented, s=similarities: PairScores(s.astype("f4"), None), BATCH)
    assert defence.splits.records[0].separation > 5
    assert "epoch 0" not in caplog.text
    assert "The mixture of epoch 1 found one group of similarities and not two" in caplog.text


# ---- Arguments ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"warmup_unimodal_epochs": -1}, "warmup_unimodal_epochs must be a whole number of at least 0, but is -1"),
        ({"warmup_unimodal_epochs": 1.5}, "warmup_unimodal_epochs must be a whole number of at least 0, but is 1.5"),
        ({"warmup_cross_epochs": -1}, "warmup_cross_epochs must be a whole number of at least 0, but is -1"),
        (
            {"warmup_unimodal_learning_rate": -1e-3},
            "warmup_unimodal_learning_rate must be None or at least 0, but is -0.001",
        ),
        (
            {"warmup_cross_learning_rate": float("nan")},
            "warmup_cross_learning_rate must be None or at least 0, but is nan",
        ),
        ({"safe_threshold": 0.0}, r"safe_threshold must be in \(0, 1\), but is 0.0"),
        ({"safe_threshold": 1.0}, r"safe_threshold must be in \(0, 1\), but is 1.0"),
        ({"safe_growth": -0.01}, r"safe_growth must be a share of the pairs in \[0, 1\], but is -0.01"),
        ({"safe_growth": 1.5}, r"safe_growth must be a share of the pairs in \[0, 1\], but is 1.5"),
        ({"safe_cap": 0.0}, r"safe_cap must be a share of the pairs in \(0, 1\], but is 0.0"),
        ({"safe_cap": 85}, r"safe_cap must be a share of the pairs in \(0, 1\], but is 85"),
        ({"score_views": "both"}, "score_views must be one of 'clean', 'augmented', but is 'both'"),
        ({"unimodal_pool_size": -1}, "unimodal_pool_size must be a whole number of pairs .*, but is -1"),
        ({"unimodal_pool_size": 1.5}, "unimodal_pool_size must be a whole number of pairs .*, but is 1.5"),
        ({"pool_dtype": "float16"}, "pool_dtype must be one of 'float32', 'bfloat16', but is 'float16'"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SafeCLIPTrainingArguments(str(tmp_path), use_cpu=True, **change)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"ignore_data_skip": True}, "ignore_data_skip=True"),
        ({"dataloader_drop_last": False}, "dataloader_drop_last=False"),
        ({"dataloader_in_order": False}, "dataloader_in_order=False"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches=True"),
    ],
)
def test_what_would_tear_batches_apart_is_refused(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} does not work with SafeCLIPTrainer.*set it to"):
        make_trainer(SafeCLIPTrainer, tmp_path, **change)


@pytest.mark.parametrize("stream", [digits().select(range(16)).to_iterable_dataset(), TorchStream(16)])
def test_stream_is_refused_with_a_way_out(stream: Any, tmp_path: Path) -> None:
    message = "is read in order, but SafeCLIP scores every pair .* load it as a map-style dataset .* RoCLIPTrainer"
    with pytest.raises(ValueError, match=message):
        make_trainer(SafeCLIPTrainer, tmp_path, train_dataset=stream, max_steps=2)


def test_schedule_that_is_no_function_of_the_step_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        SafeCLIPTrainer,
        tmp_path,
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_dataset=digits("test").select(range(8)),
    )
    with pytest.raises(ValueError, match="lr_scheduler_type='reduce_lr_on_plateau' does not work"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_too_few_rows_for_two_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length=12 rows are fewer than two batches of batch_size=8"):
        make_trainer(SafeCLIPTrainer, tmp_path, rows=12).train()


def test_pool_size_is_a_number_or_a_share(tmp_path: Path) -> None:
    assert make_trainer(SafeCLIPTrainer, tmp_path, unimodal_pool_size=0.25).pools.size == 16
    assert make_trainer(SafeCLIPTrainer, tmp_path, unimodal_pool_size=40).pools.size == 40


def test_pools_of_bfloat16(tmp_path: Path) -> None:
    trainer = make_trainer(SafeCLIPTrainer, tmp_path, pool_dtype="bfloat16", max_steps=4)
    trainer.train()
    assert trainer.pools.image.features.dtype == trainer.pools.text.features.dtype == torch.bfloat16
