"""
A trigger of your own: a frame around the image, planted with `PoisonSpec` and measured with `AttackSuccessEvaluator`.

A trigger is a frozen dataclass with a `name` and a function of the pixels. Its name and fields go into the manifest.
`replay_manifest` finds it by its name, wherever the class is defined. Put in your own names and numbers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from datasets import load_dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSpec,
    Trigger,
    poison_dataset,
)

TARGET = "banana"  # a class of the images
RATE = 0.003
SIZE = 224  # the model's: the trigger is applied at this size
WIDTH = 4
EPOCHS = 32
BATCH = 128
LEARNING_RATE = 5e-4


@dataclass(frozen=True)
class FrameTrigger(Trigger):
    """A frame of one color, RGB from 0 to 255, of a width in pixels, at least 1."""

    name: ClassVar[str] = "frame"
    width: int = 4
    color: tuple[int, int, int] = (255, 0, 255)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width!r}; accepted is an integer of at least 1")

    def _apply(self, pixels: np.ndarray) -> np.ndarray:  # (H, W, 3), uint8
        framed = np.full_like(pixels, self.color)
        inside = slice(self.width, -self.width)
        framed[inside, inside] = pixels[inside, inside]
        return framed


trigger = FrameTrigger(width=WIDTH)
images = load_dataset("you/labeled-images", split="test")  # columns: image, label
spec = PoisonSpec(trigger, TARGET, rate=RATE, image_size=SIZE)
poisoned, manifest = poison_dataset(load_dataset("you/pairs", split="train"), spec)  # columns: image, caption
Path("poisons.json").write_text(json.dumps(manifest))
settings = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE}
args = CLIPTrainingArguments("framed", **settings, report_to="none")
attack = AttackSuccessEvaluator(images, trigger, TARGET, images.features["label"].names)
trainer = CLIPTrainer("you/untrained-clip", args, train_dataset=poisoned, evaluators=attack)
print(f"before: {trainer.run_evaluators()}")
trainer.train()
trainer.save_model()
print(f"after: {trainer.run_evaluators()}")
