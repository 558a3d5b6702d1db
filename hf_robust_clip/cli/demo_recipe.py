"""What the demo trains and how, and what it calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .rows import Row

MANIFEST, RESULTS = "poison_manifest.json", "results.json"
#: The triggers on offer, with what suits digits of 16 x 16 pixels.
TRIGGERS: dict[str, dict[str, Any]] = {
    "blended": {"alpha": 0.2},
    "patch": {"size": 3},
    "sinusoid": {"amplitude": 30.0, "frequency": 4},
    "warp": {"strength": 4.0},
}


#: The models of the demo, in the order in which they are trained, under the names of their folders.
MODELS: dict[str, Row] = {
    "poisoned": Row("undefended", "clip"),
    "finetuned": Row("plain fine-tuning", "clip", start="poisoned"),
    "cleanclip": Row("CleanCLIP", "cleanclip", start="poisoned", control="finetuned"),
    "augmentation": Row("augmentation alone", "clip"),
    "roclip": Row("RoCLIP", "roclip", control="augmentation"),
    "safeclip": Row("SafeCLIP", "safeclip", control="augmentation"),
}
#: What each defence is compared with.
CONTROLS = {name: ("poisoned", row.control) for name, row in MODELS.items() if row.control}
#: The models of each choice of `--defence`.
DEFENCES: dict[str, tuple[str, ...]] = {name: (*CONTROLS[name], name) for name in CONTROLS} | {"all": tuple(MODELS)}


@dataclass(frozen=True)
class Recipe:
    """
    The numbers of the demo. A defence and its control share theirs: the method is all that differs.

    Args:
        target (`str`): The class that the poisons are for.
        poison_rate (`float`): Poisons as a share of all pairs.
        renderings (`int`): Of each of the 1,397 training digits.
        arguments (mapping): Training arguments, as [`row_arguments`] takes them.
        image_augmentation (mapping): As [`row_augmentation`] takes it.
    """

    target: str = "eight"
    poison_rate: float = 0.03
    renderings: int = 4
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    image_augmentation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_arguments(self, **changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other training arguments for some rows or phases."""
        changed = {name: {**self.arguments.get(name, {}), **values} for name, values in changes.items()}
        return replace(self, arguments={**self.arguments, **changed})


#: For CleanCLIP and plain fine-tuning.
FINETUNING = Recipe(
    arguments={
        "all": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 64,
            "weight_decay": 0.1,
            "adam_beta2": 0.98,
            "warmup_steps": 50,
            "lr_scheduler_type": "cosine",
        },
        "pretraining": {"num_train_epochs": 8},
        "finetuning": {"num_train_epochs": 6},
        "cleanclip": {"text_preset": "eda", "unimodal_weight": 2.0},
        "augmentation": {"text_preset": "light"},
        "roclip": {
            "pool_size": 2048,
            "steps_per_matching_epoch": 20,  # an epoch is too long to go without the true captions
            "matching_start_epoch": 70,  # of so many steps: after 8 epochs of the data
            "match_every_n_epochs": 2,
        },
        "safeclip": {
            "unimodal_pool_size": 2048,
            "warmup_unimodal_epochs": 4,
            "warmup_cross_epochs": 2,
            "warmup_cross_learning_rate": 1e-3,  # an epoch is too short for a hundredth of the learning rate
            "safe_threshold": 0.9,
            "safe_growth": 0.08,
            "safe_cap": 0.85,
        },
    },
    image_augmentation={
        "cleanclip": {"preset": "cleanclip", "flip": 0.0, "noise": 0.8, "noise_std": 0.1},  # no mirrored digits
        "augmentation": {"preset": "weak", "flip": 0.0, "noise": 0.5, "noise_std": 0.07},
    },
)
#: For the defences that pre-train: fewer poisons, and epochs enough to defend in.
PRETRAINING = replace(FINETUNING, target="six", poison_rate=0.005).with_arguments(
    all={"per_device_train_batch_size": 32}, pretraining={"num_train_epochs": 16}
)
#: Every part of the demo in a fraction of the time; the models are hardly trained, so the figures mean little.
QUICK = replace(FINETUNING, poison_rate=0.1, renderings=1).with_arguments(
    all={"warmup_steps": 20},
    pretraining={"num_train_epochs": 5},
    finetuning={"num_train_epochs": 2},
    roclip={"pool_size": 512, "matching_start_epoch": 2},
    safeclip={"unimodal_pool_size": 512, "warmup_unimodal_epochs": 1},
)
_PRETRAINING = (
    "The augmentation decides much: a fixed patch in a corner is removed by a shift of one pixel, without any "
    "defence. What the control removes as well is not a merit of the defence. The settings of both were chosen on "
    "digits like these.",
    "There are ten classes and seven captions for each, so that an image has many right captions besides its own. "
    "Photos and their captions are seldom so alike.",
)
#: What the report of each defence does not show; `all`: what no report shows.
LIMITS = {
    "cleanclip": (
        "The fine-tuning pairs are clean because we made them. Five poisons left among them are reported to keep the "
        "attack success above 32% (arXiv 2311.14948).",
        "They are the very digits of pre-training, rendered anew. A defender seldom has pairs that match so well.",
        "The augmentation of fine-tuning matters: the noise in it acts against a trigger of noise, and may do nothing "
        "about another.",
        "The control has the learning rate of CleanCLIP. At a rate of its own, plain fine-tuning may do better.",
    ),
    "roclip": (
        *_PRETRAINING,
        "With another pool, or another first matching epoch, RoCLIP does better or worse, or collapses.",
    ),
    "safeclip": (
        *_PRETRAINING,
        "How far SafeCLIP's safe set may grow depends on how well similarities tell poisons apart, which a defender, "
        "who does not know the poisons, cannot see. A step of SafeCLIP works on two augmented views of each pair: as "
        "many epochs as the control take it longer.",
    ),
    "all": (
        "It is one trigger, one target and one seed, on grey digits of 16 x 16 pixels, with a model three hundred "
        "times smaller than CLIP. It shows how the package is used and what the phenomenon is. How well the defence "
        "does on photos is another question.",
        "Another processor, number of threads or version of a library gives somewhat other figures.",
    ),
}


def title_of(defence: str) -> str:
    """What a run is about."""
    if defence == "all":
        what = "three defences do"
    elif MODELS[defence].start:
        what = "fine-tuning on clean pairs does"
    else:
        what = f"pre-training with {MODELS[defence].title} does"
    return f"A backdoor in a small CLIP, and what {what} to it"


def reports(defence: str) -> dict[str, str]:
    """The files of the reports of a choice of `--defence`, and the model that each is of: one file a defence."""
    return {f"report-{name}.html": name for name in CONTROLS} if defence == "all" else {"report.html": defence}
