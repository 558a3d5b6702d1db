"""
Fine-tune a CLIP with CleanCLIP on clean image-caption pairs, and measure what it did.

A checkpoint from the Hub on pairs of your own:

    python examples/train_cleanclip.py --model openai/clip-vit-base-patch32 --train_data pairs.parquet \
        --output_dir cleaned

With a backdoor planted first, to see whether the defence would remove it. `--plant_target` poisons the pairs, trains
on them without defence, measures, and then fine-tunes on the same pairs without the poisons, with CleanCLIP and, as
the control, plainly:

    python examples/train_cleanclip.py --from_scratch --train_data flickr8k/train.parquet --caption_column captions \
        --eval_data flickr8k/validation.parquet --classes examples/flickr8k_classes.json --plant_target snow \
        --output_dir runs/flickr8k

Every argument of `CleanCLIPTrainingArguments` is an argument here too (`--learning_rate`, `--bf16`, ...).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
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
from hf_robust_clip.data.loading import label_by_captions, load_pairs
from hf_robust_clip.data.scratch import build_model, build_processor
from hf_robust_clip.evaluation.zero_shot import DEFAULT_TEMPLATES
from hf_robust_clip.models import load_dual_encoder, load_processor


@dataclass
class ExampleArguments:
    train_data: str = field(metadata={"help": "Clean pairs: a file, a folder, or a dataset on the Hub."})
    model: str | None = field(default=None, metadata={"help": "Model to clean: a Hub id or a folder."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Train a small CLIP from nothing instead of --model (with --plant_target)."}
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
    plant_target: str | None = field(
        default=None, metadata={"help": "Class to plant a backdoor for, before cleaning. One of the classes."}
    )
    plant_trigger: str = field(
        default="blended", metadata={"help": "Trigger of the backdoor: patch, blended, sinusoid or warp."}
    )
    plant_rate: float = field(default=0.03, metadata={"help": "Share of the pairs that are poisoned."})
    plant_epochs: float = field(default=20.0, metadata={"help": "Epochs of undefended training on the poisons."})
    plant_learning_rate: float = field(default=5e-4, metadata={"help": "Its learning rate."})
    control_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the plain control, by default that of CleanCLIP."}
    )
    image_noise: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the augmentation's noise, in [0, 1]."},
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
            AttackSuccessEvaluator(data, trigger, example.plant_target, feature.names, example.template, **columns)
        )
    return evaluators


def shared(args: CleanCLIPTrainingArguments) -> dict[str, Any]:
    """The settings that the undefended runs have in common with CleanCLIP's."""
    names = (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "weight_decay", "warmup_steps", "adam_beta2"),
        *("lr_scheduler_type", "seed", "image_column", "caption_column", "on_bad_row", "bf16", "use_cpu"),
        *("report_to", "save_strategy", "logging_steps", "disable_tqdm", "dataloader_num_workers"),
    )
    return {name: getattr(args, name) for name in names}


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
    figures = {**trainer.run_evaluators(), "seconds": round(seconds, 1)}
    print(f"{folder.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, CleanCLIPTrainingArguments), description=__doc__.split("\n\n")[0])
    example, args = parser.parse_args_into_dataclasses()
    if (example.model is None) != example.from_scratch or (example.from_scratch and example.plant_target is None):
        parser.error("give either --model, or --from_scratch with --plant_target")
    if example.plant_target is not None and example.eval_data is None:
        parser.error("--plant_target needs --eval_data: an attack that nobody measured proves nothing")
    set_seed(args.seed)
    clean = load_pairs(example.train_data, image_column=args.image_column)
    trigger = trigger_from_name(example.plant_trigger, seed=args.seed) if example.plant_target else None
    evaluators = make_evaluators(example, args, trigger)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = start_from(example, args, clean)
    common: dict[str, Any] = {"processing_class": processor, "evaluators": evaluators}
    results: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(example).items()}}

    if trigger is not None:
        spec = PoisonSpec(
            trigger=trigger,
            target=example.plant_target,
            rate=example.plant_rate,
            seed=args.seed,
            image_size=processor.image_processor.crop_size["height"],
        )
        poisoned, manifest = poison_dataset(clean, spec, args.image_column, args.caption_column)
        (output / "poisons.json").write_text(json.dumps(manifest))
        print(f"{len(manifest['indices'])} of {len(poisoned)} pairs poisoned with {trigger}")
        settings = CLIPTrainingArguments(
            str(output / "poisoned"),
            num_train_epochs=example.plant_epochs,
            learning_rate=example.plant_learning_rate,
            **shared(args),
        )
        trainer = CLIPTrainer(model, settings, train_dataset=poisoned, **common)
        results["poisoned"] = train(trainer, output / "poisoned")
        settings = replace(
            settings,
            output_dir=str(output / "finetuned"),
            num_train_epochs=args.num_train_epochs,
            learning_rate=example.control_learning_rate or args.learning_rate,
        )
        trainer = CLIPTrainer(str(output / "poisoned"), settings, train_dataset=clean, **common)
        results["finetuned"] = train(trainer, output / "finetuned")
        model = str(output / "poisoned")

    noise = {} if example.image_noise is None else {"noise_std": example.image_noise}
    augmentation = ImageAugmentation(args.image_preset, **noise)
    cleaner = CleanCLIPTrainer(model, args, train_dataset=clean, image_augmentation=augmentation, **common)
    if trigger is None and evaluators:
        results["before"] = cleaner.run_evaluators()
    results["cleanclip"] = train(cleaner, output / "cleanclip")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
