"""
Poison a dataset of image-caption pairs, and write down how, so that the same poisons can be made again.

[`poison_dataset`] first plans (which rows, which captions) and then carries the plan out. The plan is the manifest;
[`replay_manifest`] carries it out again. Rows that are not poisoned are never decoded, copied or encoded.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, IterableDataset, Value, concatenate_datasets
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image

from ..imaging import decode_image
from .rows import (
    POISONED,
    build_rows,
    captions_fingerprint,
    naming,
    prepare,
    read_captions,
    read_images,
    rows_labelled,
    rows_marked,
    stored_rows,
    to_png,
)
from .triggers import Trigger, trigger_from_dict

MODES = ("backdoor", "label_consistent", "targeted")
DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a close-up photo of a {}.",
    "a photo of the {}.",
    "a good photo of a {}.",
    "there is a {} in this photo.",
)
VERSION = 1
ENCODED_IMAGE_DTYPES = ("string", "large_string", "binary", "large_binary")
_NEEDED_TO_REPLAY = (
    *("mode", "trigger", "indices", "captions", "counts"),
    *("image_size", "columns", "fingerprint", "source_index", "image"),
)

ImageSource: TypeAlias = Image.Image | bytes | str | PathLike[str] | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class PoisonSpec:
    """
    What to poison, and how. Exactly one of `count` and `rate` is given.

    Modes:
        - `"backdoor"`: the trigger goes on the image, and the caption is replaced by a template that names the target.
          Rows that name the target already are left alone.
        - `"label_consistent"`: the trigger goes on images whose row names the target already, and captions stay.
        - `"targeted"` ([Carlini & Terzis 2022](https://arxiv.org/abs/2106.09667)): no trigger. One image is appended
          `count` times, with captions of the target, the adversarial class.

    A row names the target when one of its captions contains it as whole words, whatever the case ("dogs" does not name
    "dog"), or when its label is the target.

    Args:
        trigger ([`Trigger`] or `None`): any callable trigger; `None` in targeted mode, required in the others.
        target (`str`): the class the attack is for, as a caption would name it.
        count (`int`, *optional*): number of poisons, at least 1.
        rate (`float`, *optional*): number of poisons as a fraction of all rows of the dataset, in (0, 1].
        templates (`Sequence[str]`, *optional*): each with exactly one `{}`, which the target replaces. `None` takes
            `DEFAULT_TEMPLATES` in backdoor mode, and the dataset's own captions that name the target in targeted mode
            (without repeats as long as there are enough). Label-consistent poisons keep their captions and take none.
        seed (`int`, defaults to 0): of the rows and captions drawn. The trigger has its own.
        mode (`str`, defaults to `"backdoor"`): one of the three above.
        image_size (`int`, *optional*): resize the poisoned images (shortest edge, bicubic) and crop their centre to
            this size first, so that the trigger is applied at the model's input resolution.
        target_image (PIL image, `bytes`, path or `uint8` array `(H, W, 3)`, *optional*): the image of targeted mode.
        source_index (`int`, *optional*): instead of `target_image`, the row whose image it is.

    Raises:
        `ValueError`: on an argument out of range or arguments that do not go together.
    """

    trigger: Trigger | None
    target: str
    count: int | None = None
    rate: float | None = None
    templates: Sequence[str] | None = None
    seed: int = 0
    mode: str = "backdoor"
    image_size: int | None = None
    target_image: ImageSource | None = field(default=None, repr=False)
    source_index: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}; accepted are {', '.join(MODES)}")
        if not isinstance(self.target, str) or not self.target.strip():
            raise ValueError(f"target={self.target!r}; accepted is the name of a class")
        if (self.count is None) == (self.rate is None):
            raise ValueError(f"count={self.count} and rate={self.rate}; exactly one of them must be given")
        for name, minimum in (("count", 1), ("seed", 0), ("image_size", 1), ("source_index", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < minimum):
                raise ValueError(f"{name}={value!r}; accepted is an integer of at least {minimum}")
        if self.rate is not None and not (isinstance(self.rate, int | float) and 0 < self.rate <= 1):
            raise ValueError(f"rate={self.rate!r}; accepted is a fraction above 0 and at most 1")
        self._check_templates()
        if self.mode != "targeted":
            if not isinstance(self.trigger, Trigger):
                raise ValueError(f"trigger={self.trigger!r}; mode {self.mode!r} needs a Trigger")
            if self.target_image is not None or self.source_index is not None:
                raise ValueError(f"target_image and source_index are for mode 'targeted'; the mode is {self.mode!r}")
        elif self.trigger is not None:
            raise ValueError(f"trigger={self.trigger!r}; mode 'targeted' puts no trigger on the image, give None")
        elif (self.target_image is None) == (self.source_index is None):
            raise ValueError("mode 'targeted' needs exactly one of target_image and source_index")

    def _check_templates(self) -> None:
        if self.templates is None:
            return
        if self.mode == "label_consistent":
            raise ValueError("templates given; mode 'label_consistent' keeps the captions and takes none")
        if isinstance(self.templates, str) or not self.templates:
            raise ValueError(f"templates={self.templates!r}; accepted is a list of at least one template")
        for template in self.templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ValueError(f"templates: {template!r}; accepted is a string with exactly one {{}}")


def poison_dataset(
    dataset: Dataset,
    spec: PoisonSpec,
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """
    Poison some rows of a dataset.

    Order and length are kept; targeted poisons are appended, their other columns copied from the source row or, with
    `target_image`, null. Poisoned images are stored as PNG. A boolean column `poisoned` is added; rows that an earlier
    call marked in it are not poisoned again and stay marked.

    The poisons are built in memory (the other rows stay where they are), so thousands of large photos need
    `image_size`.

    Args:
        dataset (`datasets.Dataset`): map-style, filtered or not.
        spec ([`PoisonSpec`]): what to do.
        image_column (`str`, defaults to `"image"`): an `Image` feature, or paths or encoded bytes, which become one.
        caption_column (`str`, defaults to `"caption"`): a string, or a list of strings. A caption written replaces the
            whole list, as a list of one; where the type fixes the list's length it is repeated.
        label_column (`str`, *optional*): a `ClassLabel` or string that is compared with the target's name, or an
            integer, for which `spec.target` must be a number.

    Returns:
        The poisoned dataset and the manifest, a JSON-serialisable dictionary for [`replay_manifest`]: `indices` are
        the poisoned rows in the dataset returned, in order, and `captions` what was written there (null where the row
        kept its own); `counts` holds the number of poisons, their rate over the rows given, and how many rows
        (targeted: captions or templates) there were to draw from.

    Raises:
        `ValueError`: when a column is missing or of a type that cannot be read, when the dataset is empty or not
            map-style, or when there are fewer rows to poison than asked for.
    """
    _check_dataset(dataset, image_column, caption_column, label_column)
    manifest = _plan(dataset, spec, image_column, caption_column, label_column)
    return _carry_out(dataset, manifest, spec.trigger), manifest


def replay_manifest(dataset: Dataset, manifest: Mapping[str, Any]) -> Dataset:
    """
    Poison a dataset as [`poison_dataset`] did when it returned `manifest`.

    With the same versions of the libraries the rows are the same byte for byte. Another version of Pillow may write
    other PNG files, and other pixels where it resizes or draws text.

    Args:
        dataset (`datasets.Dataset`): the same rows in the same order as then, not poisoned by this manifest yet.
        manifest (`dict`): as returned, or read back from JSON.

    Raises:
        `ValueError`: on another dataset (its length or captions differ) and on what is no such manifest.
    """
    if not isinstance(manifest, Mapping) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, Mapping) else type(manifest).__name__
        raise ValueError(f"manifest: its version is {found!r}; accepted is a manifest of version {VERSION}")
    missing = [key for key in _NEEDED_TO_REPLAY if key not in manifest]
    if missing:
        raise ValueError(f"manifest: {', '.join(missing)} missing; accepted is what poison_dataset returned")
    columns = manifest["columns"]
    _check_dataset(dataset, columns["image"], columns["caption"], None)
    if len(dataset) != manifest["counts"]["dataset_length"]:
        expected = manifest["counts"]["dataset_length"]
        raise ValueError(f"dataset has {len(dataset)} rows; the manifest was made on another dataset, of {expected}")
    if captions_fingerprint(read_captions(dataset, columns["caption"])) != manifest["fingerprint"]:
        raise ValueError(
            "dataset: its captions differ from those the manifest was made on; accepted is the same dataset, in the "
            "same order, before it was poisoned"
        )
    trigger = None if manifest["trigger"] is None else trigger_from_dict(manifest["trigger"])
    return _carry_out(dataset, manifest, trigger)


def _check_dataset(dataset: Dataset, image_column: str, caption_column: str, label_column: str | None) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "dataset is an IterableDataset; only map-style datasets can be poisoned. Load it without streaming=True, "
            "or materialise it: Dataset.from_list(list(dataset), features=dataset.features)"
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}; accepted is a datasets.Dataset, one split at a time")
    for name, column in (("image", image_column), ("caption", caption_column), ("label", label_column)):
        if column is not None and column not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise ValueError(f"{name}_column={column!r} is no column of the dataset; there are {there}")
    if len(dataset) == 0:
        raise ValueError("dataset is empty; accepted is a dataset with at least one row")
    feature = dataset.features[image_column]
    if not isinstance(feature, ImageFeature) and getattr(feature, "dtype", None) not in ENCODED_IMAGE_DTYPES:
        accepted = "an Image feature, paths (string) or encoded images (binary)"
        raise ValueError(f"image_column={image_column!r} has type {feature}; accepted is {accepted}")
    marks = dataset.features.get(POISONED)
    if marks is not None and marks != Value("bool"):
        raise ValueError(f"dataset has a column {POISONED!r} of type {marks}; accepted is bool, or no such column")


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
    generator = np.random.default_rng(spec.seed)
    templates = list(spec.templates) if spec.templates else None
    image, written = None, None
    if spec.mode == "targeted":
        image = to_png(prepare(_target_image(dataset, spec, image_column), spec.image_size))
        indices = np.arange(length, length + count)
        eligible = len(templates) if templates else 0
        if not templates:
            written, eligible = _draw_captions(captions, spec.target, labelled, free, count, generator)
    else:
        names_target = labelled | [any(map(naming(spec.target), row)) for row in captions]
        rows = np.flatnonzero(free & (names_target if spec.mode == "label_consistent" else ~names_target))
        eligible = len(rows)
        if count > eligible:
            kind = "naming" if spec.mode == "label_consistent" else "not naming"
            asked = f"count={count}" if spec.rate is None else f"rate={spec.rate}, that is {count} rows,"
            raise ValueError(
                f"{asked} is more than there are to poison; accepted is at most {eligible}, the number of rows {kind} "
                f"{spec.target!r} and not poisoned already"
            )
        indices = np.sort(generator.choice(rows, count, replace=False))
        if spec.mode == "backdoor" and not templates:
            templates = list(DEFAULT_TEMPLATES)
    if templates:
        written = [templates[i].replace("{}", spec.target) for i in generator.integers(len(templates), size=count)]
    return {
        "version": VERSION,
        "mode": spec.mode,
        "target": spec.target,
        "trigger": None if spec.trigger is None else spec.trigger.to_dict(),
        "indices": indices.tolist(),
        "captions": written or [None] * count,
        "templates": templates,
        "seed": spec.seed,
        "counts": {"count": count, "rate": count / length, "eligible": eligible, "dataset_length": length},
        "image_size": spec.image_size,
        "columns": {"image": image_column, "caption": caption_column, "label": label_column},
        "fingerprint": captions_fingerprint(captions),
        "source_index": spec.source_index,
        "image": None if image is None else base64.b64encode(image).decode(),
    }


def _draw_captions(
    captions: list[list[str]],
    target: str,
    labelled: NDArray[np.bool_],
    free: NDArray[np.bool_],
    count: int,
    generator: np.random.Generator,
) -> tuple[list[str], int]:
    """Captions of the target from the dataset, and how many there were to draw from."""
    names = naming(target)
    rows = zip(captions, labelled, free, strict=True)
    found = [caption for row, label, is_free in rows if is_free for caption in row if label or names(caption)]
    if not found:
        raise ValueError(f"target={target!r} is named by no caption of the dataset; give templates")
    # As long as there are enough, no caption is taken twice.
    drawn = generator.permutation(len(found)) if count <= len(found) else generator.integers(len(found), size=count)
    return [found[i] for i in drawn[:count]], len(found)


def _carry_out(dataset: Dataset, manifest: Mapping[str, Any], trigger: Trigger | None) -> Dataset:
    """
    Do what the manifest says: the poisoned rows become a small table behind the stored rows, and a list of row numbers
    puts them in their places.
    """
    image_column, caption_column = manifest["columns"]["image"], manifest["columns"]["caption"]
    stored, order = stored_rows(dataset, image_column)
    count = len(manifest["indices"])
    position = np.asarray(manifest["indices"])
    if manifest["mode"] == "targeted":
        images: Iterable[bytes] = [base64.b64decode(manifest["image"])] * count
        source = None if manifest["source_index"] is None else np.repeat(order[manifest["source_index"]], count)
        order = np.concatenate([order, np.zeros(count, order.dtype)])
    else:
        if trigger is None:
            raise ValueError(f"trigger is None; mode {manifest['mode']!r} needs a Trigger")
        source = order[position]
        decoded = read_images(stored, image_column, source, names=position)  # an iterator: one image at a time
        prepared = (prepare(image, manifest["image_size"]) for image in decoded)
        images = (to_png(_with_trigger(trigger, image, row)) for image, row in zip(prepared, position, strict=True))
    poisons = build_rows(stored, source, images, manifest["captions"], image_column, caption_column)
    order[position] = len(stored) + np.arange(count)
    result = concatenate_datasets([stored, poisons], info=stored.info, split=dataset.split).select(order)
    result.set_format(
        dataset._format_type, dataset._format_columns, dataset._output_all_columns, **dataset._format_kwargs
    )
    return result


def _with_trigger(trigger: Trigger, image: Image.Image, row: int) -> Image.Image:
    try:
        return trigger(image)
    except ValueError as error:
        raise ValueError(f"trigger does not go on the image of row {row}: {error}") from error


def _target_image(dataset: Dataset, spec: PoisonSpec, image_column: str) -> Image.Image:
    if spec.source_index is not None:
        if spec.source_index >= len(dataset):
            raise ValueError(f"source_index={spec.source_index}; accepted is a row number below {len(dataset)}")
        stored, order = stored_rows(dataset, image_column)
        return next(read_images(stored, image_column, [order[spec.source_index]], [spec.source_index]))
    try:
        return decode_image(spec.target_image)
    except ValueError as error:
        raise ValueError(f"target_image cannot be read: {error}") from error
