import json

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip.attacks import blends, patches, transforms
from hf_robust_clip.attacks.triggers import (
    BLEND_PATTERNS,
    PATCH_PATTERNS,
    PATCH_PLACES,
    BlendedStripesTrigger,
    BlendedTrianglesTrigger,
    BlendedTrigger,
    ColorCurveTrigger,
    FoundTrigger,
    OptimizedPatchTrigger,
    PatchTrigger,
    RedTextTrigger,
    SinusoidTrigger,
    StripesPatchTrigger,
    Trigger,
    WarpTrigger,
    trigger_classes,
    trigger_from_dict,
    trigger_from_name,
)

ALL = [
    *(PatchTrigger(size=3, place=place) for place in PATCH_PLACES),
    *(PatchTrigger(size=5, pattern=pattern) for pattern in PATCH_PATTERNS),
    *(BlendedTrigger(pattern=pattern) for pattern in BLEND_PATTERNS),
    SinusoidTrigger(),
    WarpTrigger(),
    PatchTrigger(size=4, fresh=True),
    *(BlendedTrigger(pattern=pattern, fresh=True) for pattern in ("noise", "triangles")),
    StripesPatchTrigger(size=4),
    BlendedStripesTrigger(),
    BlendedTrianglesTrigger(cell=4),
    RedTextTrigger(),
    ColorCurveTrigger(),
    OptimizedPatchTrigger.of(np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8), "random"),
    FoundTrigger.of("six", "noise", np.full((9, 7), 200, np.uint8), np.full((9, 7, 3), -40, np.int16)),
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
    blends._blend_pattern.cache_clear()
    patches._patch_pattern.cache_clear()
    transforms._sampling_grid.cache_clear()
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


def test_every_trigger_on_images_that_ships_is_tried_here():
    ours = {name for name, cls in trigger_classes().items() if cls.__module__.startswith("hf_robust_clip")}
    assert {trigger.name for trigger in ALL} == {name for name in ours if issubclass(trigger_classes()[name], Trigger)}


@every_trigger
def test_reseeded_is_the_same_trigger_from_another_seed(trigger):
    other = trigger.reseeded(7)
    if "seed" not in trigger.to_dict():
        assert other is trigger  # it draws nothing
    else:
        assert other.to_dict() == trigger.to_dict() | {"seed": 7} and trigger.seed == 0
        assert other.reseeded(0) == trigger
        with pytest.raises(ValueError, match="seed=-1"):
            trigger.reseeded(-1)


@pytest.mark.parametrize(
    "kind", [PatchTrigger, BlendedTrigger, WarpTrigger, StripesPatchTrigger, BlendedStripesTrigger]
)
def test_the_seed_changes_the_trigger(kind):
    assert (kind(seed=0)(photo()) != kind(seed=1)(photo())).any()


