"""The similarity of pairs over training: right figures, training left as it was, nothing lost by resuming."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.training import assert_same_bits, digits, make_trainer, poisoned_pairs
from transformers import TrainerControl, TrainerState

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, PairSimilarityCallback, SafeCLIPTrainer
from hf_robust_clip.callbacks import SimilarityRecord

NAMES = ["similarity", "similarity_q05", "similarity_q50", "similarity_q95"]


def by_hand(model: Any, processor: Any, dataset: Any, rows: list[int]) -> list[float]:
    """Mean and percentiles of the cosines of some pairs, from the model's own forward pass."""
    cosines = []
    model.eval()
    for row in rows:
        caption = dataset[row]["caption"]
        inputs = processor(
            images=dataset[row]["image"],
            text=caption if isinstance(caption, str) else caption[0],
            return_tensors="pt",
        )
        with torch.no_grad():
            outputs = model(**inputs)
        cosines.append(float(outputs.image_embeds[0] @ outputs.text_embeds[0]))
    return [float(np.mean(cosines)), *(float(np.percentile(cosines, share)) for share in (5, 50, 95))]


def record(callback: PairSimilarityCallback, model: Any, processor: Any, **options: Any) -> SimilarityRecord:
    """What the callback records at the start of a training of this model."""
    args: Any = SimpleNamespace(eval_batch_size=7, **options)
    state = TrainerState(epoch=0.0, global_step=0)
    callback.on_train_begin(args, state, TrainerControl(), model=model, processing_class=processor)
    assert len(callback.records) == len(state.log_history) == 1
    return callback.records[0]


def test_figures_by_hand(tiny_model, processor):
    model, pairs = tiny_model(3).train(), poisoned_pairs(20)
    found = record(PairSimilarityCallback(pairs), model, processor)
    assert (found.clean_pairs, found.poisoned_pairs, found.epoch, found.step) == (13, 7, 0.0, 0)
    for kind, rows in (("poisoned", range(0, 20, 3)), ("clean", [row for row in range(20) if row % 3])):
        expected = by_hand(model, processor, pairs, list(rows))
        assert [getattr(found, f"{kind}_{name}") for name in NAMES] == pytest.approx(expected, abs=1e-5)


def test_kinds_of_dataset_and_columns_give_the_same_record(tiny_model, processor):
    model, pairs = tiny_model(), poisoned_pairs(12)
    expected = record(PairSimilarityCallback(pairs), model, processor)
    listed = pairs.map(lambda row: {"caption": [row["caption"], "another"]}, keep_in_memory=True)
    renamed = pairs.rename_columns({"image": "photo", "caption": "text", "poisoned": "bad"})
    for callback in (
        PairSimilarityCallback(listed),
        PairSimilarityCallback(pairs.with_format("torch")),
        PairSimilarityCallback([dict(row) for row in pairs]),
        PairSimilarityCallback(renamed, "photo", "text", "bad"),
    ):
        assert record(callback, model, processor) == expected


def test_the_sample_is_of_each_kind_fixed_and_keyed_by_the_seed(tiny_model, processor):
    model, pairs = tiny_model(), poisoned_pairs(60)
    first, again, other = (PairSimilarityCallback(pairs, max_pairs=5, seed=seed) for seed in (0, 0, 1))
    found = record(first, model, processor)
    assert (found.clean_pairs, found.poisoned_pairs) == (5, 5)
    assert record(again, model, processor) == found != record(other, model, processor)
    few = record(PairSimilarityCallback(pairs, max_pairs=30), model, processor)
    assert (few.clean_pairs, few.poisoned_pairs) == (30, 20)


@pytest.mark.parametrize("poisoned", [True, False])
def test_a_kind_without_pairs_has_no_figures(tiny_model, processor, poisoned: bool):
    rows = [{**digits()[row], "poisoned": poisoned} for row in range(4)]
    found = record(PairSimilarityCallback(rows), tiny_model(), processor)
    absent, present = ("clean", "poisoned") if poisoned else ("poisoned", "clean")
    assert getattr(found, f"{absent}_pairs") == 0 and getattr(found, f"{present}_pairs") == 4
    assert all(math.isnan(getattr(found, f"{absent}_{name}")) for name in NAMES)
    assert all(math.isfinite(getattr(found, f"{present}_{name}")) for name in NAMES)


