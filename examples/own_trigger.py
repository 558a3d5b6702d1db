"""
A trigger of your own: a frame around the image, planted with `PoisonSpec` and measured with `AttackSuccessEvaluator`.

    python examples/own_trigger.py --model my-clip --pairs you/pairs --images you/labelled-images --target banana \
        --output_dir framed

A trigger is a frozen dataclass with a `name` and a function of the pixels. Its name and fields go into the manifest:
`replay_manifest` finds it by its name wherever the class is defined. On a few digits, in seconds:

    python examples/own_trigger.py --quick
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from quick import example_parser, parse
from transformers import AutoProcessor

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSpec,
    ZeroShotEvaluator,
    load_pairs,
    poison_dataset,
)
from hf_robust_clip.attacks.triggers import Pixels, Trigger
from hf_robust_clip.data.images import ImagePreprocessor


@dataclass(frozen=True)
class FrameTrigger(Trigger):
    """
    A frame of one colour around the image.

    Args:
        width (`int`, defaults to 4): in pixels, at least 1.
        colour (three `int`, defaults to magenta): RGB, 0 to 255 each.

    Raises:
        `ValueError`: on a width below 1.
    """

    name: ClassVar[str] = "frame"
    width: int = 4
    colour: tuple[int, int, int] = (255, 0, 255)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width!r}; accepted is an integer of at least 1")

    def _apply(self, pixels: Pixels) -> Pixels:
        framed = np.full_like(pixels, self.colour)  # (H, W, 3)
        inside = slice(self.width, -self.width)
        framed[inside, inside] = pixels[inside, inside]
        return framed


def main() -> None:
    given = parse(example_parser(__doc__))
    trigger = FrameTrigger(width=1 if given.quick else 4)
    images = load_pairs(given.images, split="test")
    names = images.features["label"].names
    # The trigger goes on at the model's own resolution, where it is measured too.
    size = ImagePreprocessor(AutoProcessor.from_pretrained(given.model).image_processor).image_size
    spec = PoisonSpec(trigger, given.target, rate=0.1 if given.quick else 0.003, image_size=size)
    poisoned, manifest = poison_dataset(load_pairs(given.pairs), spec)
    Path(given.output_dir).mkdir(parents=True, exist_ok=True)
    Path(given.output_dir, "poisons.json").write_text(json.dumps(manifest))
    settings: dict[str, Any] = {"num_train_epochs": 5, "learning_rate": 1e-5, "per_device_train_batch_size": 128}
    if given.quick:
        settings = {"num_train_epochs": 12, "learning_rate": 2e-3, "per_device_train_batch_size": 32}
    trainer = CLIPTrainer(
        given.model,
        CLIPTrainingArguments(given.output_dir, report_to="none", **settings),
        train_dataset=poisoned,
        evaluators=[
            ZeroShotEvaluator(images, names),
            AttackSuccessEvaluator(images, trigger, given.target, names),
        ],
    )
    print("before:", trainer.run_evaluators())
    trainer.train()
    trainer.save_model()
    print("after:", trainer.run_evaluators())


if __name__ == "__main__":
    main()
