"""Rows are numbered, checked and, where asked, passed over, whatever kind of dataset they come from."""

import io
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, List, Value
from PIL import Image
from support.bad_data import claiming

from hf_robust_clip.data.collator import CLIPDataCollator
from hf_robust_clip.data.rows import (
    BAD_ROWS,
    POISONED,
    ROW_INDEX,
    BadRowError,
    IndexedDataset,
    check_dataset,
    decode_row,
    undecoded,
)
from hf_robust_clip.data.streams import Stream as BatchStream
from hf_robust_clip.data.streams import StreamBatch

COLUMNS = ("image", "caption")
BROKEN = b"no image at all"


def picture(row: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (row, 2 * row, 3 * row))


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    picture(row).save(buffer, format="PNG")
    return buffer.getvalue()


def colour(row: dict) -> int:
    """Which of the pictures a decoded row holds."""
    return decode_row(row, *COLUMNS)["image"].getpixel((0, 0))[0]


def table(length: int = 8, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": BROKEN if i in broken else png(i), "path": None} for i in range(length)],
        "caption": [f"caption {i}" for i in range(length)],
        "label": list(range(length)),
    }
    features = Features({"image": datasets.Image(), "caption": Value("string"), "label": Value("int64")})
    return datasets.Dataset.from_dict(rows, features=features)


class TorchDataset(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        return iter(self.rows if worker is None else self.rows[worker.id :: worker.num_workers])


def row_list(length: int = 8, broken: tuple[int, ...] = ()) -> list[dict]:
    return [{"image": BROKEN if i in broken else png(i), "caption": f"caption {i}"} for i in range(length)]


# ---- One row ----


def test_a_row_comes_back_decoded_with_its_other_columns():
    row = {"photo": png(5), "text": "a", "label": 3, ROW_INDEX: 7}
    decoded = decode_row(row, "photo", "text")
    assert decoded["photo"].mode == "RGB" and decoded["photo"].getpixel((0, 0)) == (5, 10, 15)
    assert {**decoded, "photo": None} == {**row, "photo": None}
    assert row["photo"] == png(5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "a"}, "row 3: there is no column 'image'; its columns are 'caption'"),
        ({"image": png(1), "text": "a"}, "row 3: there is no column 'caption'; its columns are 'image', 'text'"),
        ({"image": BROKEN, "caption": "a"}, "row 3, column 'image': .* 15 bytes are in no format"),
        ({"image": None, "caption": "a"}, "row 3, column 'image': .*None"),
        ({"image": {"bytes": BROKEN, "path": "dir/x.jpg"}, "caption": "a"}, "row 3, column 'image': .*dir/x.jpg"),
        ({"image": png(1), "caption": None}, r"row 3, column 'caption': .* but is None \(NoneType\)"),
        ({"image": png(1), "caption": 12}, r"row 3, column 'caption': .* but is 12 \(int\)"),
        ({"image": png(1), "caption": b"a"}, r"row 3, column 'caption': .* but is b'a' \(bytes\)"),
        ({"image": png(1), "caption": []}, r"row 3, column 'caption': .* but is \[\] \(list\)"),
        ({"image": png(1), "caption": ["a", None]}, r"row 3, column 'caption': .* but is \['a', None\] \(list\)"),
        ({"image": png(1), "caption": "a \ud800"}, r"row 3, column 'caption': 'a \\ud800' cannot be encoded"),
        ({"image": png(1), "caption": ["a", "\udfff"]}, r"row 3, column 'caption': .*udfff.* cannot be encoded"),
        ({"image": png(1), "caption": "a", POISONED: "no"}, "row 3, column 'poisoned': it must be boolean.*'no'"),
        ({"image": png(1), "caption": "a", POISONED: 1}, "row 3, column 'poisoned': it must be boolean.*1"),
    ],
)
def test_a_bad_row_is_named_with_its_column_and_value(row: dict, message: str):
    with pytest.raises(BadRowError, match=message):
        decode_row({**row, ROW_INDEX: 3}, *COLUMNS)


@pytest.mark.parametrize("caption", ["", "a", "\U0001f600 \u0000", ["a"], ("a", ""), np.str_("a")])
def test_accepted_captions(caption):
    assert decode_row({"image": png(1), "caption": caption}, *COLUMNS)["caption"] == caption


