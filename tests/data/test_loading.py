"""Pairs load from files and folders of every kind, and captions give labels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_robust_clip.data.loading import encode_labels, label_by_captions, load_pairs, stream_pairs


@pytest.fixture
def images(pairs: datasets.Dataset, tmp_path: Path) -> list[str]:
    names = [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        pairs[i]["image"].save(tmp_path / name)
    return names


def check(dataset: datasets.Dataset, pairs: datasets.Dataset) -> None:
    assert isinstance(dataset.features["image"], datasets.Image)
    assert list(dataset["caption"]) == list(pairs["caption"])[: len(dataset)]
    assert all(dataset[i]["image"].tobytes() == pairs[i]["image"].tobytes() for i in range(len(dataset)))


def test_parquet_file_and_folder(pairs: datasets.Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pairs.select(range(4)).to_parquet(folder / "train.parquet")
    pairs.select(range(2)).to_parquet(folder / "validation.parquet")
    check(load_pairs(str(folder / "train.parquet")), pairs)
    assert len(load_pairs(str(folder))) == 4
    assert len(load_pairs(str(folder), split="validation")) == 2


def test_saved_to_disk(pairs: datasets.Dataset, tmp_path: Path) -> None:
    pairs.select(range(3)).save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=pairs.select(range(4))).save_to_disk(tmp_path / "splits")
    check(load_pairs(str(tmp_path / "plain")), pairs)
    check(load_pairs(str(tmp_path / "splits")), pairs)
    with pytest.raises(ValueError, match=r"split='test' is not in .* its splits are 'train'"):
        load_pairs(str(tmp_path / "splits"), split="test")


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_table_with_paths_beside_it(
    suffix: str, delimiter: str, images: list[str], pairs: datasets.Dataset, tmp_path: Path
) -> None:
    lines = [delimiter.join(("image", "caption"))]
    lines += [delimiter.join((name, pairs[i]["caption"])) for i, name in enumerate(images)]
    table = tmp_path / f"pairs{suffix}"
    table.write_text("\n".join(lines) + "\n")
    check(load_pairs(str(table)), pairs)


def test_folder_of_images_with_captions(images: list[str], pairs: datasets.Dataset, tmp_path: Path) -> None:
    lines = ["file_name,caption", *(f"{name},{pairs[i]['caption']}" for i, name in enumerate(images))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    check(load_pairs(str(tmp_path)), pairs)


def test_what_cannot_load_is_named(pairs: datasets.Dataset, tmp_path: Path) -> None:
    (tmp_path / "pairs.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a \.xlsx file; accepted: \.parquet"):
        load_pairs(str(tmp_path / "pairs.xlsx"))
    pairs.select(range(2)).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="image_column='photo' is not a column"):
        load_pairs(str(tmp_path / "pairs.parquet"), image_column="photo")


def test_labels_by_captions() -> None:
    dataset = datasets.Dataset.from_dict(
        {
            "captions": [
                ["A dog.", "Two DOGS run", "a puppy"],  # three votes for dog
                ["a dog", "a dog in snow", "a dog"],  # a caption that names two classes does not vote
                ["snow", "snow", "snowy"],  # "snowy" is another word
                ["hotdogs", "dogsled", "a dogma"],  # only whole words count
                ["snow", "Snow!", "snow-covered"],
            ],
            "id": [0, 1, 2, 3, 4],
        }
    )
    classes = {"dog": ["dog", "dogs", "puppy"], "snow": ["snow"]}
    labelled = label_by_captions(dataset, classes)
    assert list(labelled["id"]) == [0, 4]
    assert [labelled.features["label"].int2str(label) for label in labelled["label"]] == ["dog", "snow"]
    assert list(label_by_captions(dataset, classes, votes=2)["id"]) == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="no row of dataset has 3 captions that name one of the classes 'cat'"):
        label_by_captions(dataset, {"cat": ["cat"]})
    with pytest.raises(ValueError, match=r"caption_column='text' is not a column of dataset; .* 'captions', 'id'"):
        label_by_captions(dataset, classes, "text")
    with pytest.raises(ValueError, match="classes is empty"):
        label_by_captions(dataset, {})


@pytest.mark.parametrize(
    "captions, expected",
    [
        (["a dog", None, "snow", "a cat"], [0, 2]),  # a caption each is enough
        ([["a dog", "dog"], None, ["dog", None], ["snow", "snow"]], [0, 3]),  # None has no vote
        ([["dog", "dog", "dog", "snow"], [], [None], ["dog", "dog"]], [0]),  # three, where there are more
    ],
)
def test_labels_by_captions_of_any_number(captions: list[Any], expected: list[int]) -> None:
    dataset = datasets.Dataset.from_dict({"captions": captions, "id": range(4)})
    assert list(label_by_captions(dataset, {"dog": ["dog"], "snow": ["snow"]})["id"]) == expected


def test_labels_by_captions_replace_others(caplog: pytest.LogCaptureFixture) -> None:
    dataset = datasets.Dataset.from_dict({"captions": ["snow", "a dog"], "label": [7, 8]})
    labelled = label_by_captions(dataset, {"dog": ["dog"], "snow": ["snow"]})
    assert [labelled.features["label"].int2str(label) for label in labelled["label"]] == ["snow", "dog"]
    assert "the column 'label' of dataset is replaced" in caplog.text


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_names_of_classes_become_numbers(dtype: str, pairs: datasets.Dataset) -> None:
    names = ["b", "a", None, "c", "a"]
    some = pairs.select(range(5)).remove_columns("label").add_column("label", names)
    some = some.cast_column("label", datasets.Value(dtype))
    encoded = encode_labels(some, "label")
    expected = some.class_encode_column("label")
    assert list(encoded["label"]) == list(expected["label"]) == [1, 0, None, 2, 0]
    assert encoded.features["label"] == expected.features["label"]
    assert list(encoded["caption"]) == list(some["caption"])
    assert encode_labels(pairs, "label") is pairs and encode_labels(pairs, "none") is pairs


def test_a_part_of_a_file_or_a_saved_dataset_is_that_part(pairs: datasets.Dataset, tmp_path: Path) -> None:
    pairs.select(range(4)).to_parquet(tmp_path / "pairs.parquet")
    pairs.select(range(4)).save_to_disk(tmp_path / "saved")
    for source in ("pairs.parquet", "saved"):
        path = str(tmp_path / source)
        parts = {"train[:2]": [0, 1], "train[75%:]": [3], "train[:1]+train[3:]": [0, 3], "any": [0, 1, 2, 3]}
        for split, rows in parts.items():
            expected = [pairs[row]["caption"] for row in rows]
            assert load_pairs(path, split)["caption"][:] == expected
            assert [row["caption"] for row in stream_pairs(path, split)] == expected
        for load in (load_pairs, stream_pairs):
            with pytest.raises(ValueError, match="test"):
                load(path, "test[:2]")


def test_parts_of_a_saved_dataset_keep_images_with_their_captions(pairs: datasets.Dataset, tmp_path: Path) -> None:
    names = [f"{row}.png" for row in range(4)]
    rows = datasets.Dataset.from_dict({"image": names, "caption": pairs["caption"][:4]})
    rows.save_to_disk(tmp_path / "saved")
    for row, name in enumerate(names):
        pairs[row]["image"].save(tmp_path / "saved" / name)
    for split, wanted in (("train[50%:]+train[:50%]", [2, 3, 0, 1]), ("train[:1]+train[3:]", [0, 3])):
        loaded = load_pairs(str(tmp_path / "saved"), split)
        assert [row["caption"] for row in loaded] == [pairs[row]["caption"] for row in wanted]
        assert [row["image"].tobytes() for row in loaded] == [pairs[row]["image"].tobytes() for row in wanted]


def test_tables_beside_images_are_not_overlooked(
    images: list[str], pairs: datasets.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    (folder / "imgs").mkdir(parents=True)
    lines = ["image,caption"]
    for i, name in enumerate(images):
        shutil.copy(tmp_path / name, folder / "imgs" / name)
        lines.append(f"imgs/{name},{pairs[i]['caption']}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    for load in (load_pairs, stream_pairs):
        with pytest.raises(ValueError, match=r"not read: 'pairs.csv'.* metadata.csv .* column file_name"):
            load(str(folder))
    check(load_pairs(str(folder / "pairs.csv")), pairs)
    # Of classes, which subfolders name, a dataset can be made without the table.
    for kind in ("one", "two"):
        shutil.copytree(folder / "imgs", folder / kind)
    assert load_pairs(str(folder)).column_names == ["image", "label"]
    assert "not read: 'pairs.csv'" in caplog.text


def test_a_split_that_is_not_there_is_told_those_that_are(pairs: datasets.Dataset, tmp_path: Path) -> None:
    pairs.select(range(2)).to_parquet(tmp_path / "train.parquet")
    for load in (load_pairs, stream_pairs):
        with pytest.raises(ValueError, match=r"split='test' is not in .*; its splits are 'train'"):
            load(str(tmp_path), "test")
    assert len(load_pairs(str(tmp_path), "train[:1]")) == 1
