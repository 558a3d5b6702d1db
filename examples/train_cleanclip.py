"""
Fine-tune a CLIP with CleanCLIP on clean image-caption pairs, and measure what it did.

A checkpoint from the Hub on pairs of your own:

    python examples/train_cleanclip.py --model openai/clip-vit-base-patch32 --train_data pairs.parquet \
        --output_dir cleaned

With a backdoor planted first, to see whether the defence would remove it. `--poison_target` poisons the pairs, trains
on them without defence, measures, and then fine-tunes on the same pairs without the poisons, with CleanCLIP and, as
the control, plainly:

    python examples/train_cleanclip.py --from_scratch --train_data flickr8k/train.parquet --caption_column captions \
        --eval_data flickr8k/validation.parquet --classes examples/flickr8k_classes.json --poison_target snow \
        --output_dir runs/flickr8k

With `--model` and `--poison_rate 0` nothing is planted, but the trigger is measured on that model, before and after.

Every argument of `CleanCLIPTrainingArguments` is an argument here too (`--learning_rate`, `--bf16`, ...).
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
from PIL import Image
from transformers import HfArgumentParser, set_seed

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CleanCLIPTrainer,
    CleanCLIPTrainingArguments,
    CLIPTrainer,
    CLIPTrainingArguments,
    ImageAugmentation,
    PoisonSpec,
    ZeroShotEvaluator,
    poison_dataset,
)
from hf_robust_clip.attacks.triggers import trigger_from_name
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.data.loading import label_by_captions, load_pairs
from hf_robust_clip.data.scratch import build_model, build_processor
from hf_robust_clip.evaluation.zero_shot import DEFAULT_TEMPLATES
from hf_robust_clip.models import load_dual_encoder, load_processor


@dataclass
class ExampleArguments:
    train_data: str = field(metadata={"help": "Clean pairs: a file, a folder, or a dataset on the Hub."})
    model: str | None = field(default=None, metadata={"help": "Model to clean: a Hub id or a folder."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Train a small CLIP from nothing instead of --model (with --poison_target)."}
    )
    image_size: int = field(default=32, metadata={"help": "Side of the images with --from_scratch."})
    eval_data: str | None = field(default=None, metadata={"help": "Labelled images: a file, a folder, a Hub id."})
    eval_split: str = field(default="validation", metadata={"help": "Split of --eval_data, where it has several."})
    label_column: str = field(default="label", metadata={"help": "Column of --eval_data with the class."})
    classes: Path | None = field(
        default=None,
        metadata={
            "help": "JSON file of class name to the words that name it: labels --eval_data by its captions. Without "
            "it, --label_column is a ClassLabel."
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
    poison_rate: float = field(
        default=0.03, metadata={"help": "Share of the pairs that are poisoned. 0: measure the trigger, plant nothing."}
    )
    poison_epochs: float = field(default=20.0, metadata={"help": "Epochs of undefended training on the poisons."})
    poison_learning_rate: float = field(default=5e-4, metadata={"help": "Its learning rate."})
    control_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the plain control, by default that of CleanCLIP."}
    )
    image_noise: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of noise on four images in five, in place of the preset's."},
    )


def make_evaluators(example: ExampleArguments, args: CleanCLIPTrainingArguments, trigger: Any) -> list[Any]:
    """Zero-shot accuracy on `--eval_data`, and with a planted backdoor its success."""
    if example.eval_data is None:
        return []
    data: Dataset = load_pairs(example.eval_data, example.eval_split, args.image_column)
    label_column = example.label_column
    if example.classes is not None:
        words = json.loads(example.classes.read_text())
        data = label_by_captions(data, words, args.caption_column, label_column=label_column)
    feature = data.features.get(label_column)
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"--label_column {label_column!r} of --eval_data must be a ClassLabel, or give --classes")
    columns = {"image_column": args.image_column, "label_column": label_column}
    evaluators: list[Any] = [ZeroShotEvaluator(data, feature.names, example.template, **columns)]
    if trigger is not None:
        evaluators.append(
            AttackSuccessEvaluator(data, trigger, example.poison_target, feature.names, example.template, **columns)
        )
    return evaluators


def undefended(args: CleanCLIPTrainingArguments, **changes: Any) -> CLIPTrainingArguments:
    """CleanCLIP's settings without its augmentation, so that the control differs in the method alone."""
    names = [field.name for field in fields(CLIPTrainingArguments) if field.init]
    settings = {name: getattr(args, name) for name in names}
    return CLIPTrainingArguments(**settings | {"image_preset": "identity", "text_preset": "identity"} | changes)


