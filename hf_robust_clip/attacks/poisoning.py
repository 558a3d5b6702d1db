"""
Poison a dataset of image-caption pairs, and write down how, so that the same poisons can be made again.

[`poison_dataset`] first plans (which rows, which captions) and then carries the plan out. The plan is the manifest;
[`replay_manifest`] carries it out again. Rows that are not poisoned are never decoded, copied or encoded.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from PIL import Image

from ..columns import check_pairs, naming
from ..kinds import kind, wrong_dataset
from ..wording import shown
from .manifests import check_dataset_part
from .rows import (
    build_rows,
    captions_fingerprint,
    decode,
    encoded_target,
    read_captions,
    read_images,
    rows_labelled,
    rows_marked,
    stored_rows,
    triggered_png,
)
from .spec import OWN_CAPTIONS, VERSION, PoisonSpec, check_specs
from .streaming import replay_stream
from .text_triggers import TextTrigger
from .triggers import Trigger


def poison_dataset(
    dataset: Dataset,
    spec: PoisonSpec | Sequence[PoisonSpec],
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """
    Poison some rows of a dataset.

    Order and length are kept; targeted poisons are appended, their other columns copied from the source row or, with
    `target_image`, null. Poisoned images are stored as PNG; those of text-query poisons stay as they are. A boolean
    column `poisoned` is added; rows that an earlier call marked in it are not poisoned again and stay marked.

    Several attacks are carried out one after the other, so that no row is poisoned twice. A rate is of the rows that
    there are when its turn comes.

    The poisons are built in memory (the other rows stay where they are), so thousands of large photos need
    `image_size`.

    Args:
        dataset (`datasets.Dataset`): map-style, filtered or not. For streams there is [`poison_stream`].
        spec ([`PoisonSpec`] or a sequence of them): what to do.
        image_column (`str`, defaults to `"image"`): an `Image` feature, or paths or encoded bytes, which become one.
        caption_column (`str`, defaults to `"caption"`): a string, or a list of strings. A caption written replaces the
            whole list, as a list of one; where the type fixes the list's length it is repeated.
        label_column (`str`, *optional*): a `ClassLabel` or string that is compared with the target's name, or an
            integer, for which `spec.target` must be a number.

    Returns:
        The poisoned dataset and the manifest, a JSON-serialisable dictionary for [`replay_manifest`]: `indices` are
        the poisoned rows in the dataset returned, in order, and `captions` what was written there (null where the row
        kept its own); `counts` holds the number of poisons, their rate over the rows given, and how many rows
        (targeted: captions or templates) there were to draw from. Of several attacks: `parts` is the list of their
        manifests, and `counts` sums them up.

    Raises:
        `ValueError`: when a column is missing or of a type that cannot be read, when the dataset is empty or not
            map-style, or when there are fewer rows to poison than asked for.
    """
    if not isinstance(spec, PoisonSpec):
        poisoned, parts = dataset, []
        for part in check_specs(spec):
            poisoned, manifest = poison_dataset(poisoned, part, image_column, caption_column, label_column)
            parts.append(manifest)
        count = sum(part["counts"]["count"] for part in parts)
        counts = {"count": count, "rate": count / len(dataset), "dataset_length": len(dataset)}
        return poisoned, {"version": VERSION, "parts": parts, "counts": counts}
    _check_dataset(dataset, image_column, caption_column, label_column)
    manifest = _plan(dataset, spec, image_column, caption_column, label_column)
    return _carry_out(dataset, manifest, spec.trigger), manifest


def replay_manifest(dataset: Dataset | IterableDataset, manifest: Mapping[str, Any]) -> Dataset | IterableDataset:
    """
    Poison a dataset as [`poison_dataset`], or a stream as [`poison_stream`], did when it returned `manifest`.

    With the same versions of the libraries the rows are the same byte for byte. Another version of Pillow may write
    other PNG files, and other pixels where it resizes or draws text.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): the same rows in the same order as then, not
            poisoned by this manifest yet. Of a stream only the columns can be checked.
        manifest (`dict`): as returned, or read back from JSON.

    Raises:
        `ValueError`: on another dataset (its length or captions differ), on a manifest of a stream for a dataset or
            the other way round, and on what is not such a manifest.
    """
    if not isinstance(manifest, Mapping) or manifest.get("version") != VERSION:
        found = f"its version is {shown(manifest.get('version'))}" if isinstance(manifest, Mapping) else kind(manifest)
        raise ValueError(
            f"manifest: {found}; accepted is a dictionary that poison_dataset returned, of version {VERSION}"
        )
    parts = manifest.get("parts", [manifest])
    if not isinstance(parts, list) or not parts or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"manifest: its parts are {shown(parts)}; accepted is a list of manifests, at least one")
    if isinstance(dataset, IterableDataset) and all(part.get("stream") for part in parts):
        return replay_stream(dataset, parts)
    for part in parts:
        dataset = _replay(dataset, part)
    return dataset


def _replay(dataset: Dataset | IterableDataset, manifest: Mapping[str, Any]) -> Dataset:
    if manifest.get("stream"):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, but the manifest was made on a stream; accepted is a "
            "datasets.IterableDataset"
        )
    spec = check_dataset_part(manifest)
    columns = manifest["columns"]
    dataset = _check_dataset(dataset, columns["image"], columns["caption"], None)
    if len(dataset) != manifest["counts"]["dataset_length"]:
        expected = manifest["counts"]["dataset_length"]
        raise ValueError(f"dataset has {len(dataset)} rows; the manifest was made on another dataset, of {expected}")
    if captions_fingerprint(read_captions(dataset, columns["caption"])) != manifest["fingerprint"]:
        raise ValueError(
            "dataset: its captions differ from those the manifest was made on; accepted is the same dataset, in the "
            "same order, before it was poisoned"
        )
    return _carry_out(dataset, manifest, spec.trigger)


def _check_dataset(
    dataset: Dataset | IterableDataset, image_column: str, caption_column: str, label_column: str | None
) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise wrong_dataset("dataset", dataset, "a datasets.Dataset (poison_stream poisons streams as they are read)")
    columns = {"image_column": image_column, "caption_column": caption_column}
    columns |= {} if label_column is None else {"label_column": label_column}
    check_pairs(dataset.with_format(None), columns, arrays=False)
    return dataset


def _plan(
    dataset: Dataset, spec: PoisonSpec, image_column: str, caption_column: str, label_column: str | None
) -> dict[str, Any]:
    """The manifest: everything that is random or depends on the captions is decided here."""
    length = len(dataset)
    count = spec.count if spec.count is not None else round((spec.rate or 0.0) * length)
    if count == 0:
        raise ValueError(f"rate={spec.rate} of {length} rows poisons none; give a higher rate, or a count")
    captions = read_captions(dataset, caption_column)
    labelled = rows_labelled(dataset, spec.target, label_column)  # (N,)
    free = ~rows_marked(dataset)  # (N,)
    names = naming(spec.target)
    generator = np.random.default_rng(spec.seed)
    manifest = spec.to_dict()
    templates = None if spec.templates == OWN_CAPTIONS else manifest["templates"]
    image, written = None, None

    def naming_target() -> list[str]:
        rows_of_target = zip(captions, labelled, free, strict=True)
        found = [text for row, label, is_free in rows_of_target if is_free for text in row if label or names(text)]
        if not found:
            raise ValueError(f"target={shown(spec.target)} is named by no caption of the dataset; give templates")
        return found

    if spec.mode == "targeted":
        image = encoded_target(_target_image(dataset, spec, image_column), spec.image_size)
        indices = np.arange(length, length + count)
        eligible = len(templates) if templates else 0
        if not templates:
            found = naming_target()
            written, eligible = _draw(found, count, generator), len(found)
    else:
        names_target = labelled | [any(map(names, row)) for row in captions]  # (N,)
        on_target = spec.mode in ("label_consistent", "text_query")
        rows = np.flatnonzero(free & (names_target if on_target else ~names_target))
        eligible = len(rows)
        if count > eligible:
            asked = f"count={count}" if spec.rate is None else f"rate={spec.rate}, that is {count} rows,"
            raise ValueError(
                f"{asked} is more than there are to poison; accepted is at most {eligible}, the number of rows "
                f"{'naming' if on_target else 'not naming'} {shown(spec.target)} and not poisoned already"
            )
        indices = np.sort(generator.choice(rows, count, replace=False))
        if spec.mode == "text_query":
            assert isinstance(spec.trigger, TextTrigger)  # as the spec saw to
            queries = templates or [text for row in np.flatnonzero(free & ~names_target) for text in captions[row]]
            if not queries:
                raise ValueError(
                    f"target={shown(spec.target)} is named by every row that is not poisoned; give templates"
                )
            written = [spec.trigger(query) for query in _draw(queries, count, generator)]
        elif spec.templates == OWN_CAPTIONS:
            written = _draw(naming_target(), count, generator)
    if templates and written is None:
        written = [templates[i].replace("{}", spec.target) for i in generator.integers(len(templates), size=count)]
    return {
        **manifest,
        "indices": indices.tolist(),
        "captions": written or [None] * count,
        "counts": {"count": count, "rate": count / length, "eligible": eligible, "dataset_length": length},
        "columns": {"image": image_column, "caption": caption_column, "label": label_column},
        "fingerprint": captions_fingerprint(captions),
        "source_index": spec.source_index,
        "image": image,
    }


def _draw(captions: list[str], count: int, generator: np.random.Generator) -> list[str]:
    """As long as there are enough, no caption is taken twice."""
    enough = count <= len(captions)
    drawn = generator.permutation(len(captions)) if enough else generator.integers(len(captions), size=count)
    return [captions[i] for i in drawn[:count]]


def _carry_out(dataset: Dataset, manifest: Mapping[str, Any], trigger: Trigger | TextTrigger | None) -> Dataset:
    """
    Do what the manifest says: the poisoned rows become a small table behind the stored rows, and a list of row numbers
    puts them in their places.
    """
    image_column, caption_column = manifest["columns"]["image"], manifest["columns"]["caption"]
    stored, order = stored_rows(dataset, image_column)
    count = len(manifest["indices"])
    position = np.asarray(manifest["indices"])
    images: Iterable[bytes] | None = None
    if manifest["mode"] == "targeted":
        images = [base64.b64decode(manifest["image"])] * count
        source = None if manifest["source_index"] is None else np.repeat(order[manifest["source_index"]], count)
        order = np.concatenate([order, np.zeros(count, order.dtype)])
    elif manifest["mode"] == "text_query":
        source = order[position]
    else:
        assert isinstance(trigger, Trigger)  # as its PoisonSpec saw to
        source = order[position]
        decoded = read_images(stored, image_column, source, names=position)  # an iterator: one image at a time
        images = (
            triggered_png(trigger, image, manifest["image_size"], f"row {row}")
            for image, row in zip(decoded, position, strict=True)
        )
    poisons = build_rows(stored, source, images, manifest["captions"], image_column, caption_column)
    order[position] = len(stored) + np.arange(count)
    result = concatenate_datasets([stored, poisons], info=stored.info, split=dataset.split).select(order)
    result.set_format(
        dataset._format_type, dataset._format_columns, dataset._output_all_columns, **dataset._format_kwargs
    )
    return result


def _target_image(dataset: Dataset, spec: PoisonSpec, image_column: str) -> Image.Image:
    if spec.source_index is None:
        return decode(spec.target_image)
    if spec.source_index >= len(dataset):
        raise ValueError(f"source_index={spec.source_index}; accepted is a row number below {len(dataset)}")
    stored, order = stored_rows(dataset, image_column)
    return next(read_images(stored, image_column, [order[spec.source_index]], [spec.source_index]))
