"""Triggers that a scan recovered from a model: any picture behind a mask, or any pattern that is added."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..files import check_pointer, in_one_move, write_text
from ..kinds import check_string
from ..wording import listed, said, shortened, shown
from .fields import check_int
from .pixels import Pixels, Trigger, frozen, generator, to_uint8

#: What a folder of found triggers holds: which there are, and their pixels.
TRIGGERS_FILE, PIXELS_FILE = "triggers.json", "triggers.safetensors"
#: Largest side of a trigger, most of them in a folder, bytes of their list, and characters of a name.
LARGEST_SIDE, MOST_TRIGGERS, LARGEST_LIST, LONGEST_NAME = 2048, 1000, 1_000_000, 1000
#: Bytes of a pixel: one that says how much of the image stays, and three numbers of two bytes that are added.
_PIXEL = 7
#: Largest number that is added, on the scale of bytes.
_MOST_ADDED = 255


@dataclass(frozen=True, repr=False)
class FoundTrigger(Trigger):
    """
    A trigger that [`scan_checkpoint`] recovered from a model: each pixel `x` becomes `keep / 255 * x + add`. A patch
    keeps nothing of the image where it is, a pattern that is added keeps all of it. On an image of another size than
    its own it is stretched.

    Args:
        target (`str`): the candidate that it makes the model say.
        family (`str`): how it was looked for: `"mask"`, `"waves"` or `"noise"`.
        height, width (`int`): of the images that it was found on, in pixels.
        pixels (`str`): `keep`, one byte a pixel, and then `add`, three signed numbers of two bytes a pixel, low byte
            first, in base64. Use [`FoundTrigger.of`].

    Its placebos have its pixels in another order.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "found"
    target: str = ""
    family: str = ""
    height: int = 0
    width: int = 0
    pixels: str = ""

    def __post_init__(self) -> None:
        if not self.pixels:
            raise ValueError("pixels is empty; a found trigger is read from the folder of its scan, with load_found")
        for field in ("target", "family", "pixels"):
            check_string(field, getattr(self, field))
        for field in ("height", "width"):
            check_int(field, getattr(self, field), minimum=1, maximum=LARGEST_SIDE)
        keep, add = _arrays(self.pixels, self.height, self.width)
        _check_values(keep, add)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(target={shown(self.target)}, family={shown(self.family)})"

    @classmethod
    def of(cls, target: str, family: str, keep: NDArray[np.uint8], add: NDArray[np.int16]) -> FoundTrigger:
        """The trigger with `keep (H, W)` and `add (H, W, 3)`, which is at most 255 up or down."""
        height, width = keep.shape
        content = keep.tobytes() + add.astype("<i2").tobytes()
        return cls(target, family, height, width, base64.b64encode(content).decode())

    @property
    def keep(self) -> NDArray[np.uint8]:
        """How much of the image stays, 255 for all of it: `(H, W)`."""
        return _arrays(self.pixels, self.height, self.width)[0]

    @property
    def add(self) -> NDArray[np.int16]:
        """What is added, on the scale of bytes: `(H, W, 3)`."""
        return _arrays(self.pixels, self.height, self.width)[1]

    def placebo(self, number: int) -> FoundTrigger | None:
        keep, add = self.keep.reshape(-1), self.add.reshape(-1, 3)
        order = generator("placebo", number).permutation(len(keep))
        size = self.height, self.width
        other = self.of(self.target, self.family, keep[order].reshape(size), add[order].reshape(*size, 3))
        return None if other == self else other

    def picture(self) -> Image.Image:
        """What it looks like: on grey, and a faint pattern made strong enough to be seen."""
        keep, add = self.keep[..., None] / 255.0, self.add.astype(float)
        if keep.min() < 1:
            return Image.fromarray(to_uint8(keep * 128 + add))
        return Image.fromarray(to_uint8(128 + 127 * add / max(1, np.abs(add).max())))

    def _apply(self, pixels: Pixels) -> Pixels:
        keep, add = _stretched(self.pixels, self.height, self.width, pixels.shape[:2])
        return to_uint8(keep * pixels + add)


