"""A prepared dataset trains as its source does, to the bit, and an interruption leaves nothing that is half done."""

import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, List, Value
from PIL import Image
from support.training import ARGUMENTS, make_trainer
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, CLIPProcessor

from hf_robust_clip import CLIPDataCollator, CLIPTrainer, UnbindTrainer, prepare_dataset
from hf_robust_clip.data import preparing
from hf_robust_clip.data.loading import load_pairs
from hf_robust_clip.data.rows import BadRowError, IndexedDataset
from hf_robust_clip.data.streams import Stream

COLUMNS = ("image", "caption")
#: Rows and rows a shard of what most tests prepare: four shards, the last one short.
ROWS, PER_SHARD = 22, 6


def encode(number: int) -> bytes:
    """Images of several sizes, formats and modes."""
    rng = np.random.default_rng(number)
    width, height = ((16, 16), (40, 23), (17, 60))[number % 3]
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.convert(("RGB", "L")[number % 2]).save(buffer, ("JPEG", "PNG")[number % 5 == 0])
    return buffer.getvalue()


def pairs(broken: tuple[int, ...] = (), several: bool = False) -> datasets.Dataset:
    words = ["one", "two", "three", "four"]
    captions = [[f"the number {words[(i + j) % 4]}" for j in range(3)] for i in range(ROWS)]
    return datasets.Dataset.from_dict(
        {
            "key": [f"row {i}" for i in range(ROWS)],
            "image": [{"bytes": b"broken" if i in broken else encode(i), "path": None} for i in range(ROWS)],
            "caption": captions if several else [three[0] for three in captions],
            "label": [i % 4 for i in range(ROWS)],
            "poisoned": [i % 7 == 0 for i in range(ROWS)],
        },
        features=Features(
            {
                "key": Value("large_string"),
                "image": datasets.Image(),
                "caption": List(Value("string")) if several else Value("string"),
                "label": ClassLabel(names=words),
                "poisoned": Value("bool"),
            }
        ),
    )


def prepare(dataset: datasets.Dataset, processor, folder: Path, **options) -> datasets.Dataset:
    return prepare_dataset(dataset, processor, folder, **{"rows_per_shard": PER_SHARD, **options})


@pytest.fixture(scope="module")
def source() -> datasets.Dataset:
    return pairs()


