"""RoCLIP: what a matching step computes, when steps match, what the pools hold, and what is logged of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.recording import Queue, RecordedRoCLIP, Step, clip, nearest
from support.training import digits, make_trainer, poisoned_pairs, training_log

from hf_robust_clip import CLIPTrainer, RoCLIPTrainer, RoCLIPTrainingArguments
from hf_robust_clip.defences import RoCLIP
from hf_robust_clip.defences.roclip import adversarial_rows

ROWS, BATCH, POOL = 32, 8, 20
#: Four epochs of four steps, of which the second and the last match.
RUN: dict[str, Any] = {"rows": ROWS, "num_train_epochs": 4, "pool_size": POOL, "matching_start_epoch": 1}
TARGET = "eight"


@pytest.fixture(scope="module", params=[("cross", "float32"), ("image_to_text", "float32"), ("unimodal", "bfloat16")])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained trainer for each way of matching."""
    matching, dtype = request.param
    trainer = make_trainer(
        RecordedRoCLIP,
        tmp_path_factory.mktemp("run"),
        train_dataset=poisoned_pairs(ROWS),
        matching=matching,
        pool_dtype=dtype,
        adversarial_phrase=TARGET if matching == "cross" else None,
        **RUN,
    )
    trainer.train()
    return trainer


def queue_before(run: Any, number: int) -> Queue:
    return Queue.before(run.steps, number, POOL, "augmented", getattr(torch, run.args.pool_dtype))


def matching_steps(run: Any) -> list[tuple[int, Step]]:
    return [(number, step) for number, step in enumerate(run.steps) if step.epoch in (1, 3)]


def text_queries(run: Any, step: Step) -> torch.Tensor:
    """What looks up captions."""
    return step.views["augmented"][1 if run.args.matching == "unimodal" else 0]


def test_matching_step_is_the_loss_against_the_pools_before_the_batch(run: Any) -> None:
    for number, step in matching_steps(run):
        queue, (images, texts) = queue_before(run, number), step.views["augmented"]
        matched_texts = queue.texts[nearest(text_queries(run, step), queue.texts)]
        expected = {"image_match_loss": clip(images, matched_texts, step.scale)}
        if run.args.matching != "image_to_text":
            queries = images if run.args.matching == "unimodal" else texts
            matched_images = queue.images[nearest(queries, queue.images)]
            expected = {
                "image_match_loss": expected["image_match_loss"] / 2,
                "text_match_loss": clip(matched_images, texts, step.scale) / 2,
            }
        assert step.terms == pytest.approx(expected, rel=1e-4)


def test_other_epochs_are_clip_on_the_augmented_pairs(run: Any) -> None:
    others = [step for step in run.steps if step.epoch in (0, 2)]
    assert len(others) == 8
    for step in others:
        assert step.terms == pytest.approx({"clip_loss": clip(*step.views["augmented"], step.scale)}, rel=1e-5)


def test_pools_hold_the_last_pairs_of_all_epochs_by_row_number(run: Any) -> None:
    queue = queue_before(run, len(run.steps))
    for pool, expected in ((run.pools.image, queue.images), (run.pools.text, queue.texts)):
        order = pool.keys.argsort(stable=True)
        assert torch.equal(pool.keys[order], queue.rows[queue.rows.argsort(stable=True)])
        for row in set(queue.rows.tolist()):
            found, wanted = pool.features[pool.keys == row], expected[queue.rows == row]
            assert sorted(found.tolist()) == sorted(wanted.tolist())
        assert pool.features.dtype == getattr(torch, run.args.pool_dtype)


def test_log_of_matches(run: Any) -> None:
    logs = training_log(run)
    for number, step in matching_steps(run):
        queue, queries = queue_before(run, number), text_queries(run, step)
        slots = nearest(queries, queue.texts)
        counts = slots.bincount()
        similarity = (queries * queue.texts[slots].float()).sum(dim=1).mean().item()
        assert logs[number]["distinct_matches"] == pytest.approx((counts > 0).sum().item() / BATCH)
        assert logs[number]["largest_match_share"] == pytest.approx(counts.max().item() / BATCH)
        assert logs[number]["match_similarity"] == pytest.approx(similarity, abs=1e-5)


