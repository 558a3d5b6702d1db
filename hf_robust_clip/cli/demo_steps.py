"""The steps of the demo: poison, pre-train, fine-tune twice, measure."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import CLIPModel, PrinterCallback

from .. import __version__
from ..attacks.poisoning import PoisonSpec, poison_dataset
from ..attacks.triggers import Trigger, trigger_from_name
from ..augment.images import ImageAugmentation
from ..data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_model, digit_processor, load_digit_pairs
from ..evaluation.attack_success import AttackSuccessEvaluator
from ..evaluation.embedding import Embedder
from ..evaluation.zero_shot import ZeroShotEvaluator, class_embeddings
from ..report import MODELS, Example, ModelEmbeddings, PoisonedPair
from ..trainers.arguments import CleanCLIPTrainingArguments, CLIPTrainingArguments
from ..trainers.base import CLIPTrainer, Evaluator
from ..trainers.cleanclip import CleanCLIPTrainer
from .demo import CLEAN_SEED_OFFSET, MANIFEST, REPORT, RESULTS, TARGET, TRIGGERS, Recipe
from .output import say, write_json
from .progress import TrainingBar

MEASURES = ("clean_accuracy", "attack_success_rate", "triggered_accuracy", "trigger_distance")
FOLLOWED = ("clean_accuracy", "attack_success_rate")
EVALUATION_BATCH = 256


def make_trigger(name: str, seed: int) -> Trigger:
    """The trigger of that name in the demo's settings, drawn under the seed where it is random."""
    drawn = {} if name == "sinusoid" else {"seed": seed}
    return trigger_from_name(name, **TRIGGERS[name], **drawn)


