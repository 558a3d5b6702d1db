"""The steps of the demo, as a script: poison, pre-train, defend, measure, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..attacks.poisoning import poison_dataset
from ..attacks.spec import PoisonSpec
from ..attacks.triggers import Trigger, trigger_from_name
from ..data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_model, digit_processor, load_digit_pairs
from ..evaluation.attack_success import PLACEBO_METRICS, AttackSuccessEvaluator
from ..evaluation.zero_shot import ZeroShotEvaluator
from ..record import RunRecord
from ..telling import Control, PoisonedPair, Study
from ..telling.page import run_facts
from ..telling.sentences import notes, statements
from ..trainers.defended import SafeCLIPTrainer
from ..trainers.trainer import CLIPTrainer
from ..versions import versions
from .demo_recipe import (
    CONTROLS,
    DEFENCES,
    LIMITS,
    MANIFEST,
    MODELS,
    RESULTS,
    TRIGGERS,
    Recipe,
    reports,
    title_of,
)
from .flags import PLACEBOS
from .output import format_table, say, write_json
from .progress import progress_callback, quiet_trainers
from .rows import CLEAN_SEED_OFFSET, row_arguments, row_augmentation, row_trainer

SHARES = ("clean_accuracy", "attack_success_rate", "triggered_accuracy")
#: What is kept of RoCLIP's log of an epoch; the last four are there in epochs with matching steps only.
MATCHING_FIELDS = (
    *("clean_pair_similarity", "poisoned_pair_similarity", "distinct_matches", "largest_match_share"),
    *("match_similarity", "poisoned_match_adversarial"),
)


def run_steps(folder: Path, seed: int, trigger_name: str, recipe: Recipe, quick: bool, defence: str) -> dict[str, Any]:
    """Run the demo, as [`run_demo`] says, in a folder that it has to itself."""
    started = time.perf_counter()
    models = DEFENCES[defence]
    total = 1 + len(models)

    say(f"\n[1/{total}] Poison the training pairs")
    trigger, target, processor = make_trigger(trigger_name, seed), recipe.target, digit_processor()
    clean, test = load_digit_pairs("train", recipe.renderings, seed=seed), load_digit_pairs("test", seed=seed)
    poisoned, manifest = poison_digits(clean, trigger, recipe, seed)
    # From here on the folder's files are this run's: none of an earlier one is to pass for it.
    for name in (RESULTS, *reports(defence)):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / MANIFEST, manifest)
    counts = manifest["counts"]
    count, pairs, share = counts["count"], counts["dataset_length"], f"{counts['rate']:.1%}"
    poisoning = f"{count} of {pairs} pairs ({share}) get the {trigger_name} trigger and a caption that says {target!r}"
    say(f"  {poisoning}")
    evaluators = digit_evaluators(test, trigger, target)
    attacked = evaluators[1].attacked_images
    say(f"  {len(test)} test images, {attacked} of them no {target!r}: those are attacked")
    announced = _announcements(recipe, pairs)

    trainers: dict[str, CLIPTrainer] = {}
    results: dict[str, Any] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    details: dict[str, list[dict[str, Any]]] = {}  # what RoCLIP and SafeCLIP noted down
    to_clean_with = None
    if "cleanclip" in models:
        to_clean_with = load_digit_pairs("train", recipe.renderings, seed=seed + CLEAN_SEED_OFFSET)
    for step, name in enumerate(models, 2):
        say(f"\n[{step}/{total}] {announced[name]}")
        start = MODELS[name].start
        trainers[name] = trainer = make_trainer(
            name,
            recipe,
            folder / name,
            seed,
            model=digit_model(seed) if start is None else str(folder / start),
            train_dataset=poisoned if start is None else to_clean_with,
            processing_class=processor,
            evaluators=evaluators,
        )
        with quiet_trainers():
            runtime = trainer.train().metrics["train_runtime"]
        trainer.unwrapped_model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        evaluations = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
        curves[name] = [
            {"epoch": entry["epoch"], **{figure: entry[f"eval_{figure}"] for figure in SHARES[:2]}}
            for entry in evaluations
        ]
        record = trainer.record()
        assert record.after is not None  # evaluated after each epoch
        figures: dict[str, Any] = {
            figure: record.after[figure] for figure in (*SHARES, "trigger_distance", *PLACEBO_METRICS)
        }
        # The evaluations are for the curves; the time of a method is that of its training.
        figures["seconds"] = runtime - sum(entry["eval_runtime"] for entry in evaluations)
        results[name] = figures
        accuracy, success = (f"{figures[figure]:.1%}" for figure in SHARES[:2])
        say(f"  clean accuracy {accuracy}, attack success {success}, {figures['seconds']:.0f} s of training")
        for note in notes(record):
            say(f"  {note.text}")
        if name == "roclip":
            details["matching"] = _matching(record)
        elif isinstance(trainer, SafeCLIPTrainer):
            details["splits"] = trainer.defence.notes()["splits"]

    results["setup"] = {
        "defence": defence,
        "seed": seed,
        "trigger": trigger.to_dict(),
        "target": target,
        "pairs": pairs,
        "poisons": count,
        "poison_rate": counts["rate"],
        "test_images": len(test),
        "attacked_images": attacked,
        "recipe": {
            "renderings": recipe.renderings,
            "arguments": {name: row_arguments(MODELS, recipe.arguments, name) for name in models},
            "image_augmentation": recipe.image_augmentation,
        },
        "quick": quick,
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    results |= {"curves": curves, **details}
    write_json(folder / RESULTS, results)
    say("\nResults" + (" (quick run: they mean little)" if quick else ""))
    for line in format_table(results_table(results)):
        say(f"  {line}")

    flags = f"--defence {defence} --seed {seed} --trigger {trigger_name}{' --quick' if quick else ''}"
    shown = [
        PoisonedPair(poisoned[row]["image"], clean[row]["caption"], poisoned[row]["caption"])
        for row in manifest["indices"][:4]
    ]
    controls = {
        name: Control(MODELS[name].title, trainer.record(), trainer.pictures())
        for name, trainer in trainers.items()
        if name not in CONTROLS
    }
    for file, name in reports(defence).items():
        others = [controls[control] for control in CONTROLS[name]]
        say(f"\n{MODELS[name].title}" if defence == "all" else "")
        for statement in statements(run_facts(trainers[name].record(), others)):
            say(f"{'-' if statement.kind == 'result' else '!'} {statement.text}")
        steps = [
            f"{poisoning}.",
            *(f"{announced[model]}." for model in (*CONTROLS[name], name)),
            f"Measure all on {len(test)} digits that no training saw. Attack the {attacked} that are not “{target}”.",
            f"To do it again: hf-robust-clip demo --output-dir {folder.name or 'demo-output'} {flags}. Beside this "
            f"file, {RESULTS} has every figure, {MANIFEST} every poison, and a folder for each model its weights.",
        ]
        banner = "Quick run: the models are hardly trained, and the figures mean little." if quick else None
        study = Study(title_of(name), steps, [*LIMITS[name], *LIMITS["all"]], shown, banner)
        trainers[name].save_report(folder / file, controls=others, study=study)
        say(f"\nReport: {folder / file}")
    return results


def make_trigger(name: str, seed: int) -> Trigger:
    """The trigger of that name in the demo's settings, drawn under the seed where it is random."""
    trigger = trigger_from_name(name, **TRIGGERS[name])
    assert isinstance(trigger, Trigger)  # TRIGGERS has none on captions
    return trigger.reseeded(seed)


