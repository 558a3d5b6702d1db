"""
Read and write single rows of a `datasets.Dataset` without decoding, copying or encoding the others.

For [`poison_dataset`] and [`poison_stream`].
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Value
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from PIL import Image

from ..columns import POISONED, check_captions
from ..imaging import decode_image, without_ends
from ..wording import listed, shortened, shown
from .triggers import Trigger


def stored_rows(dataset: Dataset, image_column: str) -> tuple[Dataset, NDArray[np.int64]]:
    """
    All rows that a dataset is stored in, with the column `poisoned`, and the number therein of each of its own rows.

    Adding a column to a filtered or shuffled dataset would copy every image, as datasets flattens it first.
    """
    indices = dataset._indices
    order = np.arange(len(dataset)) if indices is None else indices.column(0).to_numpy().astype(np.int64)
    fingerprint = Hasher.hash([dataset._fingerprint, "stored rows"])
    stored = Dataset(dataset.data, info=dataset.info, split=dataset.split, fingerprint=fingerprint)
    if not isinstance(stored.features[image_column], ImageFeature):
        stored = stored.cast_column(image_column, ImageFeature())
    if POISONED not in stored.column_names:
        clean = np.zeros(len(stored), dtype=bool)
        stored = stored.add_column(POISONED, clean, new_fingerprint=fingerprint + "-marked", feature=Value("bool"))
    return stored, order


def read_captions(dataset: Dataset, caption_column: str) -> list[list[str]]:
    """Every row's captions; a single one as a list of one."""
    column = shown(caption_column)
    values = enumerate(_column(dataset, caption_column))
    return [check_captions(value, f"row {row}, column {column}") for row, value in values]


def rows_labelled(dataset: Dataset, target: str, label_column: str | None) -> NDArray[np.bool_]:
    """Which rows have the target as their label, `(N,)`."""
    if label_column is None:
        return np.zeros(len(dataset), dtype=bool)
    is_target = labelling(dataset.features[label_column], target, label_column)
    labels = list(_column(dataset, label_column))
    found = np.array([is_target(label) for label in labels], dtype=bool)
    # As of a table, in which all cells are text: no row would count as one of the target.
    if not found.any() and labels and all(isinstance(label, str) and label.isdecimal() for label in labels):
        raise ValueError(
            f"target={shown(target)}, but {shown(label_column)} holds numbers of classes: give one of them as the "
            "target, or a label column with the names of the classes"
        )
    return found


def labelling(feature: Any, target: str, label_column: str) -> Callable[[Any], bool]:
    """Whether a label, of a column of type `feature`, is the target."""
    wanted: str | int
    if isinstance(feature, ClassLabel):
        names = [name.casefold() for name in feature.names]
        if target.casefold() not in names:
            raise ValueError(
                f"target={shown(target)} is not a class of {shown(label_column)}; accepted are {listed(feature.names)}"
            )
        wanted = names.index(target.casefold())
    elif "string" in (dtype := str(getattr(feature, "dtype", feature))):
        wanted = target.strip().casefold()
    elif "int" in dtype:
        if not target.strip().isdecimal():
            raise ValueError(
                f"target={shown(target)}, but {shown(label_column)} holds integers; accepted is a number, or a label "
                "column of type ClassLabel or string"
            )
        wanted = int(target)
    else:
        raise ValueError(
            f"label_column={shown(label_column)} has type {shown(feature)}; accepted is ClassLabel, string or integer"
        )
    return partial(_is_label, wanted)


def rows_marked(dataset: Dataset) -> NDArray[np.bool_]:
    """Which rows an earlier poisoning marked, `(N,)`."""
    if POISONED not in dataset.column_names:
        return np.zeros(len(dataset), dtype=bool)
    return np.array([bool(mark) for mark in _column(dataset, POISONED)], dtype=bool)


def captions_fingerprint(captions: list[list[str]]) -> str:
    return hashlib.sha256("".join(json.dumps(row) + "\n" for row in captions).encode()).hexdigest()


