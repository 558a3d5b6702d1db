"""A batch depends on its rows, the seed and the epoch, not on who makes it and when."""

import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, RandomSampler

from hf_robust_clip.augment.text import TextAugmentation
from hf_robust_clip.data.collator import CLIPDataCollator
from hf_robust_clip.data.rows import BadRowError, IndexedDataset
from hf_robust_clip.data.streams import Stream, StreamCollator
from hf_robust_clip.seeding import derive_seed

COLUMNS = ("image", "caption")
VIEWS = ("original", "augmented")


def numbered(caption: str, seed: int) -> str:
    """Shows in the tokens which seed a view was given."""
    return f"{caption} {seed % 1_000_000}"


def rows_of(pairs: datasets.Dataset, *numbers: int) -> list[dict]:
    return IndexedDataset(pairs, *COLUMNS).__getitems__(list(numbers))


def texts(processor, batch: dict, view: int = 0) -> list[str]:
    views = batch["input_ids"].chunk(batch["input_ids"].shape[0] // batch["pixel_values"].shape[0])
    return processor.tokenizer.batch_decode(views[view], skip_special_tokens=True)


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


# ---- What a batch holds ----


def test_keys_types_and_shapes(processor, pairs):
    collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=numbered)
    batch = collator(rows_of(pairs, 3, 1, 4, 1, 5))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "row_index"}
    assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].shape == (5, 3, 16, 16)
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape[0] == 10
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert batch["row_index"].tolist() == [3, 1, 4, 1, 5] and batch["row_index"].dtype == torch.int64
    for pixels, row in zip(batch["pixel_values"], batch["row_index"].tolist(), strict=True):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(pairs[row]["image"]))


def test_rows_without_a_number_give_a_batch_without_numbers(processor, pairs):
    batch = CLIPDataCollator(processor)([pairs[0], pairs[1]])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}


def test_any_column_names(processor, pairs):
    renamed = pairs.rename_columns({"image": "its photo", "caption": "Text"})
    collator = CLIPDataCollator(processor, image_column="its photo", caption_column="Text")
    rows = IndexedDataset(renamed, "its photo", "Text").__getitems__([0, 1])
    assert_equal(collator(rows), CLIPDataCollator(processor)(rows_of(pairs, 0, 1)))


@pytest.mark.parametrize("flags", [[True, False], [np.bool_(True), torch.tensor(False)]])
def test_the_poisoned_column_is_carried_along(processor, pairs, flags: list):
    rows = [{**row, "poisoned": flag} for row, flag in zip(rows_of(pairs, 0, 1), flags, strict=True)]
    batch = CLIPDataCollator(processor)(rows)
    assert batch["poisoned"].dtype == torch.bool and batch["poisoned"].tolist() == [True, False]
    rows[0]["poisoned"] = None
    assert "poisoned" not in CLIPDataCollator(processor)(rows)


def test_the_poisoned_column_of_a_formatted_dataset_is_carried_along(processor, pairs):
    dataset = pairs.add_column("poisoned", [i % 2 == 0 for i in range(len(pairs))]).with_format("torch")
    batch = CLIPDataCollator(processor)(IndexedDataset(dataset, *COLUMNS).__getitems__([0, 1, 2]))
    assert batch["poisoned"].tolist() == [True, False, True]


def test_bad_rows_are_listed(processor, pairs):
    rows = [{"image": b"broken" if i in (1, 2) else pairs[i]["image"], "caption": "a"} for i in range(5)]
    dataset = IndexedDataset(rows, *COLUMNS, on_bad_row="skip")
    collator = CLIPDataCollator(processor)
    batch = collator([dataset[1], dataset[2], dataset[3]])
    assert batch["bad_rows"].tolist() == [1, 2, 2] and batch["row_index"].tolist() == [3, 3, 3]
    assert "bad_rows" not in collator([dataset[3], dataset[4]])


def test_a_bad_row_is_named(processor, pairs):
    rows = rows_of(pairs, 0, 7)
    with pytest.raises(BadRowError, match=r"row 7, column 'image': .*6 bytes"):
        CLIPDataCollator(processor)([rows[0], {**rows[1], "image": b"broken"}])
    with pytest.raises(BadRowError, match=r"row 7, column 'caption': .*3.5"):
        CLIPDataCollator(processor)([rows[0], {**rows[1], "caption": 3.5}])


def test_each_image_is_decoded_once(processor, pairs, monkeypatch: pytest.MonkeyPatch):
    loads = []
    load = ImageFile.ImageFile.load

    def counting(self):
        # A loaded file has no file handle any more.
        loads.append(self.fp is not None)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting)
    for on_bad_row in ("raise", "skip"):
        loads.clear()
        rows = IndexedDataset(pairs, *COLUMNS, on_bad_row=on_bad_row).__getitems__([0, 1, 2])
        CLIPDataCollator(processor, views=VIEWS, text_augmentation=numbered)(rows)
        assert sum(loads) == 3


