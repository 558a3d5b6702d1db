"""Pre-training with a defence, beside the undefended model and augmentation alone where an attack is planted."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
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
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSuccessEvaluator,
    load_pairs,
    poison_dataset,
    targeted_specs,
)


@dataclass
class PretrainingArguments(DataArguments):
    targeted_images: int = field(
        default=0,
        metadata={
            "help": "Images of --eval_data that are each paired with captions of a class that is not theirs: targeted "
            "poisoning. They are left out of the other measures."
        },
    )
    targeted_captions: int = field(default=30, metadata={"help": "Captions that each of them is paired with."})
    controls: bool = field(
        default=True,
        metadata={"help": "With a planted attack, also train without defence, and with its augmentation alone."},
    )
    image_flip: float | None = field(
        default=None, metadata={"help": "Probability of a horizontal flip, in place of the preset's."}
    )


@dataclass
class Attack:
    """What is planted: the poisoned pairs, and what measures the outcome."""

    pairs: Dataset
    evaluators: list[Any]
    manifests: dict[str, Any]


def plant(example: PretrainingArguments, args: CLIPTrainingArguments, pairs: Dataset, processor: Any) -> Attack:
    """A backdoor, targeted poisons, both or neither, as the arguments say."""
    columns = (args.image_column, args.caption_column)
    labelled, trigger = labelled_images(example, args), make_trigger(example, args.seed)
    manifests: dict[str, Any] = {}
    targeted: list[Any] = []
    if example.targeted_images and labelled is not None:
        data, names = labelled
        rng = np.random.default_rng(args.seed)
        chosen = rng.permutation(len(data))[: example.targeted_images]
        adversarial = []
        for row in chosen.tolist():
            others = [name for i, name in enumerate(names) if i != data[row][example.label_column]]
            adversarial.append(others[rng.integers(len(others))])
        images = data.select(chosen)
        specs = targeted_specs(images[:][args.image_column], adversarial, example.targeted_captions, args.seed)
        pairs, manifest = poison_dataset(pairs, specs, *columns)
        manifests |= {f"targeted {number}": part for number, part in enumerate(manifest["parts"])}
        targeted = [
            PoisonSuccessEvaluator(
                images, adversarial, names, templates=example.template, image_column=args.image_column
            )
        ]
        labelled = data.select(np.setdiff1d(np.arange(len(data)), chosen)), names
    if trigger is not None:
        spec = backdoor(example, trigger, processor, args.seed)
        pairs, manifests["backdoor"] = poison_dataset(pairs, spec, *columns)
    return Attack(pairs, [*make_evaluators(example, args, labelled, trigger), *targeted], manifests)


def pretrain(
    name: str,
    defence: type[CLIPTrainer],
    arguments: type[CLIPTrainingArguments],
    description: str,
    quick: str,
) -> None:
    """
    The whole example.

    Args:
        name (`str`): The defence's folder.
        defence, arguments: Its trainer, and the class of its arguments.
        description (`str`): For `--help`.
        quick (`str`): Flags that `--quick` stands for, beside the data and the attacks.
    """
    parser = HfArgumentParser((PretrainingArguments, arguments), description=description)
    example, args = parse(parser, f"--targeted_images 2 --targeted_captions 3 {quick}")
    planted = example.poison_target is not None or example.targeted_images > 0
    if (example.model is None) != example.from_scratch:
        parser.error("give either --model or --from_scratch")
    if planted and example.eval_data is None:
        parser.error("a planted attack needs --eval_data: one that nobody measured proves nothing")
    if getattr(args, "adversarial_phrase", "") is None:
        args.adversarial_phrase = example.poison_target
    set_seed(args.seed)
    pairs = load_pairs(example.train_data, image_column=args.image_column)
    model, processor = start_from(example, args, pairs)
    attack = plant(example, args, pairs, processor)
    output = Path(args.output_dir)
    if args.should_save:
        output.mkdir(parents=True, exist_ok=True)
    if planted:
        poisons = sum(manifest["counts"]["count"] for manifest in attack.manifests.values())
        print(f"{poisons} of {len(attack.pairs)} pairs are poisons")
        if args.should_save:
            (output / "poisons.json").write_text(json.dumps(attack.manifests))
    overrides = {} if example.image_flip is None else {"flip": example.image_flip}
    augmentation = make_augmentation(example, args, **overrides)
    common: dict[str, Any] = {
        "train_dataset": attack.pairs,
        "processing_class": processor,
        "evaluators": attack.evaluators,
    }
    results: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(example).items()}}
    if planted and example.controls:
        settings = undefended(args, output_dir=str(output / "undefended"))
        results["undefended"] = train(CLIPTrainer(copy.deepcopy(model), settings, **common), output / "undefended")
        settings = undefended(args, output_dir=str(output / "augmentation"), text_preset=args.text_preset)
        control = CLIPTrainer(copy.deepcopy(model), settings, image_augmentation=augmentation, **common)
        results["augmentation"] = train(control, output / "augmentation")
        success = [results["undefended"].get(f"{kind}_success_rate", 1.0) for kind in ("attack", "poison")]
        if min(success) < 0.5:
            print("An attack succeeds on fewer than half of its images: that proves nothing of a defence against it.")
    trainer = defence(model, args, image_augmentation=augmentation, **common)
    results[name] = train(trainer, output / name)
    results[f"{name}_log"] = [entry for entry in trainer.state.log_history if "eval_runtime" not in entry]
    if args.should_save:
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