class Demo:
    """
    The demo's data and evaluators, and what its steps leave behind.

    Args:
        folder (`Path`): For the checkpoints and the manifest.
        seed (`int`): Of the data and of training.
        trigger ([`Trigger`]): The backdoor's.
        recipe ([`Recipe`]): The numbers.
    """

    def __init__(self, folder: Path, seed: int, trigger: Trigger, recipe: Recipe) -> None:
        self.folder, self.seed, self.trigger, self.recipe = folder, seed, trigger, recipe
        self.test = load_digit_pairs("test", seed=seed)
        self.is_target = np.asarray(self.test["label"]) == CLASS_NAMES.index(TARGET)  # (N,)
        self.processor = digit_processor()
        self.attack = AttackSuccessEvaluator(self.test, trigger, TARGET, CLASS_NAMES, CAPTION_TEMPLATES)
        self.evaluators: list[Evaluator] = [ZeroShotEvaluator(self.test, CLASS_NAMES, CAPTION_TEMPLATES), self.attack]
        self.manifest: dict[str, Any] = {}
        self.pairs: list[PoisonedPair] = []
        self.figures: dict[str, dict[str, float]] = {}
        self.curves: dict[str, list[dict[str, float]]] = {}
        self.embeddings: dict[str, ModelEmbeddings] = {}
        self.predictions: dict[str, list[str]] = {}

    def run(self) -> None:
        """All steps, one after the other."""
        recipe = self.recipe
        say("\n[1/4] Poison the training pairs")
        poisoned = self._poison()
        counts = self.manifest["counts"]
        say(
            f"  {counts['count']} of {counts['dataset_length']} pairs ({counts['rate']:.1%}) get the "
            f"{self.trigger.name} trigger and a caption that says {TARGET!r}"
        )
        say(f"  {len(self.test)} test images, {self.attack.attacked_images} of them no {TARGET!r}: those are attacked")
        say(f"\n[2/4] Pre-train an undefended CLIP on them, {recipe.pretrain_epochs} epochs")
        self._train("poisoned", digit_model(self.seed), poisoned)
        clean = load_digit_pairs("train", recipe.renderings, seed=self.seed + CLEAN_SEED_OFFSET)
        say(f"\n[3/4] Fine-tune it plainly on {len(clean)} clean pairs, {recipe.finetune_epochs} epochs: the control")
        self._train("finetuned", str(self.folder / "poisoned"), clean)
        say(f"\n[4/4] Fine-tune it with CleanCLIP on the same pairs, {recipe.finetune_epochs} epochs")
        self._train("cleanclip", str(self.folder / "poisoned"), clean)

    def _poison(self) -> Dataset:
        clean = load_digit_pairs("train", self.recipe.renderings, seed=self.seed)
        rate = self.recipe.poison_rate
        spec = PoisonSpec(self.trigger, TARGET, rate=rate, templates=CAPTION_TEMPLATES, seed=self.seed)
        poisoned, self.manifest = poison_dataset(clean, spec, label_column="label")
        # From here on the folder's files are this run's: none of an earlier one is to pass for it.
        for name in (RESULTS, REPORT):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / MANIFEST, self.manifest)
        for index in self.manifest["indices"][:4]:
            row = poisoned[index]
            self.pairs.append(PoisonedPair(row["image"], clean[index]["caption"], row["caption"]))
        return poisoned

    def _train(self, name: str, model: str | CLIPModel, pairs: Dataset) -> None:
        trainer = self._trainer(name, model, pairs)
        runtime = trainer.train().metrics["train_runtime"]
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        trained.save_pretrained(self.folder / name)
        self.processor.save_pretrained(self.folder / name)
        evaluations = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
        self.curves[name] = [
            {"epoch": entry["epoch"], **{measure: entry[f"eval_{measure}"] for measure in FOLLOWED}}
            for entry in evaluations
        ]
        self._measure(name, trained)
        figures = self.figures[name]
        # The evaluations are for the curves; the time of a method is that of its training.
        figures["seconds"] = runtime - sum(entry["eval_runtime"] for entry in evaluations)
        say(
            f"  clean accuracy {figures['clean_accuracy']:.1%}, attack success {figures['attack_success_rate']:.1%}, "
            f"{figures['seconds']:.0f} s of training"
        )

    def _trainer(self, name: str, model: str | CLIPModel, pairs: Dataset) -> CLIPTrainer:
        recipe, pretraining = self.recipe, name == "poisoned"
        settings: dict[str, Any] = {
            "output_dir": str(self.folder / name),
            "num_train_epochs": recipe.pretrain_epochs if pretraining else recipe.finetune_epochs,
            "learning_rate": recipe.pretrain_learning_rate if pretraining else recipe.finetune_learning_rate,
            "per_device_train_batch_size": recipe.batch_size,
            "per_device_eval_batch_size": EVALUATION_BATCH,
            "weight_decay": recipe.weight_decay,
            "adam_beta2": recipe.adam_beta2,
            "warmup_steps": recipe.warmup_steps,
            "lr_scheduler_type": "cosine",
            "eval_strategy": "epoch",
            "eval_on_start": True,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": self.seed,
        }
        shared: dict[str, Any] = {
            "model": model,
            "train_dataset": pairs,
            "processing_class": self.processor,
            "evaluators": self.evaluators,
            "callbacks": [
                TrainingBar("  training", {"eval_clean_accuracy": "clean", "eval_attack_success_rate": "ASR"})
            ],
        }
        if name == "cleanclip":
            args = CleanCLIPTrainingArguments(
                **settings, text_preset=recipe.text_preset, unimodal_weight=recipe.unimodal_weight
            )
            augmentation = ImageAugmentation(
                recipe.image_preset,
                flip=recipe.image_flip,
                noise=recipe.image_noise,
                noise_std=recipe.image_noise_std,
            )
            trainer: CLIPTrainer = CleanCLIPTrainer(args=args, image_augmentation=augmentation, **shared)
        else:
            trainer = CLIPTrainer(args=CLIPTrainingArguments(**settings), **shared)
        trainer.remove_callback(PrinterCallback)  # prints each log as a dictionary
        return trainer

    def _measure(self, name: str, model: CLIPModel) -> None:
        embedder = Embedder(model, self.processor, batch_size=EVALUATION_BATCH)
        figures: dict[str, float] = {}
        for evaluate in self.evaluators:
            figures.update(evaluate(model, self.processor, embedder))
        self.figures[name] = {measure: figures[measure] for measure in MEASURES}
        clean = embedder.embed_images(self.test)
        triggered = embedder.embed_images(self.test, trigger=self.trigger)
        self.embeddings[name] = ModelEmbeddings(clean.numpy(), triggered.numpy())
        classes = class_embeddings(embedder, CLASS_NAMES, CAPTION_TEMPLATES)
        self.predictions[name] = [CLASS_NAMES[i] for i in (triggered @ classes.T).argmax(dim=1).tolist()]

    def examples(self) -> list[Example]:
        """The first test image of each class but the target: not picked for what the models make of them."""
        labels = list(self.test["label"])
        examples = []
        for label, name in enumerate(CLASS_NAMES):
            if name != TARGET:
                row = labels.index(label)
                image = self.test[row]["image"]
                predictions = {model: self.predictions[model][row] for model in MODELS}
                examples.append(Example(name, image, self.trigger(image), predictions))
        return examples

    def results(self, quick: bool, seconds: float) -> dict[str, Any]:
        """What `results.json` holds; `seconds` is the time of the whole demo."""
        counts = self.manifest["counts"]
        packages = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
        setup = {
            "seed": self.seed,
            "trigger": self.trigger.to_dict(),
            "target": TARGET,
            "pairs": counts["dataset_length"],
            "poisons": counts["count"],
            "poison_rate": counts["rate"],
            "test_images": len(self.test),
            "attacked_images": self.attack.attacked_images,
            "recipe": asdict(self.recipe),
            "quick": quick,
            "versions": {"hf_robust_clip": __version__, **packages, "python": platform.python_version()},
            "seconds": seconds,
        }
        return {**{name: self.figures[name] for name in MODELS}, "setup": setup, "curves": self.curves}
