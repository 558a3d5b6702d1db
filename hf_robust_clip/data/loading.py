"""Datasets of image-caption pairs from wherever they are, and class labels for those that have none as numbers."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from transformers.utils import logging

from ..columns import captions_of, check_columns, naming
from ..files import check_pointer
from ..kinds import kind
from ..wording import listed, said, shown
from .builders import make_builder, no_rows
from .confining import STATE_FILE, check_path, stored_files, whole_paths
from .folders import Folder, may_hold_captions
from .rows import column_values
from .tables import READERS

logger = logging.get_logger(__name__)


def load_pairs(source: str, split: str = "train", image_column: str = "image") -> datasets.Dataset:
    """
    Load image-caption pairs.

    Args:
        source (`str`): A Parquet, CSV, TSV, JSON or Arrow file; a folder saved with `save_to_disk`; a folder of such
            files, of images with a `metadata.csv` or `metadata.jsonl` that has their captions, or of images with a
            `.txt` or `.json` each for their caption; or a dataset on the Hub. It is one file or folder, whatever
            characters are in its name. Tables are read as text: see [`~data.tables.read_csv`].
        split (`str`, defaults to `"train"`): Which split, where the source has several. A file, and a dataset saved
            without splits, is `"train"`, whatever name is given. Parts such as `"train[:10%]"` are taken of anything
            but a dataset saved with splits.
        image_column (`str`, defaults to `"image"`): Column with the image. Paths in it are taken from the folder of
            their file (in a folder saved with `save_to_disk`, from that folder), and must not lead out of it, or of
            the folder that is the source. What a dataset on the Hub names is left to `datasets`.

    Returns:
        `datasets.Dataset`: With `image_column` as a `datasets.Image`.

    Raises:
        `ValueError`: If the source is a file of another kind or cannot be read as such, has no such column or split,
            or names an image or a file of data outside of its folder.
    """
    path = _place(source)
    if path is None:
        dataset = datasets.load_dataset(source, split=split)  # nosec B615 # the user's choice
    elif _is_saved(path):
        return _load_saved(path, split, source, image_column)
    elif path.is_dir():
        folder = _folder(path, split)
        dataset = _made(folder.builder(image_column), split)
        if len(dataset) != folder.rows.get(split, len(dataset)):
            raise ValueError(
                f"{shown(source)} has {len(dataset):,} rows of the split {shown(split)}, and its card says that they "
                f"are {folder.rows[split]:,}; files are missing, or the card is of other files"
            )
        _tell_left_out(folder, dataset.column_names)
    else:
        dataset = _made(_file_builder(path, image_column), split if _is_part(split) else "train")
    return _of_images(dataset, image_column, source)


def stream_pairs(source: str, split: str = "train", image_column: str = "image") -> datasets.IterableDataset:
    """
    The pairs that [`load_pairs`] loads, read as they are needed where the source is a folder of files or on the Hub.

    Its paths are checked row by row, as they pass: one that leads out is a `ValueError` then.
    """
    path = _place(source)
    if path is None:
        stream = datasets.load_dataset(source, split=split, streaming=True)  # nosec B615 # the user's choice
        # Some files on the Hub tell their columns and types only as they are read.
        if stream.features is not None:
            _check_column(stream.column_names, image_column, source)
        return stream
    if path.is_file() or _is_saved(path):
        return load_pairs(source, split, image_column).to_iterable_dataset()
    folder = _folder(path, split)
    stream = folder.builder(image_column).as_streaming_dataset(split=split)
    _tell_left_out(folder, stream.column_names)
    return _of_images(stream, image_column, source)


def _of_images(dataset: Any, column: str, source: str) -> Any:
    _check_column(dataset.column_names, column, source)
    is_done = isinstance(dataset.features[column], datasets.Image)
    return dataset if is_done else dataset.cast_column(column, datasets.Image())


def _place(source: Any) -> Path | None:
    """The file or folder that a source names, if it names one; else it is an id on the Hub."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"source must be a file, a folder or an id on the Hub, but is {kind(source)}; a dataset goes to the "
            "trainer as it is"
        )
    source = os.fspath(source)
    if not source:
        raise ValueError("source='' is empty; accepted are a file, a folder and a dataset on the Hub")
    path = Path(os.path.abspath(source))
    if path.exists():
        check_path(str(path))
        return path
    if source in _PACKAGED_DATASETS_MODULES:  # of which `datasets` reads the files in the working directory
        raise ValueError(
            f"source={shown(source)} is neither a file nor a folder; accepted are those, and ids on the Hub"
        )
    return None


def _file_builder(path: Path, image_column: str) -> Any:
    suffix = path.suffix.lower()
    kind = "tables" if suffix in READERS else {".parquet": "parquet", ".arrow": "arrow"}.get(suffix)
    if kind is None:
        raise ValueError(
            f"source={shown(str(path))} is a {path.suffix or 'nameless'} file; accepted: .parquet, .arrow, "
            f"{', '.join(READERS)}"
        )
    return make_builder(kind, {"train": [str(path)]}, str(path.parent), image_column)


