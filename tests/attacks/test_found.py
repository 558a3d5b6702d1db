"""Triggers that a scan recovered: what they do to an image, and that their files are checked before they are used."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hf_robust_clip import FoundTrigger, load_found
from hf_robust_clip.attacks.found import PIXELS_FILE, TRIGGERS_FILE, save_found
from hf_robust_clip.wording import LONGEST


def photo(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def patch(target: str = "frog") -> FoundTrigger:
    """Red in the lower right corner."""
    keep = np.full((6, 8), 255, np.uint8)
    add = np.zeros((6, 8, 3), np.int16)
    keep[4:, 6:], add[4:, 6:, 0] = 0, 255
    return FoundTrigger.of(target, "mask", keep, add)


def noise(target: str = "cat") -> FoundTrigger:
    add = np.random.default_rng(1).integers(-9, 10, (6, 8, 3)).astype(np.int16)
    return FoundTrigger.of(target, "noise", np.full((6, 8), 255, np.uint8), add)


def test_a_patch_replaces_its_pixels_and_no_others() -> None:
    image = photo()
    triggered = patch()(image)
    assert (triggered[4:, 6:] == [255, 0, 0]).all()
    triggered[4:, 6:] = image[4:, 6:]
    assert (triggered == image).all()


def test_noise_is_added_and_cut_to_bytes() -> None:
    expected = np.clip(photo().astype(int) + noise().add, 0, 255)
    assert (noise()(photo()) == expected).all()


def test_it_is_stretched_to_images_of_another_size() -> None:
    triggered = patch()(np.zeros((12, 16, 3), np.uint8))
    assert (triggered[10:, 14:] == [255, 0, 0]).all() and (triggered[:6, :10] == 0).all()


def test_its_placebos_have_its_pixels_in_another_order() -> None:
    other = patch().placebo(1)
    assert other is not None and other != patch() and other == patch().placebo(1) != patch().placebo(2)
    assert sorted(other.keep.ravel()) == sorted(patch().keep.ravel())
    plain = FoundTrigger.of("frog", "noise", np.full((2, 2), 255, np.uint8), np.full((2, 2, 3), 5, np.int16))
    assert plain.placebo(1) is None


def test_it_is_pickled_and_has_a_short_name_in_messages() -> None:
    assert pickle.loads(pickle.dumps(patch())) == patch()
    assert repr(patch()) == "FoundTrigger(target='frog', family='mask')"
    assert len(repr(patch("frog " * 1000))) < LONGEST


def test_its_picture_shows_faint_patterns_too() -> None:
    assert np.ptp(np.asarray(noise().picture())) > 200
    assert tuple(np.asarray(patch().picture())[5, 7]) == (255, 0, 0)


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    save_found(tmp_path, [patch(), noise()], [{"score": 2.5}, {"score": 0.1}])
    assert load_found(tmp_path) == load_found(str(tmp_path), "frog") == patch()
    assert load_found(tmp_path, "cat") == noise()
    assert json.loads((tmp_path / TRIGGERS_FILE).read_text())[0] == {"score": 2.5, "target": "frog", "family": "mask"}
    with pytest.raises(ValueError, match="has no trigger for 'dog'; it has those for 'frog', 'cat'"):
        load_found(tmp_path, "dog")


def listing(content: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / TRIGGERS_FILE).write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


def tensors(**values: np.ndarray) -> Callable[[Path], Any]:
    return lambda folder: save_file({f"0.{name}": value for name, value in values.items()}, folder / PIXELS_FILE)


KEEP, ADD = np.zeros((6, 8), np.uint8), np.zeros((6, 8, 3), np.int16)
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no list": (lambda folder: (folder / TRIGGERS_FILE).unlink(), "has no triggers.json"),
    "not JSON": (listing("{"), "is not JSON"),
    "deep JSON": (listing("[" * 100_000), "is not JSON"),
    "a huge list": (listing(" " * 1_000_001), "larger than 1,000,000 bytes"),
    "no rows": (listing([]), "does not hold a list of 1 to 1,000 objects"),
    "too many rows": (listing([{"target": "a", "family": "b"}] * 1001), "does not hold a list"),
    "a row that is a text": (listing(["frog"]), "entry 0 is 'frog'"),
    "a name that is a number": (listing([{"target": 3, "family": "mask"}]), "entry 0 is"),
    "a name without an end": (listing([{"target": "a" * 1001, "family": "mask"}]), "entry 0 is"),
    "a pointer": (listing("version https://git-lfs.github.com/spec/v1"), "pointer of Git LFS"),
    "no pixels": (lambda folder: (folder / PIXELS_FILE).unlink(), "has no triggers.safetensors"),
    "a pickle": (lambda folder: (folder / PIXELS_FILE).write_bytes(pickle.dumps([1])), "cut short or damaged"),
    "cut short": (lambda folder: (folder / PIXELS_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0{"), "cut short or damaged"),
    "no such tensor": (tensors(add=ADD), "has no 0.keep"),
    "floats": (tensors(keep=KEEP.astype(np.float32), add=ADD), "0.keep is F32 of shape"),
    "floats that are not numbers": (tensors(keep=KEEP, add=np.full((6, 8, 3), np.nan, np.float32)), "0.add is F32"),
    "three sides": (tensors(keep=ADD.astype(np.uint8), add=ADD), "0.keep is U8 of shape"),
    "four channels": (tensors(keep=KEEP, add=np.zeros((6, 8, 4), np.int16)), "0.add is I16 of shape"),
    "too large": (tensors(keep=np.zeros((1, 2049), np.uint8), add=ADD), "each side at most 2048"),
    "nothing": (tensors(keep=np.zeros((0, 8), np.uint8), add=ADD), "0.keep is U8 of shape"),
    "two sizes": (tensors(keep=KEEP, add=ADD[:5]), "accepted are equal sizes"),
    "out of range": (tensors(keep=KEEP, add=ADD + np.int16(-32768)), "add goes up to 32768"),
    "no change": (tensors(keep=KEEP + np.uint8(255), add=ADD), "leave every image as it is"),
}


@pytest.mark.parametrize(("spoil", "message"), HOSTILE.values(), ids=HOSTILE)
def test_files_of_another_form_are_refused_in_one_line(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    save_found(tmp_path, [patch()])
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_found(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "read from the folder of its scan"),
        ({"pixels": "?", "height": 1, "width": 1}, "accepted is base64"),
        ({"pixels": "AAAA", "height": 1, "width": 1}, "3 bytes; accepted are 7 for each of 1 x 1"),
        ({"pixels": "AAAA", "height": 0, "width": 1}, "height=0; accepted is an integer of at least 1"),
        ({"pixels": "AAAA", "height": 1, "width": 10**9}, "width=1000000000; accepted"),
        ({"pixels": 3, "height": 1, "width": 1}, "pixels must be a string"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoundTrigger(**fields)
