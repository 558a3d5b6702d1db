from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training import digits, make_trainer, poisoned_pairs

from hf_robust_clip import AttackSuccessEvaluator, CLIPTrainer, PatchTrigger, RoCLIPTrainer
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.trainers import pictures

Trained = Callable[[type[CLIPTrainer]], CLIPTrainer]


def test_pictures_are_those_that_the_evaluator_saw(trained: Trained) -> None:
    trainer = trained(CLIPTrainer)
    found = trainer.pictures().attacks
    assert list(found) == ["attack_success_rate", "patch_attack_success_rate"]
    embedder = trainer.make_embedder()
    for evaluator, shown in zip(trainer.evaluators[1:], found.values(), strict=True):
        labels = evaluator.labels.numpy()
        assert (shown.is_target == (labels == CLASS_NAMES.index(evaluator.target))).all()
        np.testing.assert_allclose(shown.clean, embedder.embed_images(evaluator.dataset), atol=1e-5)
        triggered = embedder.embed_images(evaluator.dataset, trigger=evaluator.trigger)
        np.testing.assert_allclose(shown.triggered, triggered, atol=1e-5)
        names = [image.name for image in shown.images]
        assert len(set(names)) == len(names) == 5 and evaluator.target not in names
        for image in shown.images:
            clean, changed = np.asarray(image.clean), np.asarray(image.triggered)
            np.testing.assert_array_equal(evaluator.trigger(clean), changed)
            change = np.abs(changed.astype(int) - clean)
            np.testing.assert_allclose(np.asarray(image.difference), change * shown.amplification, atol=0.51)
        assert max(np.asarray(image.difference).max() for image in shown.images) == 255


def test_few_images_of_many_are_drawn(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(CLIPTrainer)
    whole = trainer.pictures().attacks["attack_success_rate"]
    monkeypatch.setattr(pictures, "EMBEDDED", 12)
    part = trainer.pictures().attacks["attack_success_rate"]
    # The shown ones are among them, and the same.
    assert 12 <= len(part.clean) == len(part.triggered) == len(part.is_target) <= 17 < len(whole.clean)
    assert [image.name for image in part.images] == [image.name for image in whole.images]
    assert [image.called_triggered for image in part.images] == [image.called_triggered for image in whole.images]


@pytest.mark.parametrize("kind", [list, "transform"])
def test_images_of_any_dataset(kind: Any, tmp_path: Path) -> None:
    test = digits("test").select(range(20))
    dataset = list(test) if kind is list else test.with_transform(lambda rows: rows)
    evaluator = AttackSuccessEvaluator(dataset, PatchTrigger(size=3), "six", CLASS_NAMES)
    shown = make_trainer(CLIPTrainer, tmp_path, evaluators=[evaluator]).pictures().attacks["attack_success_rate"]
    assert len(shown.clean) == 20 and len(shown.images) == 5


def test_matches_are_the_nearest_in_the_pool(trained: Trained) -> None:
    trainer = trained(RoCLIPTrainer)
    pairs = trainer.train_dataset
    matches = trainer.pictures().matches
    rows = [
        row for flag in (True, False) for row in np.flatnonzero(np.asarray(pairs["poisoned"]) == flag)[:4].tolist()
    ]
    assert [match.poisoned for match in matches] == 4 * [True] + 4 * [False]
    assert [match.caption for match in matches] == [pairs[row]["caption"] for row in rows]
    pool = trainer.pools.text
    queries = trainer.make_embedder().embed_images(pairs.select(rows)).double()
    nearest = pool.keys[(queries @ pool.features.double().T).argmax(dim=1)].tolist()
    assert [match.matched for match in matches] == [pairs[row]["caption"] for row in nearest]


def test_captions_are_matched_where_training_matches_captions(tmp_path: Path) -> None:
    trainer = make_trainer(
        RoCLIPTrainer, tmp_path, matching="unimodal", train_dataset=poisoned_pairs(48), pool_size=48
    )
    assert trainer.pictures().matches == []  # an empty pool
    trainer.train()
    embedder, pool = trainer.make_embedder(), trainer.pools.text
    matches = trainer.pictures().matches
    queries = embedder.embed_texts([match.caption for match in matches]).double()
    nearest = pool.keys[(queries @ pool.features.double().T).argmax(dim=1)].tolist()
    assert [match.matched for match in matches] == [trainer.train_dataset[row]["caption"] for row in nearest]


def test_pairs_of_unknown_kind_and_lists_of_captions(tmp_path: Path) -> None:
    rows = [{"image": row["image"], "caption": [row["caption"], "other"]} for row in poisoned_pairs(32)]
    rows[1]["image"] = b"broken"
    trainer = make_trainer(RoCLIPTrainer, tmp_path, train_dataset=rows, on_bad_row="skip", num_train_epochs=1)
    trainer.train()
    matches = trainer.pictures().matches
    assert len(matches) == 8 and {match.poisoned for match in matches} == {None}
    first = [row["caption"][0] for number, row in enumerate(rows) if number != 1][:8]
    assert [match.caption for match in matches] == first
    assert {match.matched for match in matches} <= {row["caption"][0] for row in rows}


def test_streams_have_no_matches(tmp_path: Path) -> None:
    stream = poisoned_pairs(64).to_iterable_dataset()
    settings = {"steps_per_matching_epoch": 2, "matching_start_epoch": 1, "max_steps": 6}
    trainer = make_trainer(RoCLIPTrainer, tmp_path, train_dataset=stream, **settings)
    trainer.train()
    assert trainer.pools.full and trainer.pictures().matches == []


def test_other_trainers_have_no_matches(trained: Trained) -> None:
    assert trained(CLIPTrainer).pictures().matches == []
