"""The patch that is optimized on a clean model, made and planted on tiny models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_robust_clip import AttackSuccessEvaluator, PoisonSpec, optimize_patch, poison_dataset, replay_manifest
from hf_robust_clip.attacks.triggers import OptimizedPatchTrigger, trigger_from_dict
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES
from hf_robust_clip.evaluation.embedding import Embedder


@pytest.fixture
def clean(tiny_model, processor, pairs):
    """A model's embedder, images of other classes than the target, and embeddings of the target's captions."""
    embedder = Embedder(tiny_model(3).eval(), processor, check=False)
    images = [np.asarray(row["image"].convert("RGB")) for row in pairs.select(range(40)) if row["label"] != 8]
    return embedder, images, embedder.embed_texts([template.format("eight") for template in CAPTION_TEMPLATES])


def nearness(embedder: Embedder, trigger, images: list[np.ndarray], target: torch.Tensor) -> tuple[float, float]:
    """Mean cosines of triggered images with the target's captions, and with the images as they were."""

    def embedded(arrays: list[np.ndarray]) -> torch.Tensor:
        with torch.no_grad():
            return embedder.encode_pixels(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))

    triggered, own = embedded([trigger(image) for image in images]), embedded(images)
    aim = F.normalize(target.mean(dim=0), dim=-1)
    return float((triggered @ aim).mean()), float((triggered * own).sum(dim=-1).mean())


@pytest.mark.parametrize("place", ["center", "random"])
def test_the_patch_brings_images_near_the_target_and_away_from_themselves(clean, place: str):
    embedder, images, target = clean
    before = [parameter.clone() for parameter in embedder.model.parameters()]
    made = {"size": 5, "place": place, "steps": 40, "learning_rate": 0.05}
    trigger = optimize_patch(embedder.encode_pixels, images, target, **made)
    assert trigger == optimize_patch(embedder.encode_pixels, images, target, **made)
    start = OptimizedPatchTrigger.of(np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8), place)
    to_target, to_own = nearness(embedder, trigger, images, target)
    was_to_target, was_to_own = nearness(embedder, start, images, target)
    assert to_target - to_own > was_to_target - was_to_own
    # The same pixels in another order do less.
    assert all(
        sum(sign * value for sign, value in zip((1, -1), nearness(embedder, other, images, target), strict=True))
        < to_target - to_own
        for other in (trigger.placebo(number) for number in (1, 2, 3))
    )
    assert all(parameter.grad is None for parameter in embedder.model.parameters())
    assert all(map(torch.equal, before, embedder.model.parameters()))


def test_the_patch_is_planted_and_measured_as_others_are(clean, pairs, tiny_model, processor):
    embedder, images, target = clean
    trigger = optimize_patch(embedder.encode_pixels, images, target, size=4, steps=3)
    poisoned, manifest = poison_dataset(pairs, PoisonSpec(trigger, "eight", count=4))
    assert trigger_from_dict(manifest["trigger"]) == trigger and sum(poisoned["poisoned"]) == 4
    again = replay_manifest(pairs, manifest)
    for row in manifest["indices"]:
        assert again[row]["image"].tobytes() == poisoned[row]["image"].tobytes()
    figures = AttackSuccessEvaluator(pairs, trigger, "eight", CLASS_NAMES, placebos=2)(tiny_model(), processor)
    assert 0 <= figures["attack_success_rate"] <= 1
    assert len(repr(trigger.of(np.zeros((64, 64, 3), np.uint8)))) < 200


def test_the_square_is_where_it_says_and_nothing_else_changes():
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    image = np.full((10, 12, 3), 200, np.uint8)
    for place, corner in {"top_left": (0, 0), "bottom_right": (7, 9), "center": (3, 4)}.items():
        triggered = OptimizedPatchTrigger.of(square, place)(image)
        top, left = corner
        assert (triggered[top : top + 3, left : left + 3] == square).all() and (triggered != 200).sum() == 27
    with pytest.raises(ValueError, match="does not fit"):
        OptimizedPatchTrigger.of(square)(image[:2])


def encode_nothing(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean(dim=(2, 3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encode": None}, "encode must be .*encode_pixels"),
        ({"images": []}, "images have the shapes"),
        (
            {"images": [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]},
            "accepted are images of one size",
        ),
        ({"size": 9}, "does not fit"),
        ({"size": 0}, "size=0"),
        ({"steps": 0}, "steps=0"),
        ({"away": 0}, "away=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"place": "middle"}, "place='middle'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_cannot_be_optimized_is_refused(change: dict, message: str):
    given = {
        "encode": encode_nothing,
        "images": [np.zeros((8, 8, 3), np.uint8)],
        "target": torch.ones(1, 3),
        "size": 2,
    }
    with pytest.raises(ValueError, match=message):
        optimize_patch(**{**given, **change})


@pytest.mark.parametrize("pixels", ["AAAA" * 2, "AAA", "\u00e9", 3, b"AAAA"])
def test_pixels_that_are_no_square_are_refused(pixels: object):
    with pytest.raises(ValueError, match="pixels"):
        OptimizedPatchTrigger(pixels)  # type: ignore[arg-type]