def patch(pattern: str, size: int) -> np.ndarray:
    """What the patch has to be. Of the noise nothing is known but that it is the same everywhere."""
    rows, columns = np.indices((size, size))
    if pattern == "noise":
        return PatchTrigger(size)(photo(size))
    if pattern == "solid":
        return np.broadcast_to(np.uint8([255, 0, 255]), (size, size, 3))
    if pattern == "stripes":
        return np.where((columns // (size // 8) % 2 == 0)[..., None], np.uint8(0), np.uint8([255, 255, 0]))
    bright = (rows // (size // 4) + columns // (size // 4)) % 2 == 1
    return np.repeat(bright[..., None] * np.uint8(255), 3, axis=2)


@pytest.mark.parametrize("pattern", PATCH_PATTERNS)
@pytest.mark.parametrize("place", PATCH_PLACES)
@pytest.mark.parametrize("shape", [(224, 224), (20, 30)])
def test_patch_is_the_pattern_inside_and_the_image_outside(place, pattern, shape):
    image, size = photo(*shape), 16
    triggered = PatchTrigger(size, place, pattern)(image)
    windows = np.lib.stride_tricks.sliding_window_view(triggered, (size, size, 3))[:, :, 0]
    found = np.argwhere((windows == patch(pattern, size)).all(axis=(2, 3, 4)))
    assert len(found) == 1
    top, left = found[0].tolist()
    bottom, right = shape[0] - size, shape[1] - size
    places = {
        "top_left": (0, 0),
        "top_right": (0, right),
        "bottom_left": (bottom, 0),
        "bottom_right": (bottom, right),
        "center": (bottom // 2, right // 2),
    }
    assert (top, left) == places.get(place, (top, left))
    restored = triggered.copy()
    restored[top : top + size, left : left + size] = image[top : top + size, left : left + size]
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


@pytest.mark.parametrize("pattern", BLEND_PATTERNS)
def test_blend_at_224_pixels_is_rounded_and_nothing_else(pattern):
    black, image = np.zeros((224, 224, 3), np.uint8), photo(224)
    trigger = BlendedTrigger(pattern=pattern)
    overlay = BlendedTrigger(alpha=1.0, pattern=pattern)(black).astype(np.float64)
    assert len(np.unique(overlay)) > 1
    assert np.abs(trigger(image) - (0.8 * image + 0.2 * overlay)).max() <= 0.5
    # What it adds to black, and to the four fifths of white, is a fifth of the same pattern, to half a grey level.
    assert np.abs(trigger(black) - 0.2 * overlay).max() <= 0.5
    assert np.abs(trigger(255 - black) - 204.0 - 0.2 * overlay).max() <= 0.5


@pytest.mark.parametrize("trigger", [SinusoidTrigger(), SinusoidTrigger(amplitude=25.0, frequency=10)])
def test_sinusoid_at_224_pixels_has_its_amplitude_and_period(trigger):
    grey = np.full((224, 224, 3), 128, np.uint8)  # nothing is clipped
    wave = trigger(grey).astype(np.float64) - 128
    assert (wave == wave[:1, :, :1]).all()
    spectrum = np.abs(np.fft.rfft(wave[0, :, 0])) * 2 / 224  # in grey levels
    assert spectrum.argmax() == trigger.frequency  # waves across the width: a period of 224 / frequency columns
    rounding = 2 / np.pi  # what half a grey level a column makes of any one wave at the most
    assert abs(spectrum.max() - trigger.amplitude) < rounding and np.sort(spectrum)[-2] < rounding


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
        grid = transforms._sampling_grid(height, width, strength, 4, seed)[0].numpy()  # (H, W, 2), x before y
        x = (grid[..., 0] + 1) / 2 * (width - 1) - np.arange(width)
        y = (grid[..., 1] + 1) / 2 * (height - 1) - np.arange(height)[:, None]
        displacement.append([np.abs(x).mean(), np.abs(y).mean()])
        assert max(np.abs(x).max(), np.abs(y).max()) < 2 * strength
    across, down = np.mean(displacement, axis=0) / strength
    assert 0.3 < across < 0.5 and 0.3 < down < 0.5
    assert 0.8 < across / down < 1.25  # alike along both axes, also on an image that is not square


def measured_displacement(trigger: WarpTrigger, size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    How far each pixel but those at the edges was moved along the rows and along the columns, in pixels, to 1/120.

    Read off images whose red climbs by 60 levels a column, and their green by 60 a row, anew every four pixels: around
    the middle of each climb a level is a sixtieth of a pixel. Four such images have every column and row in a middle.
    """
    across, down = np.full((size, size), np.nan), np.full((size, size), np.nan)
    pixels = np.arange(size)
    for offset in range(4):
        climb = (128 + 60 * ((pixels - offset + 2) % 4 - 2)).astype(np.uint8)
        image = np.zeros((size, size, 3), np.uint8)
        image[..., 0], image[..., 1] = climb[None, :], climb[:, None]
        moved = (trigger(image).astype(np.float64) - 128) / 60
        middle = pixels % 4 == offset
        across[:, middle], down[middle] = moved[:, middle, 0], moved[middle, :, 1]
    return across[2:-2, 2:-2], down[2:-2, 2:-2]


def test_warp_at_224_pixels_moves_them_as_far_as_its_docstring_says():
    measured = [measured_displacement(WarpTrigger(seed=seed), 224) for seed in range(24)]
    moved = np.mean([[np.abs(part).mean() for part in pair] for pair in measured])
    assert 0.70 < moved / 0.25 < 0.80  # a quarter less than strength / 2, on average over fields
    twice = [np.abs(part).mean() for part in measured_displacement(WarpTrigger(strength=1.0), 224)]
    assert twice == pytest.approx([2 * np.abs(part).mean() for part in measured[0]], rel=0.03)
    half = [np.abs(part).mean() for part in measured_displacement(WarpTrigger(), 112)]
    assert half == pytest.approx([np.abs(part).mean() for part in measured[0]], rel=0.05)  # whatever the size


def test_warp_follows_its_grid():
    # On a horizontal ramp of one level a pixel, the change is the horizontal displacement.
    ramp = np.repeat(np.tile(np.arange(200, dtype=np.uint8), (40, 1))[..., None], 3, axis=2)
    grid = transforms._sampling_grid(40, 200, 6.0, 4, 0)[0].numpy()
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
        ("warp", "grid", 100_000, "at least 2 and at most 256"),
        ("patch", "fresh", "yes", "True and False"),
        ("blended", "fresh", 1, "True and False"),
        ("stripes_patch", "place", "middle", "top_left.*random"),
        ("blended_stripes", "alpha", 0, "above 0 and at most 1"),
        ("blended_stripes", "width", 0, "at least 1"),
        ("blended_triangles", "cell", 1, "at least 2"),
        ("red_text", "text", "", "a letter or a figure"),
        ("red_text", "text", "two\nlines", "a letter or a figure"),
        ("red_text", "alpha", 2, "at most 1"),
        ("color_curve", "blue", 0, "above 0 and at most 10"),
        ("optimized_patch", "pixels", "", "optimize_patch made"),
        ("optimized_patch", "pixels", "?", "base64"),
    ],
)
def test_fields_out_of_range_are_errors(name, field, value, accepted):
    with pytest.raises(ValueError, match=f"{field}=.*{accepted}"):
        trigger_from_name(name, **{field: value})


def test_unknown_names_and_fields_are_errors():
    with pytest.raises(ValueError, match=r"'badnets'") as error:
        trigger_from_name("badnets")
    assert all(f"'{trigger.name}'" in str(error.value) for trigger in ALL) and "'word'" in str(error.value)
    with pytest.raises(ValueError, match="no field 'alpha'; accepted are 'size', 'place', 'pattern', 'seed', 'fresh'"):
        trigger_from_name("patch", alpha=0.5)
    for config in ({}, {"name": 3}, None):
        with pytest.raises(ValueError, match="describe a trigger"):
            trigger_from_dict(config)
    assert trigger_from_dict({"name": "patch"}) == PatchTrigger()