def poison_digits(clean: Dataset, trigger: Trigger, recipe: Recipe, seed: int) -> tuple[Dataset, dict[str, Any]]:
    """Digits with the recipe's poisons among them, and the manifest."""
    spec = PoisonSpec(trigger, recipe.target, rate=recipe.poison_rate, templates=CAPTION_TEMPLATES, seed=seed)
    return poison_dataset(clean, spec, label_column="label")


def digit_evaluators(test: Dataset, trigger: Trigger, target: str) -> tuple[ZeroShotEvaluator, AttackSuccessEvaluator]:
    """What measures a model of the digits."""
    return (
        ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES),
        AttackSuccessEvaluator(test, trigger, target, CLASS_NAMES, templates=CAPTION_TEMPLATES, placebos=PLACEBOS),
    )


def make_trainer(name: str, recipe: Recipe, folder: Path, seed: int, **parts: Any) -> CLIPTrainer:
    """The trainer of one of `MODELS`, evaluated after each epoch; `parts` are model, data and evaluators."""
    arguments = row_arguments(MODELS, recipe.arguments, name)
    if name == "roclip":
        arguments["adversarial_phrase"] = recipe.target
    trainer = row_trainer(
        MODELS[name].trainer,
        folder,
        seed,
        {"per_device_eval_batch_size": 256, "eval_strategy": "epoch", "eval_on_start": True, **arguments},
        row_augmentation(MODELS, recipe.image_augmentation, name),
        **parts,
    )
    # What the steps print tells enough, unless one takes minutes.
    shown = {"eval_clean_accuracy": "clean", "eval_attack_success_rate": "ASR"}
    trainer.add_callback(progress_callback(trainer.recent_loss, shown, indent="  ", brief=True))
    return trainer


