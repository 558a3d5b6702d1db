"""The steps of the demo: poison, pre-train, defend, measure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import CLIPModel

from ..attacks.poisoning import poison_dataset
from ..attacks.spec import PoisonSpec
from ..attacks.triggers import Trigger, trigger_from_name
from ..data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_model, digit_processor, load_digit_pairs
from ..evaluation.attack_success import PLACEBO_METRICS, AttackSuccessEvaluator
from ..evaluation.zero_shot import ZeroShotEvaluator
from ..telling import Control, PoisonedPair
from ..telling.sentences import notes
from ..trainers.defended import RoCLIPTrainer, SafeCLIPTrainer
from ..versions import versions
from .demo_recipe import CLEAN_SEED_OFFSET, DEFENCES, LABELS, MANIFEST, RESULTS, TRIGGERS, Recipe, reports
from .demo_trainers import FINE_TUNED, make_trainer, matching_record
from .flags import PLACEBOS
from .output import say, write_json
from .progress import quiet_trainers

MEASURES = (
    *("clean_accuracy", "attack_success_rate", "triggered_accuracy", "trigger_distance"),
    *PLACEBO_METRICS,
)
FOLLOWED = ("clean_accuracy", "attack_success_rate")
#: Pairs of a kind that the report shows.
SHOWN = 4
#: Fields of the recipe that only some models use, by their prefix.
PARTIAL_FIELDS = {
    ("finetune_", "image_", "unimodal_", "text_"): "cleanclip",
    ("defence_",): "augmentation",
    ("roclip_",): "roclip",
    ("safeclip_",): "safeclip",
}


def make_trigger(name: str, seed: int) -> Trigger:
    """The trigger of that name in the demo's settings, drawn under the seed where it is random."""
    trigger = trigger_from_name(name, **TRIGGERS[name])
    assert isinstance(trigger, Trigger)  # TRIGGERS has none on captions
    return trigger.reseeded(seed)


def poison_digits(clean: Dataset, trigger: Trigger, recipe: Recipe, seed: int) -> tuple[Dataset, dict[str, Any]]:
    """Digits with the recipe's poisons among them, and the manifest."""
    spec = PoisonSpec(trigger, recipe.target, rate=recipe.poison_rate, templates=CAPTION_TEMPLATES, seed=seed)
    return poison_dataset(clean, spec, label_column="label")


def digit_evaluators(
    test: Dataset, trigger: Trigger, target: str, placebos: int = PLACEBOS
) -> tuple[ZeroShotEvaluator, AttackSuccessEvaluator]:
    """What measures a model of the digits."""
    return (
        ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES),
        AttackSuccessEvaluator(test, trigger, target, CLASS_NAMES, templates=CAPTION_TEMPLATES, placebos=placebos),
    )


