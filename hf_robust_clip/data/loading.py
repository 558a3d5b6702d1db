"""Datasets of image-caption pairs from wherever they are, and class labels for those that have captions only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..attacks.rows import naming
from .rows import column_values

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


def load_pairs(source: str, split: str = "train", image_column: str = "image") -> datasets.Dataset:
    """
    Load image-caption pairs.

    Args:
        source (`str`): A Parquet, CSV, TSV, JSON or Arrow file; a folder saved with `save_to_disk`; a folder of such
            files, or of images with a `metadata.csv` or `metadata.jsonl` that has their captions; or a dataset on the
            Hub.
        split (`str`, defaults to `"train"`): Which split, where the source has several.
        image_column (`str`, defaults to `"image"`): Column with the image. Paths in it are taken from the folder of
            their file, and must not lead out of it.

    Returns:
        `datasets.Dataset`: With `image_column` as a `datasets.Image`.

    Raises:
        `ValueError`: If the source is a file of another kind, has no such column or split, or names an image outside
            of its folder.
    """
    path = Path(source)
    if path.is_file():
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(
                f"source={source!r} is a {path.suffix or 'nameless'} file; accepted: {', '.join(_BUILDERS)}"
            )
        options = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
        dataset = datasets.load_dataset(builder, data_files=str(path), split="train", **options)  # nosec B615 # a file
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f"split={split!r} is not in {source!r}; its splits are {', '.join(dataset)}")
            dataset = dataset[split]
    else:
        dataset = datasets.load_dataset(source, split=split)  # nosec B615 # the user's choice
    if image_column not in dataset.column_names:
        raise ValueError(
            f"image_column={image_column!r} is not a column of {source!r}; its columns are "
            f"{', '.join(map(repr, dataset.column_names))}"
        )
    feature = dataset.features[image_column]
    if isinstance(feature, datasets.Image):
        return dataset
    if path.is_file() and getattr(feature, "dtype", None) in ("string", "large_string"):
        paths = [
            _within(path.parent, name, f"row {row} of {source!r}, column {image_column!r}")
            for row, name in enumerate(column_values(dataset, image_column))
        ]
        dataset = dataset.remove_columns(image_column).add_column(image_column, paths)
    return dataset.cast_column(image_column, datasets.Image())


def _within(folder: Path, name: str | None, where: str) -> str | None:
    """The path of a file in a folder, or below it, by its name there."""
    if name is None:
        return None  # a bad row
    joined = os.path.normpath(folder / name)
    root = os.path.normpath(folder)
    # By name alone, without a look at the disk for each of millions: a link in the folder is its owner's doing.
    if os.path.relpath(joined, root).split(os.sep)[0] == os.pardir:
        raise ValueError(
            f"{where}: {name!r} leads out of {str(folder)!r}; accepted are files in that folder or below it. A list "
            "of images in several places goes into a folder above them all"
        )
    return joined


def label_by_captions(
    dataset: datasets.Dataset,
    classes: Mapping[str, Sequence[str]],
    caption_column: str = "captions",
    votes: int = 3,
    label_column: str = "label",
) -> datasets.Dataset:
    """
    The images whose captions agree on one class, labelled with it.

    A caption votes for a class if it names a word of that class and of no other; an image is of a class if at least
    `votes` of its captions vote for it and fewer for any other.

    Args:
        dataset (`datasets.Dataset`): With a caption, or a list of captions, a row.
        classes (mapping): Of class name to the words that name it, matched whole and in any case.
        caption_column (`str`): Column with the captions.
        votes (`int`): At least 1.
        label_column (`str`): Column that is added, a `ClassLabel`.

    Returns:
        `datasets.Dataset`: The labelled rows only, in order.
    """
    names = list(classes)
    tests = [[naming(word) for word in words] for words in classes.values()]
    rows, labels = [], []
    for row, captions in enumerate(column_values(dataset, caption_column)):
        counts = [0] * len(names)
        for caption in [captions] if isinstance(captions, str) else captions:
            named = [i for i, words in enumerate(tests) if any(is_named(caption) for is_named in words)]
            if len(named) == 1:
                counts[named[0]] += 1
        best = max(range(len(names)), key=counts.__getitem__)
        if counts[best] >= votes and counts.count(counts[best]) == 1:
            rows.append(row)
            labels.append(best)
    if not rows:
        raise ValueError(f"no row of dataset has {votes} captions that name one of the classes {', '.join(names)}")
    labelled = dataset.select(rows)
    label: Any = datasets.ClassLabel(names=names)
    return labelled.add_column(label_column, labels, feature=datasets.Value("int64")).cast_column(label_column, label)
