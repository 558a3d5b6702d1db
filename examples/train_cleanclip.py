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

Every argument of `CleanCLIPTrainingArguments` is an argument here too (`--learning_rate`, `--bf16`, ...). All of it on
a few digits, in seconds:

    python examples/train_cleanclip.py --quick
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import (
    DataArguments,
    backdoor,
    labelled_images,
    make_augmentation,
    make_evaluators,
    make_trigger,
    parse,
    start_from,
    train,
    undefended,
)
from transformers import HfArgumentParser, set_seed

from hf_robust_clip import (
    CleanCLIPTrainer,
    CleanCLIPTrainingArguments,
    CLIPTrainer,
    load_pairs,
    poison_dataset,
)


@dataclass
class ExampleArguments(DataArguments):
    poison_rate: float = field(
        default=0.03, metadata={"help": "Share of the pairs that are poisoned. 0: measure the trigger, plant nothing."}
    )
    poison_epochs: float = field(default=20.0, metadata={"help": "Epochs of undefended training on the poisons."})
    poison_learning_rate: float = field(default=5e-4, metadata={"help": "Its learning rate."})
    control_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the plain control, by default that of CleanCLIP."}
    )


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, CleanCLIPTrainingArguments), description=__doc__.split("\n\n")[0])
    example, args = parse(parser, "--poison_epochs 2")
    planted = example.poison_target is not None and example.poison_rate > 0
    if (example.model is None) != example.from_scratch or (example.from_scratch and not planted):
        parser.error("give either --model, or --from_scratch with --poison_target")
    if example.poison_target is not None and example.eval_data is None:
        parser.error("--poison_target needs --eval_data: an attack that nobody measured proves nothing")
    set_seed(args.seed)
    clean = load_pairs(example.train_data, image_column=args.image_column)
    trigger = make_trigger(example, args.seed)
    evaluators = make_evaluators(example, args, labelled_images(example, args), trigger)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = start_from(example, args, clean)
    common: dict[str, Any] = {"processing_class": processor, "evaluators": evaluators}
    results: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(example).items()}}

    if planted:
        spec = backdoor(example, trigger, processor, args.seed)
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

    augmentation = make_augmentation(example, args)
    cleaner = CleanCLIPTrainer(model, args, train_dataset=clean, image_augmentation=augmentation, **common)
    results["cleanclip"] = train(cleaner, output / "cleanclip")
    if args.should_save:
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