def test_steps_that_match_nothing_log_nothing_of_matches(run: Any) -> None:
    names = {"distinct_matches", "largest_match_share", "match_similarity", "poisoned_match_adversarial"}
    for step, entry in zip(run.steps, training_log(run), strict=True):
        assert (names - {"poisoned_match_adversarial"} <= entry.keys()) == (step.epoch in (1, 3))
        assert step.epoch in (1, 3) or not names & entry.keys()


def test_log_of_the_similarity_of_clean_and_poisoned_pairs(run: Any) -> None:
    for step, entry in zip(run.steps, training_log(run), strict=True):
        images, texts = step.views["augmented"]
        similarities = (images * texts).sum(dim=1)
        assert entry["pair_similarity"] == pytest.approx(similarities.mean().item(), abs=1e-5)
        groups = {"poisoned_pair_similarity": step.poisoned, "clean_pair_similarity": ~step.poisoned}
        for name, where in groups.items():
            if where.any():
                assert entry[name] == pytest.approx(similarities[where].mean().item(), abs=1e-5)
            else:
                assert name not in entry


def test_log_of_poisons_that_meet_captions_of_their_class(run: Any) -> None:
    # With an adversarial_phrase a clean caption that names it is adversarial too.
    captions = run.train_dataset["caption"]
    adversarial = torch.tensor(run.train_dataset["poisoned"])
    if run.args.adversarial_phrase:
        named = torch.tensor([TARGET in caption for caption in captions])
        assert (named & ~adversarial).any()
        adversarial = adversarial | named
    logs, seen = training_log(run), 0
    for number, step in matching_steps(run):
        queue = queue_before(run, number)
        rows = queue.rows[nearest(text_queries(run, step), queue.texts)]
        if step.poisoned.any():
            seen += 1
            expected = adversarial[rows][step.poisoned].float().mean().item()
            assert logs[number]["poisoned_match_adversarial"] == pytest.approx(expected)
        else:
            assert "poisoned_match_adversarial" not in logs[number]
    assert seen


def test_log_of_the_pools_fill_and_age(run: Any) -> None:
    # Of 20 pairs in batches of 8, the oldest are four of the batch before the last one.
    logs = training_log(run)
    assert [entry["pool_fill"] for entry in logs] == [8 / 20, 16 / 20] + [1.0] * 14
    assert [entry["pool_age"] for entry in logs] == [0, 1] + [2] * 14