def results_table(results: dict[str, Any]) -> list[list[str]]:
    """The figures of the models as text, a row of headings first."""
    heads = ("clean accuracy", "attack success", "triggered accuracy", "placebos", "trigger distance", "seconds")
    rows = [["", *heads]]
    for name, figures in results.items():
        if name in MODELS:
            numbers = (f"{figures['trigger_distance']:.2f}", f"{figures['seconds']:.0f}")
            shares = (f"{figures[share]:.1%}" for share in (*SHARES, PLACEBO_METRICS[0]))
            rows.append([MODELS[name].title, *shares, *numbers])
    return rows


def _matching(record: RunRecord) -> list[dict[str, Any]]:
    """RoCLIP's epochs, from 1: whether it had matching steps, and what its log says of pairs and matches."""
    return [
        {
            "epoch": round(entry.epoch),
            "matching": "match_similarity" in entry.numbers,
            **{name: entry.numbers[name] for name in MATCHING_FIELDS if name in entry.numbers},
        }
        for entry in record.log
    ]


def _announcements(recipe: Recipe, pairs: int) -> dict[str, str]:
    """What is done for each model."""
    settings = {name: row_arguments(MODELS, recipe.arguments, name) for name in MODELS}
    epochs = {name: f"{settings[name]['num_train_epochs']} epochs" for name in MODELS}
    matching, safe = settings["roclip"], settings["safeclip"]
    # A matching epoch of RoCLIP's may be a few steps.
    length = pairs // matching["per_device_train_batch_size"]
    first = round(matching["matching_start_epoch"] * (matching["steps_per_matching_epoch"] or length) / length)
    return {
        "poisoned": f"Pre-train an undefended CLIP on them, {epochs['poisoned']}",
        "finetuned": f"Fine-tune it plainly on {pairs} clean pairs, {epochs['finetuned']}: the control",
        "cleanclip": f"Fine-tune it with CleanCLIP on the same pairs, {epochs['cleanclip']}",
        "augmentation": "Pre-train anew on the poisoned pairs with augmentation alone, "
        f"{epochs['augmentation']}: the control",
        "roclip": f"Pre-train anew with RoCLIP, the same augmentation, {epochs['roclip']}, matching from epoch "
        f"{first + 1} on",
        "safeclip": f"Pre-train anew with SafeCLIP, the same augmentation, {epochs['safeclip']}, "
        f"{safe['warmup_unimodal_epochs'] + safe['warmup_cross_epochs']} of them warm-up",
    }