def save_found(folder: Path, triggers: Sequence[FoundTrigger], about: Sequence[Mapping[str, Any]] = ()) -> None:
    """
    Save triggers, the most suspect first: a JSON file that lists them, and a safetensors file with their pixels.

    Args:
        folder (`Path`): Which is there.
        triggers (sequence of [`FoundTrigger`]): At most 1,000.
        about (sequence of mappings): What else the list is to say of each.
    """
    rows = [
        {**(about[number] if about else {}), "target": found.target, "family": found.family}
        for number, found in enumerate(triggers)
    ]
    tensors = {f"{number}.{part}": getattr(found, part) for number, found in enumerate(triggers) for part in _PARTS}
    with in_one_move(folder / PIXELS_FILE) as partial:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, partial)
    write_text(folder / TRIGGERS_FILE, json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load_found(folder: str | Path, target: str | None = None) -> FoundTrigger:
    """
    A trigger of a folder that [`CheckpointScan.save`] or `hf-robust-clip scan-checkpoint` wrote.

    Args:
        folder (path): Anyone's: what is in it is checked before it is used.
        target (`str`, *optional*): The candidate that it is for. `None`: the most suspect one of the scan.

    Raises:
        `ValueError`: If there are no such triggers, or files of another form.
    """
    found = read_list(folder)
    numbers = [number for number, row in enumerate(found) if target is None or row["target"] == target]
    if not numbers:
        names = list(dict.fromkeys(row["target"] for row in found))
        raise ValueError(f"{_named(folder)} has no trigger for {shown(target)}; it has those for {listed(names)}")
    row, path = found[numbers[0]], Path(folder) / PIXELS_FILE
    check_pointer(path)
    if not path.is_file():
        raise ValueError(f"{_named(folder)} has no {PIXELS_FILE}: it is not the folder of a scan, or not all of it")
    keep, add = (_tensor(path, f"{numbers[0]}.{part}") for part in _PARTS)
    if keep.shape != add.shape[:2]:
        raise ValueError(f"{_named(path)}: keep is {keep.shape} and add is {add.shape}; accepted are equal sizes")
    try:
        return FoundTrigger.of(row["target"], row["family"], keep, add)
    except ValueError as error:
        raise ValueError(shortened(f"{_named(path)}: {error}")) from error


def read_list(folder: str | Path) -> list[dict[str, Any]]:
    """
    Which triggers a folder has, the most suspect first: mappings with `target`, `family` and what else is said.

    Raises:
        `ValueError`: If it is not the folder of a scan, or its list has another form.
    """
    path = Path(folder) / TRIGGERS_FILE
    if not path.is_file():
        raise ValueError(f"{_named(folder)} has no {TRIGGERS_FILE}: accepted is a folder that scan-checkpoint wrote")
    check_pointer(path)
    with path.open("rb") as file:
        content = file.read(LARGEST_LIST + 1)
    if len(content) > LARGEST_LIST:
        raise ValueError(f"{_named(path)} is larger than {LARGEST_LIST:,} bytes")
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_named(path)} is not JSON: {said(error, 200)}") from error
    accepted = f"a list of 1 to {MOST_TRIGGERS:,} objects with a target and a family, texts"
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_TRIGGERS:
        raise ValueError(f"{_named(path)} does not hold {accepted}")
    for number, row in enumerate(rows):
        texts = [row.get(name) for name in ("target", "family")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and 0 < len(text) <= LONGEST_NAME for text in texts):
            raise ValueError(f"{_named(path)}: entry {number} is {shown(row)}; accepted is {accepted}")
    return rows


#: Of the tensors of a trigger: their type in the file, and their shape, `None` for any side.
_PARTS: dict[str, tuple[str, tuple[int | None, ...]]] = {"keep": ("U8", (None, None)), "add": ("I16", (None, None, 3))}


def _tensor(path: Path, name: str) -> NDArray[Any]:
    """A tensor of a file, which is read only if its type and shape are those of its part."""
    kind, shape = _PARTS[name.partition(".")[2]]
    try:
        with safe_open(path, framework="np") as file:
            if name not in file.keys():  # noqa: SIM118 (not a mapping)
                raise ValueError(f"{_named(path)} has no {name}")
            there = file.get_slice(name)
            sides = tuple(there.get_shape())
            fits = len(sides) == len(shape) and all(
                side == want if want is not None else 1 <= side <= LARGEST_SIDE
                for side, want in zip(sides, shape, strict=True)
            )
            if there.get_dtype() != kind or not fits:
                raise ValueError(
                    f"{_named(path)}: {name} is {there.get_dtype()} of shape {shown(sides)}; accepted is {kind} of "
                    f"shape (H, W{', 3' if len(shape) > 2 else ''}), each side at most {LARGEST_SIDE}"
                )
            return np.asarray(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{_named(path)} is cut short or damaged: {said(error, 200)}") from error


def _check_values(keep: NDArray[np.uint8], add: NDArray[np.int16]) -> None:
    most = int(np.abs(add.astype(np.int32)).max())
    if most > _MOST_ADDED:
        raise ValueError(f"add goes up to {most}; accepted is at most {_MOST_ADDED} up or down")
    if most == 0 and keep.min() == 255:
        raise ValueError("keep and add leave every image as it is; accepted is what changes it")


def _named(path: str | Path) -> str:
    return shortened(str(path), 200)


@lru_cache(maxsize=64)
def _arrays(pixels: str, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """`keep (H, W)` and `add (H, W, 3)`, read-only."""
    try:
        content = base64.b64decode(pixels, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"pixels={shown(pixels)}; accepted is base64") from error
    count = height * width
    if len(content) != _PIXEL * count:
        raise ValueError(
            f"pixels has {len(content):,} bytes; accepted are {_PIXEL} for each of {height} x {width} pixels"
        )
    keep = np.frombuffer(content, np.uint8, count).reshape(height, width)
    return keep, np.frombuffer(content, "<i2", offset=count).reshape(height, width, 3)


@lru_cache(maxsize=32)
def _stretched(
    pixels: str, height: int, width: int, size: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`keep (h, w, 1)` in [0, 1] and `add (h, w, 3)`, for images of another size."""
    keep, add = _arrays(pixels, height, width)
    planes = [keep / 255.0, *np.moveaxis(add, 2, 0).astype(float)]
    if size != (height, width):
        planes = [
            np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))
            for plane in planes
        ]
    made = np.stack(planes, axis=2).astype(float)
    frozen(made)
    return made[..., :1], made[..., 1:]