def _made(builder: Any, split: str) -> datasets.Dataset:
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):  # which says what is wrong with which file
            raise cause from None
        if isinstance(cause, TypeError | NotImplementedError):
            files = [file for several in builder.config.data_files.values() for file in several]
            raise ValueError(
                f"{listed(files, most=3, longest=100)} cannot be read with {shown(builder.image_column)} as images: "
                f"{said(cause, 200)}"
            ) from cause
        raise
    if split in builder.info.splits and not builder.info.splits[split].num_examples:
        raise no_rows(builder.config.data_files[split])
    return builder.as_dataset(split=split)


def _is_saved(path: Path) -> bool:
    """Whether it is a folder that `save_to_disk` made."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", STATE_FILE))


def _load_saved(path: Path, split: str, source: str, image_column: str) -> datasets.Dataset:
    root = str(path)
    if not (path / STATE_FILE).is_file():
        _check_split(split, sorted(file.parent.name for file in path.glob(f"*/{STATE_FILE}")), source)
        path /= split
    for name in stored_files(path):
        check_pointer(path / name)
    dataset = _of_images(datasets.load_from_disk(str(path)), image_column, source)
    for name in [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]:
        images, feature = dataset.data.column(name), dataset.features[name]
        whole = whole_paths(images, root, root, f"{shown(source)}, column {shown(name)}")
        if whole is not images:
            # With a fingerprint of its own: the values, which may be bytes of images, are not hashed. Added first,
            # since a dataset without columns has no rows.
            fingerprint = Hasher.hash([dataset._fingerprint, "whole paths", name, root])
            dataset = dataset.add_column(f"whole {name}", whole, new_fingerprint=fingerprint)
            dataset = dataset.remove_columns(name).rename_column(f"whole {name}", name).cast_column(name, feature)
    if _is_part(split):
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
        dataset = dataset.select([row for part in parts for row in range(part.from_, part.to)])
    return dataset


def _folder(path: Path, split: str) -> Folder:
    folder = Folder(path)
    if not _is_part(split) and split != "all":
        _check_split(split, folder.files, str(path))
    return folder


def _is_part(split: str) -> bool:
    """Whether it is a part of a split, or several, such as `train[:10%]+test`."""
    return "[" in split or "+" in split


def _check_split(split: str, splits: Collection[str], source: str) -> None:
    if split not in splits:
        raise ValueError(f"split={shown(split)} is not in {shown(source)}; its splits are {listed(list(splits))}")


def _check_column(names: Sequence[str], image_column: str, source: str) -> None:
    if image_column not in names:
        raise ValueError(
            f"image_column={shown(image_column)} is not a column of {shown(source)}; its columns are {listed(names)}"
        )


def _tell_left_out(folder: Folder, columns: Sequence[str]) -> None:
    """Say which files of a folder are not read, though they may have what is wanted."""
    if not folder.left_out:
        return
    message = f"{shown(str(folder.path))} has files that are not read: {listed(folder.left_out)}."
    if folder.kind == "imagefolder":
        message += (
            " It is a folder of images: a table of captions there is called metadata.csv or metadata.jsonl and has "
            "the paths of the images in a column file_name. Or pass the table itself"
        )
        if list(columns) == ["image"] and any(may_hold_captions(name) for name in folder.left_out):
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
    check_columns(dataset, {"caption_column": caption_column}, "rows with captions")
    if votes is None:
        most = max((len(captions_of(value)) for value in column_values(dataset, caption_column)), default=0)
        votes = max(1, min(3, most))
    names = list(classes)
    tests = [[naming(word) for word in words] for words in classes.values()]
    rows, labels = [], []
    for row, value in enumerate(column_values(dataset, caption_column)):
        counts = [0] * len(names)
        for caption in captions_of(value):
            named = [i for i, words in enumerate(tests) if any(is_named(caption) for is_named in words)]
            if len(named) == 1:
                counts[named[0]] += 1
        best = max(range(len(names)), key=counts.__getitem__)
        if counts[best] >= votes and counts.count(counts[best]) == 1:
            rows.append(row)
            labels.append(best)
    if not rows:
        needed = f"{votes} captions that name" if votes > 1 else "a caption that names"
        raise ValueError(f"no row of dataset has {needed} one of the classes {listed(names)}")
    if label_column in dataset.column_names:
        logger.warning(
            f"the column {shown(label_column)} of dataset is replaced by the classes that its captions name"
        )
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


def _with_labels(
    dataset: datasets.Dataset, column: str, labels: Sequence[int | None], names: list[str]
) -> datasets.Dataset:
    label: Any = datasets.ClassLabel(names=names)
    return dataset.add_column(column, labels, feature=datasets.Value("int64")).cast_column(column, label)