def test_bad_rows_are_left_out_where_training_skips_them(tiny_model, processor):
    rows = [dict(row) for row in poisoned_pairs(10)]
    expected = record(PairSimilarityCallback([row for i, row in enumerate(rows) if i != 4]), tiny_model(), processor)
    rows[4]["image"] = b"broken"
    assert record(PairSimilarityCallback(rows), tiny_model(), processor, on_bad_row="skip") == expected
    with pytest.raises(ValueError, match="row 4, column 'image'"):
        record(PairSimilarityCallback(rows), tiny_model(), processor, on_bad_row="raise")


@pytest.mark.parametrize("cls", [CleanCLIPTrainer, SafeCLIPTrainer])
def test_training_is_the_same_to_the_bit_with_and_without(cls: type[CLIPTrainer], tmp_path: Path):
    pairs = poisoned_pairs(32)
    plain = make_trainer(cls, tmp_path, train_dataset=pairs)
    plain.train()
    callback = PairSimilarityCallback(pairs)
    watched = make_trainer(cls, tmp_path, train_dataset=pairs, callbacks=[callback])
    watched.train()
    assert_same_bits(plain, watched)
    steps = [epoch * watched.state.global_step // 3 for epoch in range(4)]
    assert [(record.epoch, record.step) for record in callback.records] == list(enumerate(steps))
    logged = [entry for entry in watched.state.log_history if "clean_similarity" in entry]
    assert [(entry["epoch"], entry["step"]) for entry in logged] == list(enumerate(steps))
    assert [entry["poisoned_similarity"] for entry in logged] == [r.poisoned_similarity for r in callback.records]
    last = callback.records[-1]
    expected = by_hand(watched.model, watched.processing_class, pairs, [row for row in range(32) if row % 3])
    assert [getattr(last, f"clean_{name}") for name in NAMES] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("saved_at", [3, 4, 6])
def test_records_survive_resuming(saved_at: int, tmp_path: Path):
    pairs = poisoned_pairs(32)
    whole, resumed = (
        [PairSimilarityCallback(pairs), PairSimilarityCallback(poisoned_pairs(5), prefix="few_")] for _ in range(2)
    )
    options: dict[str, Any] = {"train_dataset": pairs, "num_train_epochs": 2}
    first = make_trainer(CLIPTrainer, tmp_path, callbacks=whole, save_strategy="steps", save_steps=saved_at, **options)
    first.train()
    second = make_trainer(CLIPTrainer, tmp_path / "resumed", callbacks=resumed, **options)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    for one, two, clean_pairs in zip(whole, resumed, (21, 3), strict=True):
        assert one.records == two.records and [record.clean_pairs for record in one.records] == [clean_pairs] * 3
    assert_same_bits(first, second)
    # Training anew starts anew.
    second.train()
    assert all(len(callback.records) == 3 and callback.records[0].step == 0 for callback in resumed)


def test_two_of_one_prefix_are_refused(tmp_path: Path):
    callbacks = [PairSimilarityCallback(poisoned_pairs(rows), prefix="few_") for rows in (4, 5)]
    trainer = make_trainer(CLIPTrainer, tmp_path, rows=8, callbacks=callbacks)
    with pytest.raises(ValueError, match="two PairSimilarityCallbacks have prefix='few_': give one of them another"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dataset": poisoned_pairs(4).to_iterable_dataset()},
            "dataset must be a dataset .* with a length, but is an IterableDataset: load it without",
        ),
        ({"dataset": []}, "dataset is empty; it needs pairs"),
        ({"image_column": "photo"}, "image_column='photo' is not a column of dataset"),
        ({"caption_column": "text"}, "caption_column='text' is not a column"),
        ({"poisoned_column": "bad"}, "poisoned_column='bad' is not a column"),
        ({"poisoned_column": "label"}, r"row 0, column 'label': it must be boolean, but is \d"),
        ({"max_pairs": 0}, "max_pairs=0 must be a whole number of at least 1"),
        ({"max_pairs": 2.5}, "max_pairs=2.5 must be"),
    ],
)
def test_what_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PairSimilarityCallback(**{"dataset": poisoned_pairs(4), **arguments})
