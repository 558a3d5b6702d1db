"""What the three training examples have in common: their data, the attack they can plant, and how they measure."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
from quick import IMAGES, PAIRS, TARGET, quick_output, stand_ins
from transformers import HfArgumentParser

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPTrainer,
    CLIPTrainingArguments,
    ImageAugmentation,
    PoisonSpec,
    ZeroShotEvaluator,
)
from hf_robust_clip.attacks.triggers import Trigger, trigger_from_name
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.data.loading import encode_labels, label_by_captions, load_pairs
from hf_robust_clip.data.scratch import build_model, build_processor
from hf_robust_clip.evaluation.zero_shot import DEFAULT_TEMPLATES
from hf_robust_clip.models import load_dual_encoder, load_processor

#: What `--quick` stands for, beside the digits; flags that are given as well win.
QUICK = f"--from_scratch --image_size 16 --poison_target {TARGET} --poison_rate 0.1 --num_train_epochs 2".split()


@dataclass
class DataArguments:
    train_data: str = field(metadata={"help": "Training pairs: a file, a folder, or a dataset on the Hub."})
    model: str | None = field(default=None, metadata={"help": "Model to start from: a Hub id or a folder."})
    from_scratch: bool = field(default=False, metadata={"help": "Start from a small untrained CLIP instead."})
    image_size: int = field(default=32, metadata={"help": "Side of the images with --from_scratch."})
    eval_data: str | None = field(default=None, metadata={"help": "Labelled images: a file, a folder, a Hub id."})
    eval_split: str = field(default="validation", metadata={"help": "Split of --eval_data, where it has several."})
    label_column: str = field(default="label", metadata={"help": "Column of --eval_data with the class."})
    classes: Path | None = field(
        default=None,
        metadata={
            "help": "JSON file of class name to the words that name it: labels --eval_data by its captions, up to "
            "three of which have to agree. Without it, --label_column is a ClassLabel or has the names."
        },
    )
    template: list[str] = field(
        default_factory=lambda: list(DEFAULT_TEMPLATES), metadata={"help": "Prompts with one {} for the class name."}
    )
    poison_target: str | None = field(
        default=None, metadata={"help": "Class that a backdoor is for, one of the classes: plant it, and measure it."}
    )
    poison_trigger: str = field(
        default="blended", metadata={"help": "Trigger of the backdoor: patch, blended, sinusoid or warp."}
    )
    poison_rate: float = field(default=0.03, metadata={"help": "Share of the pairs that are poisoned."})
    image_noise: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of noise on four images in five, in place of the preset's."},
    )
    quick: bool = field(
        default=False, metadata={"help": "Only see that it runs: a few handwritten digits, a backdoor, two epochs."}
    )


def parse(parser: HfArgumentParser, quick: str) -> tuple[Any, Any]:
    """
    The example's arguments and the trainer's.

    Args:
        parser (`HfArgumentParser`): Of the two classes of arguments.
        quick (`str`): Flags that `--quick` stands for in this example, beside `QUICK`.
    """
    flags = sys.argv[1:]
    if "--quick" in flags:
        folder = stand_ins()
        data = ["--train_data", str(folder / PAIRS), "--eval_data", str(folder / IMAGES), "--eval_split", "test"]
        flags = [*data, *QUICK, *quick.split(), "--output_dir", quick_output(), *flags]
        print("QUICK RUN: so small that the figures mean nothing.")
    example, args = parser.parse_args_into_dataclasses(flags)
    return example, args


def labelled_images(example: DataArguments, args: CLIPTrainingArguments) -> tuple[Dataset, list[str]] | None:
    """The images to measure on, with the label column, and the names of the classes."""
    if example.eval_data is None:
        return None
    data: Dataset = load_pairs(example.eval_data, example.eval_split, args.image_column)
    if example.classes is not None:
        words = json.loads(example.classes.read_text())
        data = label_by_captions(data, words, args.caption_column, label_column=example.label_column)
    data = encode_labels(data, example.label_column)
    feature = data.features.get(example.label_column)
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"--label_column {example.label_column!r} of --eval_data is {feature}; accepted are a ClassLabel and "
            "names of classes (string). Or give --classes"
        )
    return data, feature.names


def make_evaluators(
    example: DataArguments,
    args: CLIPTrainingArguments,
    labelled: tuple[Dataset, list[str]] | None,
    trigger: Trigger | None,
) -> list[Any]:
    """Zero-shot accuracy on labelled images, and with a trigger its success."""
    if labelled is None:
        return []
    data, names = labelled
    columns = {"image_column": args.image_column, "label_column": example.label_column}
    evaluators: list[Any] = [ZeroShotEvaluator(data, names, templates=example.template, **columns)]
    if trigger is not None and example.poison_target is not None:
        evaluators.append(
            AttackSuccessEvaluator(data, trigger, example.poison_target, names, templates=example.template, **columns)
        )
    return evaluators


def make_trigger(example: DataArguments, seed: int) -> Trigger | None:
    """The trigger of `--poison_trigger`, if there is something to poison for."""
    if example.poison_target is None:
        return None
    trigger = trigger_from_name(example.poison_trigger)
    if not isinstance(trigger, Trigger):
        raise ValueError(f"--poison_trigger {example.poison_trigger!r} goes on captions; accepted is one on images")
    return trigger.reseeded(seed)


def backdoor(example: DataArguments, trigger: Trigger, processor: Any, seed: int) -> PoisonSpec:
    """The backdoor that the arguments describe, at the model's own resolution."""
    size = ImagePreprocessor(processor.image_processor).image_size
    assert example.poison_target is not None
    return PoisonSpec(trigger, example.poison_target, rate=example.poison_rate, seed=seed, image_size=size)


def make_augmentation(example: DataArguments, args: CLIPTrainingArguments, **overrides: Any) -> ImageAugmentation:
    """The preset of the arguments, with the noise of `--image_noise`."""
    if example.image_noise is not None:
        overrides |= {"noise": 0.8, "noise_std": example.image_noise}
    return ImageAugmentation(args.image_preset, **overrides)


def undefended(args: CLIPTrainingArguments, **changes: Any) -> CLIPTrainingArguments:
    """A defence's settings for a plain CLIPTrainer without augmentation, so that the method alone differs."""
    names = [item.name for item in fields(CLIPTrainingArguments) if item.init]
    settings = {name: getattr(args, name) for name in names}
    settings |= {"image_preset": "identity", "text_preset": "identity", "resume_from_checkpoint": None}
    return CLIPTrainingArguments(**settings | changes)


def start_from(example: DataArguments, args: CLIPTrainingArguments, pairs: Dataset) -> tuple[Any, Any]:
    """The model to start from and its processor: loaded, or small and untrained."""
    if not example.from_scratch:
        return load_dual_encoder(example.model), load_processor(example.model, None)
    captions = [[entry] if isinstance(entry, str) else entry for entry in pairs[args.caption_column]]
    processor = build_processor([text for entry in captions for text in entry], image_size=example.image_size)
    return build_model(processor, vision_width=96, text_width=96, seed=args.seed), processor


def train(trainer: CLIPTrainer, folder: Path) -> dict[str, float]:
    """Train, save model and processor, measure."""
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # other processes read what the first one writes
    figures = {**trainer.run_evaluators(), "seconds": round(seconds, 1)}
    print(f"{folder.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures
