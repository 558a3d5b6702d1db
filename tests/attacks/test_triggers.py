import json

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip.attacks import triggers
from hf_robust_clip.attacks.triggers import (
    BLEND_PATTERNS,
    PATCH_PATTERNS,
    PATCH_PLACES,
    BlendedTrigger,
    PatchTrigger,
    SinusoidTrigger,
    WarpTrigger,
    trigger_from_dict,
    trigger_from_name,
)

ALL = [
    *(PatchTrigger(size=3, place=place) for place in PATCH_PLACES),
    *(PatchTrigger(size=5, pattern=pattern) for pattern in PATCH_PATTERNS),
    *(BlendedTrigger(pattern=pattern) for pattern in BLEND_PATTERNS),
    SinusoidTrigger(),
    WarpTrigger(),
]
every_trigger = pytest.mark.parametrize("trigger", ALL, ids=str)


def photo(height: int = 32, width: int | None = None, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), dtype=np.uint8)


@every_trigger
@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (224, 224), (20, 48)])
def test_changes_the_image_and_keeps_its_size(trigger, shape):
    image = photo(*shape)
    before = image.copy()
    triggered = trigger(image)
    assert triggered.shape == image.shape and triggered.dtype == np.uint8
    assert (triggered != image).any()
    assert (image == before).all()
    assert triggered is not image and triggered.flags.writeable


@every_trigger
def test_repeats_exactly_and_does_not_depend_on_what_came_before(trigger):
    image, other = photo(), photo(16, seed=1)
    first = trigger(image)
    first_copy = first.copy()
    first[:] = 0  # writing to a result reaches no cache
    trigger(other)
    assert (trigger(image) == first_copy).all()
    triggers._blend_pattern.cache_clear()
    triggers._patch_pattern.cache_clear()
    triggers._sampling_grid.cache_clear()
    assert (trigger(image) == first_copy).all()


@every_trigger
def test_pil_and_numpy_agree(trigger):
    image = photo()
    triggered = trigger(Image.fromarray(image))
    assert isinstance(triggered, Image.Image) and triggered.mode == "RGB"
    assert (np.asarray(triggered) == trigger(image)).all()


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "P", "CMYK", "LA"])
def test_other_modes_are_converted(mode):
    image = Image.fromarray(photo()).convert(mode)
    assert PatchTrigger()(image).tobytes() == PatchTrigger()(image.convert("RGB")).tobytes()
    assert image.mode == mode


@every_trigger
def test_dictionary_round_trip(trigger):
    config = json.loads(json.dumps(trigger.to_dict()))
    assert trigger_from_dict(config) == trigger
    assert trigger_from_name(**config) == trigger


@pytest.mark.parametrize("kind", [PatchTrigger, BlendedTrigger, WarpTrigger])
def test_the_seed_changes_the_trigger(kind):
    assert (kind(seed=0)(photo()) != kind(seed=1)(photo())).any()


@pytest.mark.parametrize("pattern", PATCH_PATTERNS)
@pytest.mark.parametrize(
    "place, rows, columns",
    [
        ("top_left", slice(0, 4), slice(0, 4)),
        ("top_right", slice(0, 4), slice(26, 30)),
        ("bottom_left", slice(16, 20), slice(0, 4)),
        ("bottom_right", slice(16, 20), slice(26, 30)),
        ("center", slice(8, 12), slice(13, 17)),
    ],
)
def test_patch_changes_nothing_outside(place, rows, columns, pattern):
    image = photo(20, 30)
    triggered = PatchTrigger(size=4, place=place, pattern=pattern)(image)
    other = PatchTrigger(size=4, place=place, pattern=pattern)(photo(20, 30, seed=1))
    assert (triggered[rows, columns] == other[rows, columns]).all()  # the patch does not depend on the image
    assert (triggered[rows, columns] != image[rows, columns]).any()
    restored = triggered.copy()
    restored[rows, columns] = image[rows, columns]
    assert (restored == image).all()


def test_random_place_depends_on_the_image_and_the_seed_alone():
    def place(seed: int, image_seed: int) -> tuple[int, int]:
        image = photo(seed=image_seed) // 2  # magenta occurs nowhere
        triggered = PatchTrigger(size=4, place="random", pattern="solid", seed=seed)(image)
        found = np.argwhere((triggered == (255, 0, 255)).all(-1))
        assert len(found) == 16 and (found.max(0) - found.min(0) == 3).all()
        return tuple(found.min(0))

    places = [place(0, image) for image in range(40)]
    assert places == [place(0, image) for image in range(40)]
    assert len(set(places)) > 30
    assert places != [place(1, image) for image in range(40)]
    assert min(min(p) for p in places) < 6 and max(max(p) for p in places) > 22  # all over the image


def test_a_patch_of_the_whole_image_fits():
    assert (PatchTrigger(size=16)(photo(16)) == PatchTrigger(size=16)(photo(16, seed=1))).all()


@pytest.mark.parametrize("place", PATCH_PLACES)
def test_a_patch_larger_than_the_image_is_an_error(place):
    with pytest.raises(ValueError, match=r"size=16.*16 x 16.*height 40 and width 12"):
        PatchTrigger(place=place)(photo(40, 12))


@pytest.mark.parametrize("pattern", BLEND_PATTERNS)
def test_blend_is_four_fifths_image(pattern):
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    overlay = BlendedTrigger(alpha=1.0, pattern=pattern)(black).astype(np.int64)
    image = photo().astype(np.int64)
    # In integers: fifths of a grey level are never a half, so there is no tie to round.
    expected = (8 * image + 2 * overlay + 5) // 10
    assert (BlendedTrigger(pattern=pattern)(photo()) == expected).all()
    assert (BlendedTrigger(pattern=pattern)(white) >= 204).all()
    assert (BlendedTrigger(pattern=pattern)(black) <= 51).all()


def test_sinusoid_has_the_amplitude_and_period_asked_for():
    grey = np.full((8, 48, 3), 128, np.uint8)
    wave = SinusoidTrigger(amplitude=60.0, frequency=6)(grey).astype(np.int64) - 128
    assert (wave == wave[:1, :, :1]).all()  # the same in every row and channel
    line = wave[0, :, 0]
    assert line.max() == 60 and line.min() == -60
    assert (line[:8] == np.rint(60 * np.sin(2 * np.pi * np.arange(8) / 8))).all()
    assert (line == np.roll(line, 8)).all() and (line != np.roll(line, 4)).any()
    assert np.abs(np.fft.rfft(line)).argmax() == 6


def test_sinusoid_is_clipped_not_wrapped():
    white, black = np.full((8, 48, 3), 255, np.uint8), np.zeros((8, 48, 3), np.uint8)
    assert (SinusoidTrigger()(white) >= 195).all() and (SinusoidTrigger()(black) <= 60).all()


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (100, 200)])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_warp_moves_pixels_by_about_half_its_strength(size, strength):
    height, width = size
    displacement = []
    for seed in range(8):
        grid = triggers._sampling_grid(height, width, strength, 4, seed)[0].numpy()  # (H, W, 2), x before y
        x = (grid[..., 0] + 1) / 2 * (width - 1) - np.arange(width)
        y = (grid[..., 1] + 1) / 2 * (height - 1) - np.arange(height)[:, None]
        displacement.append([np.abs(x).mean(), np.abs(y).mean()])
        assert max(np.abs(x).max(), np.abs(y).max()) < 2 * strength
    across, down = np.mean(displacement, axis=0) / strength
    assert 0.3 < across < 0.5 and 0.3 < down < 0.5
    assert 0.8 < across / down < 1.25  # alike along both axes, also on an image that is not square


def test_warp_follows_its_grid():
    # On a horizontal ramp of one level a pixel, the change is the horizontal displacement.
    ramp = np.repeat(np.tile(np.arange(200, dtype=np.uint8), (40, 1))[..., None], 3, axis=2)
    grid = triggers._sampling_grid(40, 200, 6.0, 4, 0)[0].numpy()
    expected = np.rint((grid[..., 0] + 1) / 2 * 199)
    assert (np.abs(WarpTrigger(strength=6.0)(ramp)[..., 0] - expected) <= 1).all()


def test_warp_leaves_a_flat_image_flat():
    flat = np.full((32, 32, 3), 77, np.uint8)
    assert (WarpTrigger(strength=3.0)(flat) == flat).all()


@pytest.mark.parametrize(
    "image, found",
    [
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"\(1, 8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        ([[1]], "list"),
    ],
)
@pytest.mark.parametrize("trigger", [PatchTrigger(2), BlendedTrigger(), SinusoidTrigger(), WarpTrigger()])
def test_what_is_no_image_is_an_error(trigger, image, found):
    with pytest.raises(ValueError, match=rf"{found}.*accepted.*uint8 array \(H, W, 3\)"):
        trigger(image)


@pytest.mark.parametrize(
    "name, field, value, accepted",
    [
        ("patch", "size", 0, "at least 1"),
        ("patch", "size", 2.5, "integer"),
        ("patch", "size", True, "integer"),
        ("patch", "place", "middle", "top_left.*random"),
        ("patch", "pattern", "text", "noise.*checkerboard"),
        ("patch", "seed", -1, "at least 0"),
        ("blended", "alpha", 0, "above 0 and at most 1"),
        ("blended", "alpha", 1.5, "above 0 and at most 1"),
        ("blended", "alpha", float("nan"), "above 0"),
        ("blended", "pattern", "solid", "noise.*text"),
        ("sinusoid", "amplitude", 300, "at most 255"),
        ("sinusoid", "frequency", -1, "above 0"),
        ("warp", "strength", float("inf"), "finite"),
        ("warp", "strength", "0.5", "number"),
        ("warp", "grid", 1, "at least 2"),
    ],
)
def test_fields_out_of_range_are_errors(name, field, value, accepted):
    with pytest.raises(ValueError, match=f"{field}=.*{accepted}"):
        trigger_from_name(name, **{field: value})


def test_unknown_names_and_fields_are_errors():
    with pytest.raises(ValueError, match=r"'badnets'.*patch, blended, sinusoid, warp"):
        trigger_from_name("badnets")
    with pytest.raises(ValueError, match="no field alpha; accepted are size, place, pattern, seed"):
        trigger_from_name("patch", alpha=0.5)
    for config in ({}, {"name": 3}, None):
        with pytest.raises(ValueError, match="no trigger"):
            trigger_from_dict(config)
    assert trigger_from_dict({"name": "patch"}) == PatchTrigger()