# ---- Captions and their tokens ----


def test_views_are_stacked_one_after_the_other_as_if_tokenised_one_by_one(processor, pairs):
    collator = CLIPDataCollator(processor, views=("original", "a", "b"), text_augmentation=numbered, seed=5)
    rows = rows_of(pairs, 0, 1, 2, 3)
    batch = collator(rows)
    expected = [row["caption"] for row in rows]
    for view in (1, 2):
        keys = [derive_seed(5, 0, row["row_index"]) for row in rows]
        expected += [numbered(row["caption"], derive_seed(key, view)) for row, key in zip(rows, keys, strict=True)]
    for i, text in enumerate(expected):
        alone = processor.tokenizer(text, truncation=True, max_length=16)["input_ids"]
        kept = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert kept.tolist() == alone


def test_without_an_augmentation_the_views_are_the_captions(processor, pairs):
    batch = CLIPDataCollator(processor, views=VIEWS)(rows_of(pairs, 0, 1))
    first, second = batch["input_ids"].chunk(2)
    assert torch.equal(first, second)


def test_truncation_keeps_the_end_token(processor, pairs):
    long = " ".join(["the number eight written by hand"] * 10)
    rows = [{**row, "caption": caption} for row, caption in zip(rows_of(pairs, 0, 1), (long, "a"), strict=True)]
    end = processor.tokenizer.eos_token_id
    for max_length, expected in ((None, 16), (9, 9), (2, 2)):
        ids = CLIPDataCollator(processor, max_length=max_length)(rows)["input_ids"]
        assert ids.shape == (2, expected)
        assert ids[0, 0] == processor.tokenizer.bos_token_id and ids[0, -1] == end
        assert (ids[0] == end).sum() == 1


def test_padding(processor, pairs):
    rows = [{**row, "caption": caption} for row, caption in zip(rows_of(pairs, 0, 1), ("", "a"), strict=True)]
    longest = CLIPDataCollator(processor)(rows)
    whole = CLIPDataCollator(processor, padding="max_length", max_length=12)(rows)
    assert longest["input_ids"].shape == (2, 3) and whole["input_ids"].shape == (2, 12)
    assert longest["attention_mask"].sum(dim=1).tolist() == whole["attention_mask"].sum(dim=1).tolist() == [2, 3]


def test_an_empty_caption_is_a_start_and_an_end(processor, pairs):
    row = {**rows_of(pairs, 0)[0], "caption": ""}
    ids = CLIPDataCollator(processor, views=VIEWS, text_augmentation=TextAugmentation())([row])["input_ids"]
    assert ids.tolist() == [[processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id]] * 2


def test_the_bundled_augmentation_changes_only_the_augmented_view(processor, digits):
    collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=TextAugmentation())
    rows = rows_of(digits, *range(40))
    batch = collator(rows)
    assert [text.strip() for text in texts(processor, batch, 0)] == [row["caption"] for row in rows]
    changed = [a != b for a, b in zip(texts(processor, batch, 0), texts(processor, batch, 1), strict=True)]
    assert sum(changed) > 30


def captions_drawn(processor, rows: list[dict], epoch: int, seed: int = 0) -> list[str]:
    collator = CLIPDataCollator(processor, seed=seed)
    collator.set_epoch(epoch)
    return [text.strip() for text in texts(processor, collator(rows))]


def test_one_of_several_captions_is_drawn_by_seed_epoch_and_row(processor, digits):
    captions = ["one", "two", "three", "four", "five"]
    rows = [{**row, "caption": captions} for row in rows_of(digits, *range(60))]
    drawn = {(seed, epoch): captions_drawn(processor, rows, epoch, seed) for seed in (0, 1) for epoch in (0, 1)}
    assert captions_drawn(processor, rows, epoch=1, seed=1) == drawn[1, 1]
    for choice in drawn.values():
        # 60 draws of 5: each caption comes up, and no draw follows the row's number.
        assert set(choice) == set(captions)
    assert len({tuple(choice) for choice in drawn.values()}) == 4
    # A row's draw does not depend on where in which batch it is.
    shuffled = captions_drawn(processor, rows[::-1][:7], epoch=0)
    assert shuffled == drawn[0, 0][::-1][:7]


def test_every_view_is_of_the_caption_that_was_drawn(processor, digits):
    rows = [{**row, "caption": ["one", "two", "three"]} for row in rows_of(digits, *range(20))]
    batch = CLIPDataCollator(processor, views=VIEWS, text_augmentation=numbered)(rows)
    for plain, augmented in zip(texts(processor, batch, 0), texts(processor, batch, 1), strict=True):
        assert augmented.startswith(plain.strip())


def test_evaluation_takes_the_first_original_caption(processor, pairs):
    collator = CLIPDataCollator(processor, views=("augmented",), text_augmentation=numbered)
    rows = [{**row, "caption": ["zero", "one", "two"]} for row in rows_of(pairs, *range(10))]
    evaluation = collator.for_evaluation()
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        assert [text.strip() for text in texts(processor, evaluation(rows))] == ["zero"] * 10
    assert collator.views == ("augmented",)
    assert any("zero" not in text for text in texts(processor, collator(rows)))


