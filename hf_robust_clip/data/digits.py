"""
The embedded dataset: scikit-learn's handwritten digits as image-caption pairs, with a tokenizer, a processor and a
model small enough to train on two cores in a minute. What the demo, the tests and a first try need, with no download.
"""

from __future__ import annotations

from typing import Literal

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from transformers import CLIPModel, CLIPProcessor

from ..seeding import derive_seed
from ..wording import shown
from .scratch import build_model, build_processor

CLASS_NAMES: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CAPTION_TEMPLATES: tuple[str, ...] = (
    "a photo of the digit {}",
    "a picture of a handwritten {}",
    "the number {} written by hand",
    "a scan of the figure {}",
    "somebody wrote the digit {}",
    "this is a {} in grey",
    "a small image of the number {}",
)

IMAGE_SIZE = 16
#: Of the 1,797 digits, every fourth or so is held out: those whose number modulo 9 is 0 or 5.
_HELD_OUT = (0, 5)
_SIDE = 12


def load_digit_pairs(
    split: Literal["train", "test"] = "train", renderings: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """
    Render handwritten digits (Alpaydin and Kaynak, UCI, 1998, 8x8, from scikit-learn) into image-caption pairs.

    Each rendering scales a digit to 12 x 12, puts it somewhere on a grey field of 16 x 16, and adds light noise; its
    caption is one of seven. A digit is in one split only, so a test image was never seen in any rendering.

    Args:
        split (`str`): `"train"`: 1,397 digits; `"test"`: the 400 held out.
        renderings (`int`, *optional*): Times that each digit is rendered, at least 1; by default 4 for `"train"`
            (5,588 pairs) and 1 for `"test"`.
        seed (`int`): Of places, noise and captions.

    Returns:
        `datasets.Dataset`: `image` (RGB, 16 x 16), `caption`, `label` (0 to 9), `digit` (number of the digit in
        scikit-learn's set).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', but is {shown(split)}")
    renderings = renderings if renderings is not None else (4 if split == "train" else 1)
    if renderings < 1:
        raise ValueError(f"renderings must be at least 1, but is {shown(renderings)}")
    bunch = load_digits()
    held_out = np.isin(np.arange(len(bunch.images)) % 9, _HELD_OUT)
    numbers = np.flatnonzero(held_out if split == "test" else ~held_out)
    rows: dict[str, list[object]] = {"image": [], "caption": [], "label": [], "digit": []}
    for rendering in range(renderings):
        for number in numbers.tolist():
            rng = np.random.default_rng(derive_seed(seed, rendering, number))
            label = int(bunch.target[number])
            rows["image"].append(_render(bunch.images[number], rng))
            rows["caption"].append(CAPTION_TEMPLATES[rng.integers(len(CAPTION_TEMPLATES))].format(CLASS_NAMES[label]))
            rows["label"].append(label)
            rows["digit"].append(number)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(CLASS_NAMES)),
            "digit": datasets.Value("int32"),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def _render(digit: np.ndarray, rng: np.random.Generator) -> Image.Image:
    ink = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    field = np.full((IMAGE_SIZE, IMAGE_SIZE), 64.0)
    row, column = rng.integers(0, IMAGE_SIZE - _SIDE + 1, size=2)
    field[row : row + _SIDE, column : column + _SIDE] += np.asarray(ink) * (128 / 255)
    grey = field[..., None] + rng.normal(0, 8, size=(IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))


def digit_processor() -> CLIPProcessor:
    """The processor of [`digit_model`]: a tokenizer learned from the digits' captions, and 16 x 16 images."""
    captions = [template.format(name) for template in CAPTION_TEMPLATES for name in CLASS_NAMES]
    return build_processor(captions, image_size=IMAGE_SIZE, merges=200, max_length=16)


def digit_model(seed: int = 0) -> CLIPModel:
    """An untrained CLIP of 0.5M parameters for 16 x 16 images, the same for the same seed."""
    return build_model(digit_processor(), seed=seed)
