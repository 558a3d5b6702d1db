"""Datasets of image-caption pairs from wherever they are, and class labels for those that have none as numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from ..attacks.rows import naming
from .confining import (
    SPLITS_FILE,
    STATE_FILE,
    Bounds,
    check_files,
    check_manifests,
    confine_column,
    confine_row,
    names_images,
)
from .rows import column_values

logger = logging.get_logger(__name__)

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def load_pairs(source: str, split: str = "train", image_column: str = "image") -> datasets.Dataset:
    """
    Load image-caption pairs.

    Args:
        source (`str`): A Parquet, CSV, TSV, JSON or Arrow file; a folder saved with `save_to_disk`; a folder of such
            files, or of images with a `metadata.csv` or `metadata.jsonl` that has their captions; or a dataset on the
            Hub.
        split (`str`, defaults to `"train"`): Which split, where the source has several.
        image_column (`str`, defaults to `"image"`): Column with the image. Paths in it are taken from the folder of
            their file (in a folder saved with `save_to_disk`, from that folder), and must not lead out of it, or of
            the folder that is the source. Those of a dataset on the Hub are taken from the working directory.

    Returns:
        `datasets.Dataset`: With `image_column` as a `datasets.Image`.

    Raises:
        `ValueError`: If the source is a file of another kind, has no such column or split, or names an image or a file
            of data outside of its folder.
    """
    path = Path(source)
    if path.is_file():
        dataset = _load_file(path, source)
        parts: Iterable[tuple[Any, Bounds]] = [(dataset, Bounds(path.parent))]
    elif _is_saved(path):
        dataset = _load_saved(path, split, source)
        parts = [(dataset, Bounds(path))]
    elif path.is_dir():
        builder = _builder(path, split)
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=split)
        _check_tables(builder, path, dataset.column_names)
        parts = _by_folder(builder, path, split, dataset)
    else:
        dataset = datasets.load_dataset(source, split=split)  # nosec B615 # the user's choice
        parts = [(dataset, Bounds(None))]
    _check_column(dataset.column_names, image_column, source)
    feature = dataset.features[image_column]
    if isinstance(feature, datasets.Image):
        return dataset
    if names_images(feature):
        confined, first = [], 0
        for part, bounds in parts:
            confined.append(confine_column(part, image_column, bounds, source, first))
            first += len(part)
        dataset = datasets.concatenate_datasets(confined) if len(confined) > 1 else confined[0]
    return dataset.cast_column(image_column, datasets.Image())


def stream_pairs(source: str, split: str = "train", image_column: str = "image") -> datasets.IterableDataset:
    """
    The pairs that [`load_pairs`] loads, read as they are needed where the source is a folder of files or on the Hub.

    Its paths are checked row by row, as they pass: one that leads out is a `ValueError` then.
    """
    path = Path(source)
    if path.is_file() or _is_saved(path):
        return load_pairs(source, split, image_column).to_iterable_dataset()
    builder = None
    if path.is_dir():
        builder = _builder(path, split)
        stream = builder.as_streaming_dataset(split=split)
    else:
        stream = datasets.load_dataset(source, split=split, streaming=True)  # nosec B615 # the user's choice
    # CSV and JSON files tell their columns and types only as they are read.
    if stream.features is not None:
        if builder is not None:
            _check_tables(builder, path, stream.column_names)
        _check_column(stream.column_names, image_column, source)
        if not names_images(stream.features[image_column]):
            return stream
    parts = [(stream, Bounds(None))] if builder is None else _by_folder(builder, path, split, stream, streaming=True)
    confined = [
        part.map(
            partial(confine_row, column=image_column, bounds=bounds, source=source),
            features=stream.features,
        )
        for part, bounds in parts
    ]
    return datasets.concatenate_datasets(confined) if len(confined) > 1 else confined[0]


def _load_file(path: Path, source: str) -> datasets.Dataset:
    suffix = path.suffix.lower()
    builder = _BUILDERS.get(suffix)
    if builder is None:
        raise ValueError(f"source={source!r} is a {path.suffix or 'nameless'} file; accepted: {', '.join(_BUILDERS)}")
    options = {"delimiter": "\t"} if suffix == ".tsv" else {}
    return datasets.load_dataset(builder, data_files=str(path), split="train", **options)  # nosec B615 # a file


def _is_saved(path: Path) -> bool:
    """Whether it is a folder that `save_to_disk` made."""
    return any((path / name).is_file() for name in ("dataset_info.json", SPLITS_FILE, STATE_FILE))


def _load_saved(path: Path, split: str, source: str) -> datasets.Dataset:
    check_manifests(path)
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        _check_split(split, dataset, source)
        dataset = dataset[split]
    return dataset


def _builder(path: Path, split: str) -> Any:
    """What makes a dataset of a folder of files, which are its own."""
    check_manifests(path)
    # As an absolute path, a folder that is called "csv" is not taken for what reads CSV files.
    builder = datasets.load_dataset_builder(os.path.abspath(path))  # nosec B615 # a folder
    for files in builder.config.data_files.values():
        check_files(files, path)
    if split.isidentifier() and split != "all":  # no part of one or several, such as train[:10%]
        _check_split(split, builder.config.data_files, str(path))
    return builder


def _by_folder(
    builder: Any, path: Path, split: str, dataset: Any, streaming: bool = False
) -> Iterator[tuple[Any, Bounds]]:
    """A dataset of a folder of files in parts that each come from one folder, from which its paths are taken."""
    files = builder.config.data_files
    # Of a part of a split, such as train[:10%], the files are not known.
    chosen = files[split] if split in files else [file for several in files.values() for file in several]
    groups = [(folder, list(group)) for folder, group in groupby(chosen, key=os.path.dirname)]
    if len(groups) > 1 and split not in files:
        raise ValueError(
            f"split={split!r}: the files of {str(path)!r} lie in several folders, from which their paths are taken; "
            f"accepted are its splits {', '.join(map(str, files))}"
        )
    for folder, group in groups:
        part = dataset
        if len(groups) > 1:
            part = datasets.load_dataset(  # nosec B615 # a folder
                os.path.abspath(path),
                data_files={split: group},
                split=split,
                features=dataset.features,
                streaming=streaming,
            )
        yield part, Bounds(path, path / os.path.relpath(folder, path.resolve()))


def _check_split(split: str, splits: Iterable[str], source: str) -> None:
    if split not in splits:
        raise ValueError(f"split={split!r} is not in {source!r}; its splits are {', '.join(map(str, splits))}")


def _check_column(names: Sequence[str], image_column: str, source: str) -> None:
    if image_column not in names:
        raise ValueError(
            f"image_column={image_column!r} is not a column of {source!r}; its columns are "
            f"{', '.join(map(repr, names))}"
        )


def _check_tables(builder: Any, path: Path, names: Sequence[str]) -> None:
    """Say which tables in a folder of images are not read, though they may have the captions."""
    files = [file for several in builder.config.data_files.values() for file in several]
    if builder.name != "imagefolder" or any(Path(file).stem == "metadata" for file in files):
        return
    tables = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in _TABLES)
    if not tables:
        return
    message = (
        f"{str(path)!r} is a folder of images, in which {', '.join(map(repr, tables))} is not read: a table of "
        "captions there must be called metadata.csv or metadata.jsonl and have the paths of the images in a column "
        f"file_name. Or pass the table itself, {str(path / tables[0])!r}"
    )
    if list(names) == ["image"]:
        raise ValueError(message)
    logger.warning(message)


def label_by_captions(
    dataset: datasets.Dataset,
    classes: Mapping[str, Sequence[str]],
    caption_column: str = "captions",
    votes: int | None = None,
    label_column: str = "label",
) -> datasets.Dataset:
    """
    The images whose captions agree on one class, labelled with it.

    A caption votes for a class if it names a word of that class and of no other; an image is of a class if at least
    `votes` of its captions vote for it and fewer for any other.

    Args:
        dataset (`datasets.Dataset`): With a caption, or a list of captions, a row. One that is `None` has no vote.
        classes (mapping): Of class name to the words that name it, matched whole and in any case; at least one class.
        caption_column (`str`): Column with the captions.
        votes (`int`, *optional*): At least 1. `None`: 3, or the most captions that a row has where those are fewer.
        label_column (`str`): Column that is added, a `ClassLabel`. One of that name is replaced, with a warning.

    Returns:
        `datasets.Dataset`: The labelled rows only, in order.

    Raises:
        `ValueError`: If there are no classes, there is no such column, or no row gets a label.
    """
    if not classes:
        raise ValueError("classes is empty; it needs at least one class, with the words that name it")
    if caption_column not in dataset.column_names:
        raise ValueError(
            f"caption_column={caption_column!r} is not a column of dataset; its columns are "
            f"{', '.join(map(repr, dataset.column_names))}"
        )
    if votes is None:
        most = max((len(_captions(value)) for value in column_values(dataset, caption_column)), default=0)
        votes = max(1, min(3, most))
    names = list(classes)
    tests = [[naming(word) for word in words] for words in classes.values()]
    rows, labels = [], []
    for row, value in enumerate(column_values(dataset, caption_column)):
        counts = [0] * len(names)
        for caption in _captions(value):
            named = [i for i, words in enumerate(tests) if any(is_named(caption) for is_named in words)]
            if len(named) == 1:
                counts[named[0]] += 1
        best = max(range(len(names)), key=counts.__getitem__)
        if counts[best] >= votes and counts.count(counts[best]) == 1:
            rows.append(row)
            labels.append(best)
    if not rows:
        needed = f"{votes} captions that name" if votes > 1 else "a caption that names"
        raise ValueError(f"no row of dataset has {needed} one of the classes {', '.join(names)}")
    if label_column in dataset.column_names:
        logger.warning(f"the column {label_column!r} of dataset is replaced by the classes that its captions name")
        dataset = dataset.remove_columns(label_column)
    return _with_labels(dataset.select(rows), label_column, labels, names)


def encode_labels(dataset: datasets.Dataset, label_column: str) -> datasets.Dataset:
    """
    The same dataset with a column of class names (strings) as a `ClassLabel`, the classes in the order of their names,
    as `class_encode_column` has them, which would decode every image. Other columns stay as they are.
    """
    if getattr(dataset.features.get(label_column), "dtype", None) not in ("string", "large_string"):
        return dataset
    names = sorted(name for name in dataset.unique(label_column) if name is not None)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers.get(name) for name in column_values(dataset, label_column)]
    return _with_labels(dataset.remove_columns(label_column), label_column, labels, names)


def _captions(value: Any) -> list[str]:
    captions = value if isinstance(value, list) else [value]
    return [caption for caption in captions if caption is not None]


def _with_labels(
    dataset: datasets.Dataset, column: str, labels: Sequence[int | None], names: list[str]
) -> datasets.Dataset:
    label: Any = datasets.ClassLabel(names=names)
    return dataset.add_column(column, labels, feature=datasets.Value("int64")).cast_column(column, label)