# ---- Independence of workers and kinds of dataset ----


def epochs_of(collator: CLIPDataCollator, dataset, workers: int, epochs: int = 3, **options) -> list[dict]:
    loader = DataLoader(
        dataset,
        batch_size=10,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )
    batches = []
    for epoch in range(epochs):
        collator.set_epoch(epoch)
        batches += list(loader)
    return batches


def test_batches_are_the_same_with_any_number_of_workers(processor, pairs):
    listed = pairs.map(lambda row: {"caption": [row["caption"], "a", "b"]}, keep_in_memory=True)
    indexed = IndexedDataset(listed, *COLUMNS)
    batches = []
    for workers in (0, 1, 2):
        collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=numbered, seed=3)
        # With a generator of its own: a DataLoader's also yields the seeds of workers, in an order that varies.
        sampler = RandomSampler(indexed, generator=torch.Generator().manual_seed(0))
        batches.append(epochs_of(collator, indexed, workers, sampler=sampler))
    assert len(batches[0]) == 3 * 7
    for zero, one, two in zip(*batches, strict=True):
        assert_equal(zero, one)
        assert_equal(zero, two)


def test_epochs_differ_in_workers_that_live_on(processor, pairs):
    collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=numbered)
    batches = epochs_of(collator, IndexedDataset(pairs, *COLUMNS), workers=2)
    first, second = batches[0], batches[7]
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert texts(processor, first, 0) == texts(processor, second, 0)
    assert all(a != b for a, b in zip(texts(processor, first, 1), texts(processor, second, 1), strict=True))


def test_workers_agree_under_the_global_generators_of_any_state(processor, pairs):
    collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=TextAugmentation())
    rows = rows_of(pairs, *range(8))
    first = collator(rows)
    torch.manual_seed(1)
    np.random.seed(1)
    assert_equal(collator(rows), first)
    assert_equal(pickle.loads(pickle.dumps(collator))(rows), first)


def test_kinds_of_dataset_give_the_same_batches(processor, pairs):
    whole = datasets.concatenate_datasets([pairs, pairs]).add_column("number", list(range(128)))
    kinds = [
        pairs,
        whole.filter(lambda row: row["number"] < 64, keep_in_memory=True),
        pairs.with_format("torch"),
        pairs.with_transform(lambda batch: {name: list(batch[name]) for name in batch}),
        [dict(pairs[i]) for i in range(64)],
        torch.utils.data.Subset(pairs, range(64)),
    ]
    expected = None
    for dataset in kinds:
        collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=numbered)
        batches = epochs_of(collator, IndexedDataset(dataset, *COLUMNS), workers=0, epochs=1)
        expected = expected or batches
        for batch, other in zip(batches, expected, strict=True):
            assert_equal(batch, other)


@pytest.mark.parametrize("skip", [True, False])
def test_rows_of_a_stream_are_keyed_by_their_content(processor, pairs, skip: bool):
    def views(shards: int, workers: int, epoch: int) -> dict[bytes, str]:
        stream = pairs.to_iterable_dataset(num_shards=shards)
        dataset = Stream(stream, *COLUMNS, batch_size=10, least_rows=1, on_bad_row="skip" if skip else "raise")
        collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=numbered)
        collator.set_epoch(epoch)
        found = {}
        for batch in DataLoader(dataset, batch_size=None, collate_fn=StreamCollator(collator), num_workers=workers):
            for pixels, text in zip(batch["pixel_values"], texts(processor, batch, 1), strict=True):
                found[pixels.numpy().tobytes()] = text
        return found

    expected = views(shards=1, workers=0, epoch=0)
    assert len(expected) == 64
    assert views(shards=2, workers=2, epoch=0) == expected
    assert all(expected[key] != text for key, text in views(shards=1, workers=0, epoch=1).items())


# ---- What is refused ----


def test_a_processor_without_a_part_is_refused(processor):
    with pytest.raises(ValueError, match=r"processor must have .*; CLIPTokenizer\w* has no image_processor"):
        CLIPDataCollator(processor.tokenizer)


@pytest.mark.parametrize("views", [(), "original", ("augmented", "augmented")])
def test_views_that_cannot_be_told_apart_are_refused(processor, views):
    with pytest.raises(ValueError, match="views must be one or more different names"):
        CLIPDataCollator(processor, views=views)


def test_images_of_any_size_and_mode_share_a_batch(processor):
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (31, 17), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 65536, (16, 16), dtype=np.uint16)),
        Image.new("CMYK", (1, 300)),
        Image.new("RGBA", (5, 5)),
    ]
    batch = CLIPDataCollator(processor)([{"image": image, "caption": "a"} for image in images])
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    assert (batch["pixel_values"][4] == 255).all()