@pytest.mark.parametrize("flag", [True, np.bool_(True), np.array(True), torch.tensor(True)])
def test_flags_of_any_library_become_bool(flag):
    assert decode_row({"image": png(1), "caption": "a", POISONED: flag}, *COLUMNS)[POISONED] is True


def test_an_unknown_flag_stays_unknown():
    assert decode_row({"image": png(1), "caption": "a", POISONED: None}, *COLUMNS)[POISONED] is None


# ---- Numbered rows of any map-style dataset ----


def every_kind() -> dict[str, object]:
    whole = table(16)
    return {
        "dataset": table(),
        "filtered": whole.filter(lambda row: row["label"] < 8, keep_in_memory=True),
        "shuffled back": whole.select(list(range(15, -1, -1))).select(list(range(15, 7, -1))),
        "torch format": table().with_format("torch"),
        "numpy format": table().with_format("numpy"),
        "some columns": table().with_format("torch", columns=["label"]),
        "transform": table().with_transform(lambda batch: {name: list(batch[name]) for name in batch}),
        "paths as PIL": table().cast_column("image", datasets.Image(decode=False)),
        "torch dataset": TorchDataset(row_list()),
        "list": row_list(),
        "subset": torch.utils.data.Subset(TorchDataset(row_list(20)), range(8)),
    }


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
@pytest.mark.parametrize("kind", every_kind())
def test_every_map_style_dataset(kind: str, on_bad_row):
    dataset = IndexedDataset(every_kind()[kind], *COLUMNS, on_bad_row=on_bad_row)
    assert len(dataset) == 8
    rows = dataset.__getitems__([6, 0, 3, 3])
    assert [row[ROW_INDEX] for row in rows] == [6, 0, 3, 3]
    assert [colour(row) for row in rows] == [6, 0, 3, 3]
    assert [row["caption"] for row in rows] == ["caption 6", "caption 0", "caption 3", "caption 3"]
    assert dataset[5][ROW_INDEX] == 5 and colour(dataset[5]) == 5
    assert all(type(row[ROW_INDEX]) is int for row in dataset.__getitems__(list(np.arange(3))))


def test_any_column_names():
    dataset = table().rename_columns({"image": "Photo", "caption": "its text"})
    dataset = IndexedDataset(dataset, "Photo", "its text")
    row = decode_row(dataset[2], "Photo", "its text")
    assert row["Photo"].getpixel((0, 0)) == (2, 4, 6) and row["its text"] == "caption 2"


def test_only_the_columns_that_are_needed_are_read_and_no_image_is_decoded():
    dataset = table(broken=(1,)).add_column(POISONED, [False] * 8)
    row = IndexedDataset(dataset, *COLUMNS)[1]
    assert set(row) == {"image", "caption", POISONED, ROW_INDEX}
    assert row["image"]["bytes"] == BROKEN


def test_the_dataset_itself_is_untouched():
    dataset = table()
    before = dataset._fingerprint
    IndexedDataset(dataset, *COLUMNS, on_bad_row="skip")[3]
    assert dataset._fingerprint == before and dataset.column_names == ["image", "caption", "label"]
    assert isinstance(dataset[0]["image"], Image.Image)


# ---- Bad rows ----


def test_raise_leaves_bad_rows_to_the_collator_and_names_them():
    row = IndexedDataset(table(broken=(3,)), *COLUMNS)[3]
    with pytest.raises(BadRowError, match="row 3, column 'image'"):
        decode_row(row, *COLUMNS)


@pytest.mark.parametrize("make", [table, row_list, lambda n, broken: TorchDataset(row_list(n, broken))])
def test_skip_takes_the_next_usable_row_and_lists_those_passed_over(make):
    dataset = IndexedDataset(make(8, broken=(2, 3, 7)), *COLUMNS, on_bad_row="skip")
    rows = [dataset[i] for i in range(8)]
    assert [row[ROW_INDEX] for row in rows] == [0, 1, 4, 4, 4, 5, 6, 0]
    assert [colour(row) for row in rows] == [0, 1, 4, 4, 4, 5, 6, 0]
    assert [row[BAD_ROWS] for row in rows] == [[], [], [2, 3], [3], [], [], [], [7]]


def test_skip_passes_over_captions_that_are_no_strings():
    rows = row_list(4)
    rows[1]["caption"] = None
    rows[2]["caption"] = []
    dataset = IndexedDataset(rows, *COLUMNS, on_bad_row="skip")
    assert dataset[1][ROW_INDEX] == 3 and dataset[1][BAD_ROWS] == [1, 2]