@pytest.fixture(scope="module")
def folder(source, processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the source, prepared without interruption."""
    folder = tmp_path_factory.mktemp("prepared") / "pairs"
    prepare(source, processor, folder)
    return folder


@pytest.fixture
def prepared(folder: Path) -> datasets.Dataset:
    # In memory, so that shuffling it writes nothing into the folder.
    return datasets.load_from_disk(str(folder), keep_in_memory=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batches_of(collator: CLIPDataCollator, dataset, size: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    for epoch in range(2):
        collator.set_epoch(epoch)
        yield from DataLoader(dataset, batch_size=size, collate_fn=collator)


def assert_equal(ones, others) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            one_value, other_value = torch.as_tensor(one[name]), torch.as_tensor(other[name])
            assert one_value.dtype == other_value.dtype and torch.equal(one_value, other_value), name


def numbered(caption: str, seed: int) -> str:
    return f"{caption} {seed % 1000}"


# ---- The same training ----


@pytest.mark.parametrize(("image_format", "several"), [("ppm", False), ("png", True)])
def test_batches_are_those_of_the_source(processor, tmp_path: Path, image_format: str, several: bool):
    source = pairs(several=several)
    prepared = prepare(source, processor, tmp_path, image_format=image_format)
    assert {image.format for image in prepared["image"]} == {"PPM" if image_format == "ppm" else "PNG"}
    for views in (("original",), ("augmented",), ("original", "augmented")):
        collator = CLIPDataCollator(processor, views=views, text_augmentation=numbered, seed=3)
        for make in (lambda collator: collator, CLIPDataCollator.for_evaluation):
            ones, others = (batches_of(make(collator), IndexedDataset(data, *COLUMNS)) for data in (source, prepared))
            assert_equal(ones, others)


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_trainers_are_given_the_same_batches(cls: type[CLIPTrainer], source, prepared, tmp_path: Path):
    found = []
    for data in (source, prepared):
        torch.manual_seed(0)
        options = {"unimodal_weight": 1.0} if cls is UnbindTrainer else {}  # without it captions are not augmented
        trainer = make_trainer(cls, tmp_path, train_dataset=data, text_preset="eda", **options)
        found.append(list(trainer.get_train_dataloader()))
    assert len(found[0]) > 0 and found[0][0]["poisoned"].dtype == torch.bool
    assert_equal(*found)


@pytest.mark.parametrize("skip", [False, True])
def test_streams_of_it_give_the_same_batches(processor, source, prepared, skip: bool):
    found = []
    for data in (source, prepared):
        stream = Stream(data.to_iterable_dataset(), *COLUMNS, 8, least_rows=1, on_bad_row="skip" if skip else "raise")
        collator = CLIPDataCollator(processor, views=("original", "augmented"), text_augmentation=numbered)
        found.append([collator(batch.rows) for batch in stream])
    assert_equal(*found)


# ---- What is kept ----


def test_rows_columns_and_features_are_those_of_the_source(source, prepared, folder: Path):
    assert prepared.column_names == source.column_names and prepared.features == source.features
    plain = [name for name in source.column_names if name != "image"]
    assert list(prepared.select_columns(plain)) == list(source.select_columns(plain))
    assert prepared.split == source.split
    assert len(load_pairs(str(folder))) == ROWS


def test_any_names_of_columns_and_images_that_are_paths(processor, source, tmp_path: Path):
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        Path(paths[-1]).write_bytes(encode(number))
    data = datasets.Dataset.from_dict({"photo": paths, "Text": ["one", "two", "three"]})
    prepared = prepare(data, processor, tmp_path / "out", image_column="photo", caption_column="Text")
    assert isinstance(prepared.features["photo"], datasets.Image)
    expected = prepare(source.select(range(3)), processor, tmp_path / "other")
    assert all(one.tobytes() == two.tobytes() for one, two in zip(prepared["photo"], expected["image"], strict=True))


def test_processes_change_nothing_and_no_generator_is_drawn_from(source, processor, folder: Path, tmp_path: Path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    prepare(source, processor, tmp_path, num_proc=2)
    assert contents(tmp_path) == contents(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_rows_are_named_or_left_out_and_listed(processor, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    broken = (2, 6, 7, 8, 9, 10, 11, 21)  # a whole shard among them
    data = pairs(broken)
    with pytest.raises(BadRowError, match=r"row 2, column 'image': .*does not decode"):
        prepare(data, processor, tmp_path / "raise", num_proc=2)
    prepared = prepare(data, processor, tmp_path / "skip", on_bad_row="skip")
    assert prepared["key"] == [f"row {i}" for i in range(ROWS) if i not in broken]
    record = json.loads((tmp_path / "skip" / "prepared.json").read_text())
    assert [row for shard in record["shards"].values() for row in shard["bad_rows"]] == list(broken)
    with pytest.raises(BadRowError, match=f"none of the {ROWS} rows of dataset can be used"):
        prepare(pairs(tuple(range(ROWS))), processor, tmp_path / "none", on_bad_row="skip")


# ---- Interruptions ----


def prepare_until(moment: str, shard: int, source: datasets.Dataset, processor, folder: Path) -> None:
    """Prepare, and end this process without any more ado before or after a shard, from 0, gets its name."""
    replace = os.replace
    count = 0

    def replaced(old, new) -> None:
        nonlocal count
        is_shard = str(new).endswith(".arrow")
        if is_shard and count == shard and moment == "before":
            os._exit(9)
        replace(old, new)
        if is_shard and count == shard:
            os._exit(9)
        count += is_shard

    os.replace = replaced
    torch.set_num_threads(1)
    prepare(source, processor, folder)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_resumed_equals_uninterrupted(source, processor, folder: Path, tmp_path: Path, moment: str):
    arguments = (moment, 2, source, processor, tmp_path)
    process = multiprocessing.get_context("fork").Process(target=prepare_until, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9
    # Two shards are done, and the third is there or not; what is there is no dataset yet.
    done = json.loads((tmp_path / "prepared.json").read_text())["shards"]
    assert len(done) == 2
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(str(tmp_path))
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in done}
    prepare(source, processor, tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in done} == times


def prepare_alone(log: Path, source: datasets.Dataset, processor, folder: Path) -> None:
    """Prepare, and note in a file each shard that this process writes."""
    torch.set_num_threads(1)
    write = preparing.write_shard

    def noted(path: Path, *given):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return write(path, *given)

    preparing.write_shard = noted
    prepare(source, processor, folder)


def test_of_several_processes_one_works(source, processor, folder: Path, tmp_path: Path):
    arguments = (tmp_path / "log", source, processor, tmp_path / "out")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare_alone, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "out") == contents(folder)
    assert (tmp_path / "log").read_text().split() == sorted(path.name for path in folder.glob("*.arrow"))


def test_an_error_leaves_whole_shards_and_nothing_else(processor, tmp_path: Path):
    with pytest.raises(BadRowError, match="row 13"):
        prepare(pairs(broken=(13,)), processor, tmp_path)
    names = sorted(contents(tmp_path))
    assert names == ["data-00000-of-00004.arrow", "data-00001-of-00004.arrow", "prepared.json"]


def test_shards_that_are_short_or_gone_are_made_again(source, processor, folder: Path, tmp_path: Path):
    prepare(source, processor, tmp_path)
    shards = sorted(tmp_path.glob("*.arrow"))
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    shards[3].unlink()
    prepare(source, processor, tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_a_folder_that_lists_other_files_is_put_right(source, processor, folder: Path, tmp_path: Path):
    prepare(source.select(range(3)), processor, tmp_path / "other")
    shutil.copytree(folder, tmp_path / "pairs")
    state = tmp_path / "pairs" / "state.json"
    files = [{"filename": "../other/data-00000-of-00001.arrow"}]
    for content in (json.dumps({**json.loads(state.read_text()), "_data_files": files}), "{", "[]"):
        state.write_text(content)
        assert len(prepare(source, processor, tmp_path / "pairs")) == ROWS
        assert contents(tmp_path / "pairs") == contents(folder)
    shards = sorted((tmp_path / "pairs").glob("*.arrow"))
    record = json.loads((tmp_path / "pairs" / "prepared.json").read_text())
    shutil.copy(shards[3], shards[0])
    record["shards"][shards[0].name]["bytes"] = shards[0].stat().st_size
    (tmp_path / "pairs" / "prepared.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"holds 20 rows where {ROWS} were prepared"):
        prepare(source, processor, tmp_path / "pairs")


def test_a_second_call_reads_no_image(source, processor, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_robust_clip.data.preparing.decode_row", None)
    files = list(folder.iterdir())
    before = [path.stat().st_mtime_ns for path in files]
    assert len(prepare(source, processor, folder)) == ROWS
    assert [path.stat().st_mtime_ns for path in files] == before


# ---- What is refused ----


def test_a_folder_of_another_call_is_refused(source, processor, folder: Path, tmp_path: Path):
    other = CLIPProcessor(CLIPImageProcessor(size=20, crop_size=20), processor.tokenizer)
    for data, with_processor, options, message in (
        (source.select(range(9)), processor, {}, r"dataset.fingerprint was '\w+', and is '\w+'; dataset.rows was 22"),
        (source.remove_columns("label"), processor, {}, "dataset.features.label was"),
        (source, other, {}, r"image_size.width was 16, and is 20; .*image_processor.size.shortest_edge was 16"),
        (source, processor, {"image_format": "png"}, "otherwise: image_format was 'ppm', and is 'png'. Give another"),
        (source, processor, {"rows_per_shard": 7}, "rows_per_shard was 6, and is 7"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(data, with_processor, folder, **options)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds 'notes.txt' and no prepared.json"):
        prepare(source, processor, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        prepare(source, processor, tmp_path / "notes.txt")


def test_a_record_of_another_form_is_refused(source, processor, folder: Path, tmp_path: Path):
    record = json.loads((folder / "prepared.json").read_text())
    shard = {"rows": 6, "bytes": 9, "bad_rows": []}
    for content, message in (
        ("{", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ([], "it: Input should be an object"),
        ({}, "made_from: Field required"),
        ({**record, "made_from": "x"}, "made_from: .*(valid dictionary|an object)"),
        ({**record, "shards": []}, "shards: .*(valid dictionary|an object)"),
        ({**record, "shards": {"a": None}}, "shards.a: .*(valid dictionary|an object)"),
        ({**record, "shards": {"a": {**shard, "bytes": "9"}}}, "shards.a.bytes: .*valid integer"),
        ({**record, "shards": {"a": {"rows": 6, "bytes": 9}}}, "shards.a.bad_rows: Field required"),
        ({**record, "shards": {"a": {**shard, "bad_rows": "ab"}}}, "shards.a.bad_rows: .*valid array"),
        ({**record, "shards": {"a": {**shard, "bad_rows": [1, "b"]}}}, "shards.a.bad_rows.1: .*valid integer"),
    ):
        (tmp_path / "prepared.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=rf"prepared.json cannot be used: .*{message}"):
            prepare(source, processor, tmp_path)


def test_what_cannot_be_prepared_is_refused(source, processor, tmp_path: Path):
    changing = CLIPProcessor(CLIPImageProcessor(size=20, crop_size=16), processor.tokenizer)
    for data, with_processor, options, message in (
        (
            source.to_iterable_dataset(),
            processor,
            {},
            "must be a datasets.Dataset.* but is an IterableDataset: load it",
        ),
        ([source[0]], processor, {}, "must be a datasets.Dataset.* but is a list: write datasets.Dataset.from_list"),
        (
            source.with_transform(lambda batch: batch),
            processor,
            {},
            r"transform \(with_transform\).*apply it with map",
        ),
        (source, processor.tokenizer, {}, "processor must have an image_processor"),
        (source, changing, {}, "CLIPImageProcessor.* leaves images of no size as they are"),
        (source, processor, {"image_column": "photo"}, "image_column='photo' is not a column of dataset"),
        (source, processor, {"image_format": "jpeg"}, "image_format must be one of 'ppm', 'png', but is 'jpeg'"),
        (source, processor, {"on_bad_row": "ignore"}, "on_bad_row must be one of 'raise', 'skip', but is 'ignore'"),
        (source, processor, {"rows_per_shard": 0}, "rows_per_shard must be at least 1, but is 0"),
        (source, processor, {"num_proc": 0}, "num_proc must be None or at least 1, but is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(data, with_processor, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
