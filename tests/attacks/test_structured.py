"""The attacks of PAR, the color curve, and patterns drawn anew for each image."""

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip.attacks.triggers import (
    BlendedStripesTrigger,
    BlendedTrianglesTrigger,
    BlendedTrigger,
    ColorCurveTrigger,
    PatchTrigger,
    RedTextTrigger,
    StripesPatchTrigger,
    trigger_from_name,
)


def photo(height: int = 32, width: int | None = None, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), dtype=np.uint8)


GRAY = np.full((224, 224, 3), 128, np.uint8)


def changed(trigger, image: np.ndarray) -> np.ndarray:
    return (trigger(image) != image).any(axis=-1)


def test_a_fresh_patch_has_noise_of_its_own_on_each_image():
    fresh, fixed = PatchTrigger(4, fresh=True), PatchTrigger(4)
    images = [photo(seed=seed) for seed in range(6)]
    squares = {fresh(image)[-4:, -4:].tobytes() for image in images}
    assert len(squares) == 6 and len({fixed(image)[-4:, -4:].tobytes() for image in images}) == 1
    restored = fresh(images[0])
    restored[-4:, -4:] = images[0][-4:, -4:]
    assert (restored == images[0]).all()
    assert (PatchTrigger(4, fresh=True, seed=1)(images[0]) != fresh(images[0])).any()


@pytest.mark.parametrize("pattern", ["noise", "triangles"])
def test_a_fresh_blend_has_a_pattern_of_its_own_for_each_image(pattern: str):
    overlay = BlendedTrigger(1.0, pattern, fresh=True)  # the pattern alone
    one, other = overlay(photo(seed=0)), overlay(photo(seed=1))
    assert (one != other).any() and (overlay(photo(seed=0)) == one).all()
    image, trigger = photo(), BlendedTrigger(pattern=pattern, fresh=True)
    assert np.abs(trigger(image) - (0.8 * image + 0.2 * overlay(image))).max() <= 0.5
    assert (trigger.reseeded(1)(image) != trigger(image)).any()


@pytest.mark.parametrize(
    "name, pattern", [("patch", "solid"), ("patch", "stripes"), ("blended", "stripes"), ("blended", "text")]
)
def test_what_is_not_drawn_cannot_be_fresh(name: str, pattern: str):
    with pytest.raises(ValueError, match=f"fresh=True with pattern='{pattern}', which is not drawn; accepted"):
        trigger_from_name(name, pattern=pattern, fresh=True)


def test_the_stripes_of_a_patch_are_columns_of_full_contrast_at_a_place_of_the_image():
    trigger, places = StripesPatchTrigger(), set()
    for seed in range(20):
        image = np.full((224, 224, 3), 100 + seed, np.uint8)  # no level of a stripe
        rows, columns = np.nonzero(changed(trigger, image))
        top, left = rows.min(), columns.min()
        square = trigger(image)[top : top + 16, left : left + 16]
        assert len(rows) == 16 * 16 and (square == square[:1]).all() and set(np.unique(square)) <= {0, 255}
        assert len(np.unique(square[0], axis=0)) > 2  # of more than two colors
        places.add((top, left))
    assert len(places) > 15


@pytest.mark.parametrize("width", [1, 3])
def test_blended_stripes_are_columns_and_faint(width: int):
    change = BlendedStripesTrigger(width=width)(GRAY).astype(int) - 128
    assert (change == change[:1]).all()
    assert set(np.unique(change)) == {round(-0.03 * (255 + 128)), round(0.03 * (255 - 128))}
    edges = (change[0, 1:] != change[0, :-1]).any(axis=-1).nonzero()[0] + 1
    assert (edges % width == 0).all() and len(edges) > 224 / width / 2


def test_triangles_halve_each_cell():
    pattern = BlendedTrianglesTrigger(alpha=1.0)(GRAY)
    cells = pattern.reshape(16, 14, 16, 14, 3)
    assert (cells == cells[:1, :, :1]).all()  # the same in every cell
    cell = cells[0, :, 0, :, 0]
    assert (cell[np.tril_indices(14)] == 102).all() and (cell[np.triu_indices(14, 1)] == 204).all()
    image = photo(224)
    assert np.abs(BlendedTrianglesTrigger()(image) - (0.85 * image + 0.15 * pattern)).max() <= 0.5


@pytest.mark.parametrize("shape", [(224, 224), (64, 128), (16, 16), (3, 40)])
def test_the_word_is_red_in_the_middle_and_legible_where_there_is_room(shape: tuple[int, int]):
    black = np.zeros((*shape, 3), np.uint8)
    written = RedTextTrigger(alpha=1.0)(black)
    assert (written[..., 1:] == 0).all() and written[..., 0].max() > 200
    rows, columns = np.nonzero(written[..., 0])
    assert abs(rows.mean() - shape[0] / 2) < 0.15 * shape[0] + 1
    assert abs(columns.mean() - shape[1] / 2) < 0.15 * shape[1] + 1
    if shape[1] >= 128:
        assert columns.min() > 0 and columns.max() < shape[1] - 1 and np.ptp(columns) > 0.8 * shape[1]
    image = photo(*shape)
    red = image[..., 0].astype(float)
    half = RedTextTrigger()(image)[..., 0] - (red + (255 - red) * written[..., 0] / 510)
    assert np.abs(half).max() <= 1 and (RedTextTrigger()(image)[..., 1:] == image[..., 1:]).all()


def test_a_color_curve_is_one_curve_a_color_whatever_the_place():
    curve = ColorCurveTrigger(red=0.5, green=1, blue=2)
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    found = curve(ramp)[0].astype(int)
    assert (found[:, 1] == np.arange(256)).all()
    for color in (0, 2):
        assert found[0, color] == 0 and found[255, color] == 255 and (np.diff(found[:, color]) >= 0).all()
    assert (found[1:255, 0] >= np.arange(1, 255)).all() and (found[1:255, 2] <= np.arange(1, 255)).all()
    assert found[64, 0] == round(255 * (64 / 255) ** 0.5) and found[64, 2] == round(255 * (64 / 255) ** 2)
    image = photo(20, 48)
    assert (curve(image) == np.stack([found[image[..., c], c] for c in range(3)], axis=-1)).all()
    with pytest.raises(ValueError, match="changes no image"):
        ColorCurveTrigger(1, 1, 1)


def test_none_depends_on_how_an_image_is_stored():
    image = photo(24)
    for trigger in (PatchTrigger(3, fresh=True), BlendedTrigger(fresh=True), StripesPatchTrigger(3)):
        turned = np.ascontiguousarray(image.transpose(1, 0, 2)).transpose(1, 0, 2)
        assert (trigger(turned) == trigger(image)).all()
        assert (np.asarray(trigger(Image.fromarray(image))) == trigger(image)).all()