def test_pool_age_counts_optimizer_steps(tmp_path: Path) -> None:
    trainer = make_trainer(RoCLIPTrainer, tmp_path, pool_size=40, gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    assert [entry["pool_age"] for entry in training_log(trainer)] == [0.5, 1.5, 2, 2]


def test_adversarial_rows_are_unknown_where_a_transform_makes_the_captions() -> None:
    data = digits().select(range(8)).add_column("poisoned", [True] + 7 * [False])
    transformed = data.with_transform(lambda rows: 1 / 0)
    assert adversarial_rows(transformed, "caption", TARGET) is None
    assert adversarial_rows(transformed, "caption", None).tolist() == data["poisoned"][:]


def test_adversarial_rows_of_lists_of_captions(tmp_path: Path) -> None:
    # Whole words, whatever the case, as the poisoner reads captions: eighteen is no eight.
    captions = [["a one", "an EIGHT"], ["a two"], ["eight things", "a three"], ["eighteen"]] * 3
    data = digits().select(range(12)).remove_columns("caption").add_column("caption", captions)
    data = data.add_column("poisoned", [False, True, False, False] * 3)
    trainer = make_trainer(RoCLIPTrainer, tmp_path, train_dataset=data, adversarial_phrase=TARGET)
    assert trainer.defence.adversarial.tolist() == [True, True, True, False] * 3
    trainer = make_trainer(RoCLIPTrainer, tmp_path, train_dataset=data)
    assert trainer.defence.adversarial.tolist() == [False, True, False, False] * 3


def test_nothing_is_said_of_poisons_without_the_column(tmp_path: Path) -> None:
    trainer = make_trainer(RoCLIPTrainer, tmp_path, pool_size=8, matching_start_epoch=0, max_steps=3)
    trainer.train()
    assert not any("poisoned" in name for entry in training_log(trainer) for name in entry)


def test_without_matching_epochs_it_is_clip_with_augmentation(tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_preset": "strong", "text_preset": "eda", "max_steps": 4}
    options |= {"lr_scheduler_type": "cosine", "weight_decay": 0.1}
    plain = make_trainer(CLIPTrainer, tmp_path, **options)
    plain.train()
    unmatched = make_trainer(RoCLIPTrainer, tmp_path, **{**options, "matching_start_epoch": 99})
    unmatched.train()
    assert plain.views == unmatched.views == ("augmented",)
    one, two = plain.model.state_dict(), unmatched.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- When steps match ----


@pytest.mark.parametrize(
    "start, every, expected",
    [(0, 1, [0, 1, 2, 3, 4, 5, 6]), (0, 2, [0, 2, 4, 6]), (3, 2, [3, 5]), (1, 3, [1, 4]), (9, 1, [])],
)
def test_which_epochs_match(start: int, every: int, expected: list[int]) -> None:
    defence = RoCLIP(100, matching_start_epoch=start, match_every_n_epochs=every)
    matching = []
    for defence.epoch in range(7):
        matching += [defence.epoch] if defence.is_matching(step=0) else []
    assert matching == expected


def test_steps_count_as_epochs_if_told_so() -> None:
    defence = RoCLIP(100, matching_start_epoch=1, match_every_n_epochs=2, steps_per_matching_epoch=3)
    assert [step for step in range(13) if defence.is_matching(step)] == [3, 4, 5, 9, 10, 11]


def test_matching_waits_for_full_pools(tmp_path: Path) -> None:
    trainer = make_trainer(RecordedRoCLIP, tmp_path, pool_size=17, matching_start_epoch=0, max_steps=5)
    trainer.train()
    assert ["clip_loss" in step.terms for step in trainer.steps] == [True, True, True, False, False]


def test_stream_matches_by_steps_and_knows_no_rows(tmp_path: Path) -> None:
    stream = digits().select(range(19)).to_iterable_dataset()
    trainer = make_trainer(
        RecordedRoCLIP,
        tmp_path,
        train_dataset=stream,
        pool_size=8,
        matching_start_epoch=1,
        match_every_n_epochs=2,
        steps_per_matching_epoch=2,
        max_steps=8,
    )
    trainer.train()
    matched = [number for number, step in enumerate(trainer.steps) if "image_match_loss" in step.terms]
    assert matched == [2, 3, 6, 7]
    assert set(trainer.pools.text.keys.tolist()) == {-1}


# ---- Pools ----


@pytest.mark.parametrize("size, expected", [(0.25, 16), (0.02, 2), (0.001, 2), (2, 2), (24, 24), (100, 100)])
def test_pool_size_is_a_number_or_a_share(size: float, expected: int, tmp_path: Path) -> None:
    trainer = make_trainer(RoCLIPTrainer, tmp_path, rows=64, pool_size=size)
    assert trainer.pools.size == expected
    assert not trainer.pools.full


def test_text_tower_learns_nothing_from_image_to_text(tmp_path: Path) -> None:
    trainer = make_trainer(
        RoCLIPTrainer, tmp_path, pool_size=8, matching_start_epoch=0, matching="image_to_text", max_steps=3
    )
    batches = iter(trainer.get_train_dataloader())
    model = trainer.model.train()
    trainer.compute_loss(model, trainer._prepare_inputs(next(batches)))  # fills the pools
    trainer.compute_loss(model, trainer._prepare_inputs(next(batches))).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("text_"):
            assert parameter.grad is not None and not parameter.grad.any(), name
    assert model.visual_projection.weight.grad.any()
    trainer.train()
    assert trainer.state.global_step == 3


# ---- The warning ----


def log_of(trainer: Any, share: float) -> None:
    trainer.means.add({"largest_match_share": torch.tensor(share), "distinct_matches": torch.tensor(0.125)})
    trainer.log({"loss": 1.0})


def test_collapse_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(RoCLIPTrainer, tmp_path)
    log_of(trainer, 0.75)
    log_of(trainer, 1.0)
    assert caplog.text.count("Matching has collapsed") == 1
    assert "one caption of the pool serves 75% of a batch (distinct_matches 12.5%)" in caplog.text


def test_no_collapse_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(RoCLIPTrainer, tmp_path)
    log_of(trainer, 0.5)
    trainer.log({"loss": 1.0})
    assert "collapsed" not in caplog.text


@pytest.mark.parametrize(
    "change, warning",
    [
        ({"matching_start_epoch": 2}, "ends after epoch 2, before the first matching epoch (matching_start_epoch=2,"),
        (
            {"steps_per_matching_epoch": 4},
            "ends after step 4, before the first matching epoch (matching_start_epoch=1",
        ),
        ({"pool_size": 25}, "The pools of 25 pairs (pool_size=25) do not fill before training ends, after 32 pairs"),
        ({"steps_per_matching_epoch": 3}, None),
        ({"pool_size": 24}, None),
    ],
)
def test_training_that_never_matches_is_warned_of(
    change: dict[str, Any], warning: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(RoCLIPTrainer, tmp_path, **{"rows": 16, "num_train_epochs": 2, "pool_size": 8, **change})
    trainer.train()
    matched = any("image_match_loss" in entry for entry in training_log(trainer))
    assert matched == (warning is None) == ("it will be CLIP throughout" not in caplog.text)
    assert warning is None or warning in caplog.text


# ---- Arguments ----


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"pool_size": 0},
            r"pool_size must be a whole number of pairs from 2 on, or a share .* in \(0, 1\), but is 0",
        ),
        ({"pool_size": -3}, "pool_size must be .*, but is -3"),
        ({"pool_size": 1.5}, "pool_size must be .*, but is 1.5"),
        ({"pool_size": 1}, "pool_size must be .* from 2 on, .*, but is 1"),
        ({"pool_size": True}, "pool_size must be .*, but is True"),
        ({"pool_size": float("nan")}, "pool_size must be .*, but is nan"),
        ({"pool_size": float("inf")}, "pool_size must be .*, but is inf"),
        ({"pool_dtype": "float16"}, "pool_dtype must be one of 'float32', 'bfloat16', but is 'float16'"),
        ({"matching": "both"}, "matching must be one of 'cross', 'image_to_text', 'unimodal', but is 'both'"),
        ({"match_every_n_epochs": 0}, "match_every_n_epochs must be a whole number of at least 1, but is 0"),
        ({"match_every_n_epochs": 2.0}, "match_every_n_epochs must be a whole number of at least 1, but is 2.0"),
        ({"match_every_n_epochs": True}, "match_every_n_epochs must be a whole number of at least 1, but is True"),
        ({"matching_start_epoch": -1}, "matching_start_epoch must be a whole number of at least 0, but is -1"),
        ({"matching_start_epoch": 0.5}, "matching_start_epoch must be a whole number of at least 0, but is 0.5"),
        ({"steps_per_matching_epoch": 0}, "steps_per_matching_epoch must be a whole number of at least 1, but is 0"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RoCLIPTrainingArguments(str(tmp_path), use_cpu=True, **change)


def test_stream_needs_to_know_what_an_epoch_is(tmp_path: Path) -> None:
    stream = digits().select(range(16)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"train_dataset has no length.*set steps_per_matching_epoch"):
        make_trainer(RoCLIPTrainer, tmp_path, train_dataset=stream, max_steps=2)


def test_stream_refuses_a_pool_that_is_a_share_of_it(tmp_path: Path) -> None:
    stream = digits().select(range(16)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"pool_size=0\.1 is a share of train_dataset, whose length is unknown"):
        make_trainer(
            RoCLIPTrainer, tmp_path, train_dataset=stream, max_steps=2, pool_size=0.1, steps_per_matching_epoch=2
        )


def test_trainer_without_training_data_evaluates(tmp_path: Path) -> None:
    trainer = make_trainer(RoCLIPTrainer, tmp_path, train_dataset=None, eval_dataset=digits("test").select(range(8)))
    assert trainer.pools is None
    assert trainer.evaluate()["eval_loss"] > 0