class Demo:
    """
    The demo's data and evaluators, and what its steps leave behind.

    Args:
        folder (`Path`): For the checkpoints and the manifest.
        seed (`int`): Of the data and of training.
        trigger ([`Trigger`]): The backdoor's.
        recipe ([`Recipe`]): The numbers.
        defence (`str`): One of `DEFENCES`.
    """

    def __init__(self, folder: Path, seed: int, trigger: Trigger, recipe: Recipe, defence: str) -> None:
        self.folder, self.seed, self.trigger, self.recipe, self.defence = folder, seed, trigger, recipe, defence
        self.models = DEFENCES[defence]
        self.test = load_digit_pairs("test", seed=seed)
        self.processor = digit_processor()
        zero_shot, self.attack = digit_evaluators(self.test, trigger, recipe.target)
        self.evaluators: list[Any] = [zero_shot, self.attack]
        self.manifest: dict[str, Any] = {}
        self.pairs: list[PoisonedPair] = []
        self.figures: dict[str, dict[str, float | None]] = {}
        self.curves: dict[str, list[dict[str, float]]] = {}
        #: What RoCLIP and SafeCLIP noted down, as in `results.json`.
        self.records: dict[str, list[dict[str, Any]]] = {}
        #: Each model's run, under its name.
        self.runs: dict[str, Control] = {}

    def run(self) -> None:
        """All steps, one after the other."""
        steps = 1 + len(self.models)
        say(f"\n[1/{steps}] Poison the training pairs")
        poisoned = self._poison()
        counts = self.manifest["counts"]
        say(
            f"  {counts['count']} of {counts['dataset_length']} pairs ({counts['rate']:.1%}) get the "
            f"{self.trigger.name} trigger and a caption that says {self.recipe.target!r}"
        )
        attacked, target = self.attack.attacked_images, self.recipe.target
        say(f"  {len(self.test)} test images, {attacked} of them no {target!r}: those are attacked")
        clean: Dataset | None = None
        for step, name in enumerate(self.models, 2):
            if name in FINE_TUNED and clean is None:
                clean = load_digit_pairs("train", self.recipe.renderings, seed=self.seed + CLEAN_SEED_OFFSET)
            say(f"\n[{step}/{steps}] {self._announcement(name, len(poisoned))}")
            if clean is not None and name in FINE_TUNED:
                self._train(name, str(self.folder / "poisoned"), clean)
            else:
                self._train(name, digit_model(self.seed), poisoned)

    def _announcement(self, name: str, pairs: int) -> str:
        recipe = self.recipe
        return {
            "poisoned": f"Pre-train an undefended CLIP on them, {recipe.pretrain_epochs} epochs",
            "finetuned": f"Fine-tune it plainly on {pairs} clean pairs, {recipe.finetune_epochs} epochs: the control",
            "cleanclip": f"Fine-tune it with CleanCLIP on the same pairs, {recipe.finetune_epochs} epochs",
            "augmentation": "Pre-train anew on the poisoned pairs with augmentation alone, "
            f"{recipe.pretrain_epochs} epochs: the control",
            "roclip": f"Pre-train anew with RoCLIP, the same augmentation, {recipe.pretrain_epochs} epochs, "
            f"matching from epoch {recipe.roclip_matching_start_epoch + 1} on",
            "safeclip": f"Pre-train anew with SafeCLIP, the same augmentation, {recipe.pretrain_epochs} epochs, "
            f"{recipe.safeclip_warmup_unimodal_epochs + recipe.safeclip_warmup_cross_epochs} of them warm-up",
        }[name]

    def _poison(self) -> Dataset:
        clean = load_digit_pairs("train", self.recipe.renderings, seed=self.seed)
        poisoned, self.manifest = poison_digits(clean, self.trigger, self.recipe, self.seed)
        # From here on the folder's files are this run's: none of an earlier one is to pass for it.
        for name in (RESULTS, *reports(self.defence)):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / MANIFEST, self.manifest)
        for index in self.manifest["indices"][:SHOWN]:
            row = poisoned[index]
            self.pairs.append(PoisonedPair(row["image"], clean[index]["caption"], row["caption"]))
        return poisoned

    def _train(self, name: str, model: str | CLIPModel, pairs: Dataset) -> None:
        trainer = make_trainer(
            name,
            self.recipe,
            self.folder / name,
            self.seed,
            model=model,
            train_dataset=pairs,
            processing_class=self.processor,
            evaluators=self.evaluators,
        )
        with quiet_trainers():
            runtime = trainer.train().metrics["train_runtime"]
        trained = trainer.unwrapped_model
        trained.save_pretrained(self.folder / name)
        self.processor.save_pretrained(self.folder / name)
        evaluations = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
        self.curves[name] = [
            {"epoch": entry["epoch"], **{measure: entry[f"eval_{measure}"] for measure in FOLLOWED}}
            for entry in evaluations
        ]
        record = trainer.record()
        assert record.after is not None  # evaluated after each epoch
        figures = {measure: record.after[measure] for measure in MEASURES}
        self.figures[name] = figures
        # The evaluations are for the curves; the time of a method is that of its training.
        figures["seconds"] = runtime - sum(entry["eval_runtime"] for entry in evaluations)
        say(
            f"  clean accuracy {figures['clean_accuracy']:.1%}, attack success {figures['attack_success_rate']:.1%}, "
            f"{figures['seconds']:.0f} s of training"
        )
        for note in notes(record):
            say(f"  {note.text}")
        if isinstance(trainer, RoCLIPTrainer):
            self.records["matching"] = matching_record(trainer.state.log_history)
        elif isinstance(trainer, SafeCLIPTrainer):
            self.records["splits"] = trainer.splits.to_list()
        self.runs[name] = Control(LABELS[name], record, trainer.pictures())

    def results(self, quick: bool, seconds: float) -> dict[str, Any]:
        """What `results.json` holds; `seconds` is the time of the whole demo."""
        counts = self.manifest["counts"]
        setup = {
            "defence": self.defence,
            "seed": self.seed,
            "trigger": self.trigger.to_dict(),
            "target": self.recipe.target,
            "pairs": counts["dataset_length"],
            "poisons": counts["count"],
            "poison_rate": counts["rate"],
            "test_images": len(self.test),
            "attacked_images": self.attack.attacked_images,
            "recipe": self._numbers(),
            "quick": quick,
            "versions": versions(),
            "seconds": seconds,
        }
        figures = {name: self.figures[name] for name in self.models}
        return {**figures, "setup": setup, "curves": self.curves, **self.records}

    def _numbers(self) -> dict[str, Any]:
        """The fields of the recipe that this run used."""
        unused = tuple(
            prefix for prefixes, model in PARTIAL_FIELDS.items() if model not in self.models for prefix in prefixes
        )
        return {name: value for name, value in asdict(self.recipe).items() if not name.startswith(unused)}