def read_images(
    stored: Dataset, image_column: str, rows: Iterable[int], names: Iterable[int]
) -> Iterator[Image.Image]:
    """Decode the images of some rows; `names` are the row numbers that an error gives."""
    encoded = stored.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    for row, name in zip(rows, names, strict=True):
        yield decode(encoded[int(row)][image_column], f"image_column={shown(image_column)}: the image of row {name}")


def decode(image: Any, name: str = "target_image") -> Image.Image:
    """An image that an error calls `name`: by default the `target_image` of a [`PoisonSpec`]."""
    try:
        return decode_image(image)
    except ValueError as error:
        raise ValueError(shortened(f"{name} cannot be read: {error}")) from error


def prepare(image: Image.Image, size: int | None) -> Image.Image:
    """
    The image, with a `size` resized and cropped as CLIP's image processor does; `ValueError` where it has more pixels
    in between than Pillow's guard says, as a long strip can.
    """
    if size is None:
        return image
    image = without_ends(image)
    width, height = image.size
    short = min(width, height)
    width, height, most = width * size // short, height * size // short, Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(
            f"image_size={size} makes {width} x {height} pixels of it before it is cropped, more than the {most} of "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def encoded_target(image: Image.Image, size: int | None) -> str:
    """What a manifest holds of the image of targeted mode: a PNG file in base64, prepared as by [`prepare`]."""
    return base64.b64encode(to_png(prepare(image, size))).decode()


def to_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def triggered_png(trigger: Trigger, image: Image.Image, size: int | None, row: str) -> bytes:
    """The image with the trigger on it, prepared as by [`prepare`]; `row` is what an error calls its row."""
    try:
        return to_png(trigger(prepare(image, size)))
    except ValueError as error:
        raise ValueError(shortened(f"trigger does not go on the image of {row}: {error}")) from error


def build_rows(
    stored: Dataset,
    source: NDArray[np.int64] | None,
    images: Iterable[bytes] | None,
    captions: Sequence[str | None],
    image_column: str,
    caption_column: str,
) -> Dataset:
    """
    One poisoned row for each of `captions`, with the columns of `stored`.

    Columns come from the rows `source` of `stored`, or are null without `source`, except for the images and the
    captions given: `None`, or captions that are `None`, stand for those of `source`, as they are stored.
    """
    schema = stored.features.arrow_schema
    new: dict[str, Any] = {POISONED: pa.array([True] * len(captions))}
    if images is not None:
        new[image_column] = _image_array(images, schema.field(image_column).type)
    if captions[0] is not None:
        new[caption_column] = caption_array(captions, schema.field(caption_column).type)
    kept = [name for name in stored.column_names if name not in new]
    if source is None:
        new |= {name: pa.nulls(len(captions), schema.field(name).type) for name in kept}
    elif kept:
        rows = stored.select_columns(kept).with_format("arrow").select(source)[:]
        new |= {name: rows[name] for name in kept}
    table = pa.Table.from_arrays([new[name] for name in stored.column_names], schema=schema)
    return Dataset(table, info=DatasetInfo(features=stored.features))


def _is_label(wanted: str | int, label: Any) -> bool:
    return (label.strip().casefold() if isinstance(label, str) else label) == wanted


def _image_array(images: Iterable[bytes], storage: pa.DataType) -> pa.ChunkedArray:
    """In short chunks, since Arrow's binary type holds at most 2 GB in each."""
    encoded = ({"bytes": image, "path": None} for image in images)
    chunks = []
    while part := list(islice(encoded, 64)):
        chunks.append(pa.array(part, type=storage))
    return pa.chunked_array(chunks)


def caption_array(captions: Sequence[str | None], storage: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(storage):
        return pa.array([[caption] * storage.list_size for caption in captions], type=storage)
    is_list = pa.types.is_list(storage) or pa.types.is_large_list(storage)
    return pa.array([[caption] for caption in captions] if is_list else captions, type=storage)


def _column(dataset: Dataset, name: str) -> list[Any]:
    return dataset.with_format(None).select_columns([name])[:][name]