def test_skip_passes_over_rows_that_the_dataset_fails_to_read():
    transformed = table(broken=(2,)).with_transform(lambda batch: batch)
    with pytest.raises(OSError):
        transformed[2]
    dataset = IndexedDataset(transformed, *COLUMNS, on_bad_row="skip")
    assert [row[ROW_INDEX] for row in dataset.__getitems__([1, 2, 3])] == [1, 3, 3]
    assert dataset[2][BAD_ROWS] == [2]


@pytest.mark.parametrize(
    "data, reason",
    [(claiming(60_000, 60_000), "DecompressionBombError: "), (b"no image", "UnidentifiedImageError: ")],
    ids=["bomb", "no image"],
)
def test_a_row_that_a_transform_fails_to_read_is_named_or_skipped(data: bytes, reason: str):
    rows = {"image": [png(0), data, png(2)], "caption": ["a", "b", "c"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    transformed = table.with_transform(lambda batch: batch)
    with pytest.raises(BadRowError, match=f"^row 1 cannot be read: {reason}"):
        IndexedDataset(transformed, *COLUMNS).__getitems__([0, 1, 2])
    dataset = IndexedDataset(transformed, *COLUMNS, on_bad_row="skip")
    assert [row[ROW_INDEX] for row in dataset.__getitems__([0, 1])] == [0, 2]
    check_dataset(transformed.select([1]), *COLUMNS, argument="train_dataset")


def test_a_transform_that_fails_on_a_batch_and_on_no_row_fails():
    def alone(batch):
        return {"image": list(batch["image"]), "caption": ["a"]} if len(batch["image"]) == 1 else {}["x"]

    dataset = IndexedDataset(table().with_transform(alone), *COLUMNS)
    assert dataset[1][ROW_INDEX] == 1
    with pytest.raises(KeyError):
        dataset.__getitems__([0, 1])


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
@pytest.mark.parametrize("own", [{ROW_INDEX: 5, BAD_ROWS: [5, 6]}, {ROW_INDEX: "x", BAD_ROWS: None}])
def test_what_rows_say_under_the_keys_of_this_package_is_not_believed(own: dict, on_bad_row, processor):
    rows = [{**row, **own} for row in row_list(4)]
    batch = CLIPDataCollator(processor)(IndexedDataset(rows, *COLUMNS, on_bad_row=on_bad_row).__getitems__([1, 3]))
    assert batch[ROW_INDEX].tolist() == [1, 3] and BAD_ROWS not in batch
    (first, *_) = BatchStream(Stream(rows), *COLUMNS, 4, 1, on_bad_row)
    assert isinstance(first, StreamBatch)
    assert all(ROW_INDEX not in row and not row.get(BAD_ROWS) for row in first.rows)


def test_skip_raises_when_no_row_is_usable_and_says_why():
    dataset = IndexedDataset(table(4, broken=(0, 1, 2, 3)), *COLUMNS, on_bad_row="skip")
    with pytest.raises(BadRowError, match=r"none of the 4 rows can be used.*column 'image'.*no format"):
        dataset[2]


def test_skip_does_not_hide_mistakes_in_the_dataset():
    class Mistaken(TorchDataset):
        def __getitem__(self, index: int) -> dict:
            return {"image": self.rows[index]["no such key"]}

    with pytest.raises(KeyError):
        IndexedDataset(Mistaken(row_list()), *COLUMNS, on_bad_row="skip")[0]


# ---- Iterable datasets ----


@pytest.mark.parametrize("format", [None, "torch", "numpy"])
def test_streams_of_datasets_stay_undecoded(format: str | None):
    stream = table(broken=(1,)).to_iterable_dataset()
    stream = stream if format is None else stream.with_format(format)
    rows = list(undecoded(stream, *COLUMNS))
    assert [set(row) for row in rows] == [{"image", "caption"}] * 8
    assert rows[1]["image"]["bytes"] == BROKEN and type(rows[0]["caption"]) is str
    assert [colour(row) for i, row in enumerate(rows) if i != 1] == [0, 2, 3, 4, 5, 6, 7]


def streams(broken: tuple[int, ...], length: int = 8) -> dict[str, object]:
    return {
        "datasets": table(length, broken).to_iterable_dataset(),
        "torch": Stream(row_list(length, broken)),
    }


def skipping(dataset: Any) -> BatchStream:
    return BatchStream(dataset, *COLUMNS, batch_size=3, least_rows=1, on_bad_row="skip")


def usable(dataset: Any) -> list[dict[str, Any]]:
    return [row for batch in skipping(dataset) for row in batch.rows]


@pytest.mark.parametrize("kind", ["datasets", "torch"])
@pytest.mark.parametrize("broken", [(), (0,), (2, 3), (6, 7), (0, 4, 5, 7)])
def test_skipping_streams_lists_every_bad_row_once(kind: str, broken: tuple[int, ...]):
    rows = usable(streams(broken)[kind])
    assert [colour(row) for row in rows] == [i for i in range(8) if i not in broken]
    assert [index for row in rows for index in row[BAD_ROWS]] == list(broken)


def test_a_stream_without_a_usable_row_raises():
    with pytest.raises(BadRowError, match="none of the 3 rows can be used"):
        usable(streams((0, 1, 2), 3)["torch"])
    assert usable(Stream([])) == []


def test_of_several_workers_one_without_a_usable_row_yields_nothing():
    stream = skipping(Stream(row_list(4, broken=(1, 3))))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert [row["caption"] for batch in loader for row in batch.rows] == ["caption 0", "caption 2"]


def test_the_epoch_reaches_the_stream():
    stream = skipping(table().to_iterable_dataset().shuffle(seed=1, buffer_size=8))
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([row["caption"] for batch in stream for row in batch.rows])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


# ---- Datasets that cannot work ----


def with_captions(values: list, feature) -> datasets.Dataset:
    return table(len(values)).remove_columns("caption").add_column("caption", values, feature=feature)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (table().select([]), "train_dataset is empty"),
        ([], "train_dataset is empty"),
        (table().remove_columns("image"), "image_column='image' is not a column of train_dataset.*'caption', 'label'"),
        (table().rename_column("caption", "text"), "caption_column='caption' is not a column.*'image', 'text'"),
        (table().rename_column("caption", "text").to_iterable_dataset(), "caption_column='caption' is not a column"),
        (
            [{"image": png(0), "text": "a"}],
            "caption_column='caption' is not a column of train_dataset.*'image', 'text'",
        ),
        ([(png(0), "a")], "the rows of train_dataset must be mappings .* but row 0 is a tuple"),
        (with_captions([1, 2], Value("int64")), "caption_column='caption' of train_dataset must hold strings"),
        (
            with_captions([[1], [2]], List(Value("int64"))),
            "caption_column='caption' of train_dataset must hold strings",
        ),
        (with_captions([0, 1], ClassLabel(names=["a", "b"])), "caption_column='caption' .* must hold strings"),
        (table().remove_columns("image").rename_column("label", "image"), "image_column='image' .* must hold images"),
        (table().add_column(POISONED, [0] * 8), "column 'poisoned' of train_dataset must be boolean, .*int64"),
        (table().add_column(POISONED, ["no"] * 8), "column 'poisoned' of train_dataset must be boolean, .*string"),
        (
            datasets.DatasetDict(train=table()),
            r"is a DatasetDict: it has 'train'; pass one .* train_dataset\['train'\]",
        ),
        (
            table().with_transform(lambda batch: {"image": list(batch["image"])}),
            "caption_column='caption' is not a column of train_dataset; its columns are 'image'",
        ),
    ],
)
def test_a_dataset_that_cannot_work_is_refused_at_once(dataset, message: str):
    with pytest.raises(ValueError, match=message):
        check_dataset(dataset, *COLUMNS, argument="train_dataset")


@pytest.mark.parametrize(
    "dataset",
    [
        *every_kind().values(),
        table().to_iterable_dataset(),
        table().to_iterable_dataset().map(lambda row: row),
        Stream(row_list()),
        with_captions([["a", "b"], ["c"]], List(Value("string"))),
        with_captions(["a", "b"], Value("large_string")),
        table().add_column(POISONED, [True] * 8),
        table().remove_columns("image").add_column("image", [png(0)] * 8),
        # Rows that are bad are not its business.
        table(broken=(0,)),
        table(broken=(0,)).with_transform(lambda batch: batch),
        # Columns that a transform makes.
        table()
        .rename_columns({"image": "a", "caption": "b"})
        .with_transform(lambda batch: {"image": list(batch["a"]), "caption": list(batch["b"])}),
    ],
)
def test_a_dataset_that_can_work_passes(dataset):
    check_dataset(dataset, *COLUMNS, argument="train_dataset")
