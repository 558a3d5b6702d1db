"""Augmentations of images: in range, each image by itself, repeatable; normalisation as the image processor's."""

import copy
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from hf_robust_clip.augment.images import (
    PRESETS,
    ImageAugmentation,
    ImageAugmentationConfig,
    ImageNormalization,
    to_float,
)
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.seeding import forked_rng

CPU = torch.device("cpu")
CHANGING = sorted(set(PRESETS) - {"identity"})

#: One step at a time.
STEPS = {
    "shift": {"shift": 0.2},
    "crop": {"crop_scale": (0.3, 0.6)},
    "flip": {"flip": 1.0},
    "jitter": {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_probability": 1.0},
    "greyscale": {"greyscale": 1.0},
    "blur": {"blur": 1.0, "blur_sigma": (0.02, 0.06)},
    "noise": {"noise": 1.0, "noise_std": 0.2},
    "erasing": {"erasing": 1.0},
    "cutout": {"cutout": 1.0},
}


def photos(batch: int = 8, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Random pixels with black, white and flat regions, `(B, 3, H, W)`."""
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    images[:, :, : height // 4] = 0
    images[:, :, height // 4 : height // 3] = 1
    return images


def augmented(augmentation: ImageAugmentation, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    with forked_rng(seed, CPU):
        return augmentation(images)


# ---- What every augmentation must be ----


@pytest.mark.parametrize("overrides", [{}, *STEPS.values()], ids=["preset", *STEPS])
@pytest.mark.parametrize("preset", ["identity", "weak", "strong"])
def test_shape_type_and_range_stay(preset: str, overrides: dict):
    augmentation = ImageAugmentation(preset, **overrides)
    for seed in range(3):
        images = photos(seed=seed)
        result = augmented(augmentation, images, seed)
        assert result.shape == images.shape and result.dtype == images.dtype
        assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("preset", ["autoaugment", "cleanclip"])
def test_shape_type_and_range_of_the_larger_presets(preset: str):
    augmentation = ImageAugmentation(preset)
    for seed in range(6):
        images = photos(batch=16, seed=seed)
        result = augmented(augmentation, images, seed)
        assert result.shape == images.shape and result.dtype == images.dtype
        assert result.min() >= 0 and result.max() <= 1 and not result.isnan().any()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_input_is_left_as_it_was(preset: str):
    images = photos()
    before = images.clone()
    augmented(ImageAugmentation(preset), images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_seed_decides_and_the_global_generator_is_left_alone(preset: str):
    images = photos()
    augmentation = ImageAugmentation(preset)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augmented(augmentation, images, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    np.random.rand(10)
    other = augmented(augmentation, images, seed=6)
    assert torch.equal(augmented(augmentation, images, seed=5), first)
    # Nothing is remembered between calls, nor made anew where it matters.
    assert torch.equal(augmented(ImageAugmentation(preset), images, seed=5), first)
    assert torch.equal(other, first) == (preset == "identity")


@pytest.mark.parametrize("preset", CHANGING)
def test_each_image_is_augmented_by_itself(preset: str):
    images = photos(batch=1).expand(24, -1, -1, -1).clone()
    result = augmented(ImageAugmentation(preset), images, seed=2)
    different = {image.numpy().tobytes() for image in result}
    # A small shift has nine results, a policy may draw a step that does nothing; one drawn for all would give one.
    assert len(different) > 5


def test_a_policy_draws_many_sub_policies_in_one_batch():
    images = torch.full((64, 3, 16, 16), 0.3)
    images[:, :, 4:12, 4:12] = 0.6
    images[:, 0] *= 0.5
    result = augmented(ImageAugmentation("autoaugment"), images)
    unchanged = (result == images).flatten(1).all(dim=1)
    moved = ((result[:, :, 0, 0] == 0) | (result[:, :, -1, -1] == 0)).all(dim=1)
    assert 0 < unchanged.sum() < 64 and 0 < moved.sum() < 64
    assert len({image.numpy().tobytes() for image in result}) > 12


@pytest.mark.parametrize("preset", PRESETS)
def test_batches_of_other_sizes(preset: str):
    augmentation = ImageAugmentation(preset)
    for shape in ((1, 16, 16), (3, 20, 33), (2, 16, 16), (1, 224, 224)):
        images = photos(*shape)
        assert augmented(augmentation, images).shape == images.shape


@pytest.mark.parametrize("preset", ["strong", "autoaugment"])
def test_copies_do_the_same(preset: str):
    augmentation = ImageAugmentation(preset, flip=0.2)
    images = photos()
    first = augmented(augmentation, images)
    for other in (copy.deepcopy(augmentation), pickle.loads(pickle.dumps(augmentation))):
        assert torch.equal(augmented(other, images), first)
        assert repr(other) == repr(augmentation) == f"ImageAugmentation('{preset}', flip=0.2)"


def test_an_augmentation_has_no_weights_to_train_or_save():
    augmentation = ImageAugmentation("strong")
    augmented(augmentation, photos())
    assert list(augmentation.parameters()) == [] and augmentation.state_dict() == {}


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"autoaugment"}))
def test_an_image_is_augmented_alike_in_any_company(preset: str):
    augmentation, images = ImageAugmentation(preset, blur_sigma=(0.02, 0.06)), photos()
    others = torch.cat([images[:3], photos(seed=1)[3:5]])
    expected = augmented(augmentation, images)[:3]
    for company in (images[:3], others):
        torch.testing.assert_close(augmented(augmentation, company)[:3], expected, atol=1e-6, rtol=0)


def test_half_precision_is_only_the_answers():
    images = photos().bfloat16()
    result = augmented(ImageAugmentation("strong"), images)
    assert torch.equal(result, augmented(ImageAugmentation("strong"), images.float()).bfloat16())


# ---- What each step does ----


def test_identity_is_the_identity():
    images = photos()
    assert torch.equal(ImageAugmentation("identity")(images), images)
    nothing = dict.fromkeys(("flip", "greyscale", "blur", "noise", "erasing", "cutout", "jitter_probability"), 0.0)
    for whole in ((1.0, 1.0), [1.0, 1.0]):
        assert torch.equal(ImageAugmentation("strong", **nothing, crop_scale=whole)(images), images)


def test_weak_shifts_whole_images_by_at_most_a_sixteenth():
    images = photos(batch=64, height=32, width=48)
    result = augmented(ImageAugmentation("weak"), images)
    shifts = set()
    for image, shifted in zip(images, result, strict=True):
        matches = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-3, 4)
            if torch.equal(shifted, shift_by_hand(image, down, right))
        ]
        assert matches, "no shift of whole pixels"
        shifts.update(matches[:1])
    rows, columns = {down for down, _ in shifts}, {right for _, right in shifts}
    assert rows == set(range(-2, 3)) and columns == set(range(-3, 4))


def shift_by_hand(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(image[None], (8, 8, 8, 8), mode="replicate")[0]
    height, width = image.shape[1:]
    return padded[:, 8 - down : 8 - down + height, 8 - right : 8 - right + width]


def test_flip():
    images = photos()
    assert torch.equal(augmented(ImageAugmentation("identity", flip=1.0), images), images.flip(3))


def test_greyscale_has_equal_channels():
    result = augmented(ImageAugmentation("identity", greyscale=1.0), photos())
    torch.testing.assert_close(result[:, 0], result[:, 1])
    torch.testing.assert_close(result[:, 0], result[:, 2])


@pytest.mark.parametrize(
    ("position", "strength", "kept"),
    [
        (0, 0.05, lambda image: image - image.mean(dim=(1, 2), keepdim=True)),  # brightness moves all alike
        (1, 0.2, lambda image: image / image.norm()),  # contrast scales
        (2, 0.2, luma := lambda image: torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), image, dims=1)),
        (3, 0.1, luma),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_what_a_change_of_color_keeps(position: int, strength: float, kept):
    images = 0.4 + 0.2 * photos()  # so that nothing is clamped
    jitter = [0.0] * 4
    jitter[position] = strength
    result = augmented(ImageAugmentation("identity", jitter=tuple(jitter), jitter_probability=1.0), images)
    for image, changed in zip(images, result, strict=True):
        assert not torch.allclose(changed, image, atol=1e-4)
        torch.testing.assert_close(kept(changed), kept(image), atol=1e-5, rtol=0)


def test_color_changes_are_one_affine_map_that_is_clamped_once():
    """A second image of the same draws is mapped as the first is: sums of the two map to the sums of the results."""
    jittered = ImageAugmentation("identity", jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=1.0)
    first, second = 0.4 + 0.1 * photos(), 0.4 + 0.1 * photos(seed=1)
    results = [augmented(jittered, images) for images in (first, second, (first + second) / 2)]
    inside = torch.stack([(r > 0) & (r < 1) for r in results]).all(dim=0)
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(results[2][inside], ((results[0] + results[1]) / 2)[inside], atol=1e-5, rtol=0)


def test_noise_has_the_deviation_asked_for():
    images = torch.full((16, 3, 32, 32), 0.5)
    result = augmented(ImageAugmentation("identity", noise=1.0, noise_std=0.05), images)
    assert abs((result - 0.5).std().item() - 0.05) < 0.002
    some = augmented(ImageAugmentation("identity", noise=0.5, noise_std=0.05), images)
    assert 0 < (some == images).flatten(1).all(dim=1).sum() < 16


def test_blur_smooths_and_keeps_the_mean():
    images = photos()
    result = augmented(ImageAugmentation("identity", blur=1.0, blur_sigma=(0.05, 0.05)), images)
    assert (result.diff(dim=3).abs().mean() < 0.5 * images.diff(dim=3).abs().mean()).item()
    torch.testing.assert_close(result.mean(), images.mean(), atol=0.02, rtol=0)


def test_erasing_blanks_a_rectangle_of_the_size_asked_for():
    images = torch.full((32, 3, 32, 32), 0.7)
    result = augmented(ImageAugmentation("identity", erasing=1.0, erasing_scale=(0.1, 0.3)), images)
    share = (result != images).all(dim=1).float().mean(dim=(1, 2))
    assert share.min() > 0.05 and share.max() < 0.35


def test_cut_outs_are_squares_of_the_mean_color():
    images = torch.rand(64, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    result = augmented(ImageAugmentation("identity", cutout=0.5, cutout_scale=(0.02, 0.05)), images)
    sides, places = set(), set()
    for image, cut in zip(images, result, strict=True):
        rows, columns = (image != cut).any(dim=0).nonzero(as_tuple=True)
        if not len(rows):
            continue
        (top, bottom), (left, right) = ((int(side.min()), int(side.max()) + 1) for side in (rows, columns))
        assert bottom - top == right - left and len(rows) == (bottom - top) ** 2
        torch.testing.assert_close(cut[:, top:bottom, left:right].mean(dim=(1, 2)), image.mean(dim=(1, 2)))
        assert cut[:, top:bottom, left:right].flatten(1).std(dim=1).max() < 1e-6
        sides.add(bottom - top)
        places.add((top, left))
    # The root of 2% and of 5% of 2,000 pixels.
    assert sides <= set(range(6, 11)) and len(sides) > 2 and len(places) > 20
    assert 20 <= (images == result).flatten(1).all(dim=1).sum() <= 44
    small = images[:, :, :8, :8]  # of which 1% is less than a pixel
    assert (augmented(ImageAugmentation("par", noise=0.0, cutout=1.0), small) != small).flatten(1).any(dim=1).all()


def test_a_crop_of_the_whole_area_and_ratio_one_keeps_the_image():
    images = photos()
    result = augmented(ImageAugmentation("identity", crop_scale=(0.999, 1.0), crop_ratio=(1.0, 1.0)), images)
    torch.testing.assert_close(result, images, atol=1e-4, rtol=0)


# ---- Configuration ----


def test_overrides_replace_fields_of_the_preset():
    augmentation = ImageAugmentation("strong", flip=0.0, blur_sigma=(0.01, 0.02))
    for field in fields(ImageAugmentationConfig):
        expected = {"flip": 0.0, "blur_sigma": (0.01, 0.02)}.get(field.name, getattr(PRESETS["strong"], field.name))
        assert getattr(augmentation.config, field.name) == expected


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (("stronger",), {}, "preset must be one of 'identity', 'weak', .*, but is 'stronger'"),
        (("weak",), {"rotation": 3}, "'rotation' is not a field of the augmentation; accepted: shift, crop_scale"),
        (("weak",), {"shift": 1.0}, r"shift must be in \[0, 1\), but is 1.0"),
        (("weak",), {"shift": -0.1}, "shift must be in"),
        (("weak",), {"flip": 1.5}, r"flip must be in \[0, 1\], but is 1.5"),
        (("weak",), {"flip": "half"}, "flip must be in .* but is 'half'"),
        (("weak",), {"noise_std": float("nan")}, "noise_std must be in"),
        (("weak",), {"crop_scale": (0.5, 1.5)}, r"crop_scale must be a range .* within \(0, 1\], but is \(0.5, 1.5\)"),
        (("weak",), {"crop_scale": (0.5, 0.4)}, "crop_scale must be a range"),
        (("weak",), {"crop_scale": (0.0, 0.4)}, "crop_scale must be a range"),
        (("weak",), {"crop_scale": 0.5}, "crop_scale must be a range"),
        (("weak",), {"crop_ratio": (1, 2, 3)}, "crop_ratio must be a range"),
        (("weak",), {"jitter": (0.1, 0.1, 0.1)}, "jitter must be"),
        (("weak",), {"jitter": 0.4}, "jitter must be"),
        (("weak",), {"jitter": (0.1, 0.1, 0.1, 0.6)}, "jitter must be .* hue"),
        (("weak",), {"policy": "randaugment"}, "policy must be None or 'autoaugment', but is 'randaugment'"),
    ],
)
def test_what_is_refused(arguments: tuple, overrides: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ImageAugmentation(*arguments, **overrides)


# ---- Normalisation ----

SIZES = {"size": {"height": 16, "width": 16}}
IMAGE_PROCESSORS = {
    "clip": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    "siglip": SiglipImageProcessor(**SIZES),
    "without normalisation": SiglipImageProcessor(**SIZES, do_normalize=False),
    "to [-1, 1] by rescaling": SiglipImageProcessor(
        **SIZES, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
    ),
    "without rescaling": SiglipImageProcessor(
        **SIZES, do_rescale=False, image_mean=[120.0, 110.0, 100.0], image_std=[60.0, 61.0, 62.0]
    ),
}


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_normalised_bytes_are_what_the_image_processor_gives(kind: str):
    image_processor = IMAGE_PROCESSORS[kind]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, 30, 3), dtype=np.uint8)) for height in (16, 21, 40)]
    expected = image_processor(images, return_tensors="pt")["pixel_values"]
    preprocess = ImagePreprocessor(image_processor)
    pixels = preprocess(images)
    assert pixels.dtype == torch.uint8
    result = ImageNormalization(preprocess.mean, preprocess.std)(pixels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected.float(), atol=1e-6, rtol=1e-6)


def test_floats_and_bytes_normalise_alike():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    normalization = ImageNormalization([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert torch.equal(normalization(pixels), normalization(to_float(pixels)))
    assert to_float(pixels).max() <= 1 and to_float(to_float(pixels)) is not pixels


def test_normalisation_is_not_part_of_a_checkpoint():
    assert ImageNormalization([0, 0, 0], [1, 1, 1]).state_dict() == {}