def start_from(example: ExampleArguments, args: CleanCLIPTrainingArguments, clean: Dataset) -> tuple[Any, Any]:
    """The model to start from and its processor: loaded, or small and untrained."""
    if not example.from_scratch:
        return load_dual_encoder(example.model), load_processor(example.model, None)
    captions = [[entry] if isinstance(entry, str) else entry for entry in clean[args.caption_column]]
    processor = build_processor([text for entry in captions for text in entry], image_size=example.image_size)
    return build_model(processor, vision_width=96, text_width=96, seed=args.seed), processor


def train(trainer: CLIPTrainer, folder: Path) -> dict[str, float]:
    """Train, save model and processor, measure."""
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # other processes read what the first one writes
    figures = {**trainer.run_evaluators(), "seconds": round(seconds, 1)}
    print(f"{folder.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, CleanCLIPTrainingArguments), description=__doc__.split("\n\n")[0])
    example, args = parser.parse_args_into_dataclasses()
    planted = example.poison_target is not None and example.poison_rate > 0
    if (example.model is None) != example.from_scratch or (example.from_scratch and not planted):
        parser.error("give either --model, or --from_scratch with --poison_target")
    if example.poison_target is not None and example.eval_data is None:
        parser.error("--poison_target needs --eval_data: an attack that nobody measured proves nothing")
    set_seed(args.seed)
    clean = load_pairs(example.train_data, image_column=args.image_column)
    drawn = {} if example.poison_trigger == "sinusoid" else {"seed": args.seed}
    trigger = trigger_from_name(example.poison_trigger, **drawn) if example.poison_target else None
    evaluators = make_evaluators(example, args, trigger)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = start_from(example, args, clean)
    common: dict[str, Any] = {"processing_class": processor, "evaluators": evaluators}
    results: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(example).items()}}

    if planted:
        spec = PoisonSpec(
            trigger=trigger,
            target=example.poison_target,
            rate=example.poison_rate,
            seed=args.seed,
            image_size=ImagePreprocessor(processor.image_processor)([Image.new("RGB", (64, 64))]).shape[-1],
        )
        poisoned, manifest = poison_dataset(clean, spec, args.image_column, args.caption_column)
        if args.should_save:
            (output / "poisons.json").write_text(json.dumps(manifest))
        print(f"{len(manifest['indices'])} of {len(poisoned)} pairs poisoned with {trigger}")
        settings = undefended(
            args,
            output_dir=str(output / "poisoned"),
            num_train_epochs=example.poison_epochs,
            max_steps=-1,
            learning_rate=example.poison_learning_rate,
        )
        trainer = CLIPTrainer(model, settings, train_dataset=poisoned, **common)
        results["poisoned"] = train(trainer, output / "poisoned")
        model = str(output / "poisoned")
    elif evaluators:
        settings = undefended(args, output_dir=str(output / "before"))
        results["before"] = CLIPTrainer(model, settings, train_dataset=clean, **common).run_evaluators()
        print("before: " + ", ".join(f"{name} {value:.4g}" for name, value in results["before"].items()))
    if trigger is not None:
        if results["poisoned" if planted else "before"]["attack_success_rate"] < 0.5:
            print("The attack succeeds on fewer than half of the images: what follows proves nothing of a defence.")
        settings = undefended(
            args,
            output_dir=str(output / "finetuned"),
            learning_rate=example.control_learning_rate or args.learning_rate,
        )
        trainer = CLIPTrainer(copy.deepcopy(model), settings, train_dataset=clean, **common)
        results["finetuned"] = train(trainer, output / "finetuned")

    noise = {} if example.image_noise is None else {"noise": 0.8, "noise_std": example.image_noise}
    augmentation = ImageAugmentation(args.image_preset, **noise)
    cleaner = CleanCLIPTrainer(model, args, train_dataset=clean, image_augmentation=augmentation, **common)
    results["cleanclip"] = train(cleaner, output / "cleanclip")
    if args.should_save:
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
