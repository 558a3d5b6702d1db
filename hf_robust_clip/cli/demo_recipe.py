"""What the demo trains and how, and what it calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Every number of the demo. A defence and its control share theirs: the method is all that differs."""

    renderings: int = 4  # of each of the 1,397 training digits
    target: str = "eight"
    poison_rate: float = 0.03
    batch_size: int = 64
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    warmup_steps: int = 50
    pretrain_epochs: int = 8
    pretrain_learning_rate: float = 1e-3
    # CleanCLIP and plain fine-tuning
    finetune_epochs: int = 6
    finetune_learning_rate: float = 1e-3
    image_preset: str = "cleanclip"
    image_flip: float = 0.0  # a mirrored digit is another figure
    image_noise: float = 0.8
    image_noise_std: float = 0.1
    unimodal_weight: float = 2.0
    text_preset: str = "eda"
    # RoCLIP, SafeCLIP and augmentation alone
    defence_image_preset: str = "weak"
    defence_image_flip: float = 0.0
    defence_image_noise: float = 0.5
    defence_image_noise_std: float = 0.07
    defence_text_preset: str = "light"
    roclip_pool_size: int = 2048
    roclip_matching_start_epoch: int = 8
    roclip_matching_steps: int | None = 20  # at a time: an epoch is too long to go without the true captions
    roclip_match_every_n_epochs: int = 2
    roclip_matching: str = "image_to_text"
    safeclip_warmup_unimodal_epochs: int = 4
    safeclip_warmup_cross_epochs: int = 2
    safeclip_warmup_cross_learning_rate: float = 1e-3  # an epoch is too short for a hundredth of the learning rate
    safeclip_threshold: float = 0.9
    safeclip_growth: float = 0.08
    safeclip_cap: float = 0.85
    safeclip_pool_size: int = 2048


#: For the defences that pre-train: fewer poisons, and epochs enough to defend in.
PRETRAINING = Recipe(target="six", poison_rate=0.005, batch_size=32, pretrain_epochs=16)

#: Every part of the demo in a fraction of the time; the models are hardly trained, so the figures mean little.
QUICK = Recipe(
    renderings=1,
    pretrain_epochs=5,
    finetune_epochs=2,
    poison_rate=0.1,
    warmup_steps=20,
    roclip_pool_size=512,
    roclip_matching_start_epoch=2,
    safeclip_warmup_unimodal_epochs=1,
    safeclip_pool_size=512,
)

#: The models that each defence is told by, in the order in which they are trained.
DEFENCES: dict[str, tuple[str, ...]] = {
    "cleanclip": ("poisoned", "finetuned", "cleanclip"),
    "roclip": ("poisoned", "augmentation", "roclip"),
    "safeclip": ("poisoned", "augmentation", "safeclip"),
    "all": ("poisoned", "finetuned", "cleanclip", "augmentation", "roclip", "safeclip"),
}

#: The models, as tables and reports call them.
LABELS = {
    "poisoned": "undefended",
    "finetuned": "plain fine-tuning",
    "cleanclip": "CleanCLIP",
    "augmentation": "augmentation alone",
    "roclip": "RoCLIP",
    "safeclip": "SafeCLIP",
}
#: What each defence is compared with.
CONTROLS = {
    "cleanclip": ("poisoned", "finetuned"),
    "roclip": ("poisoned", "augmentation"),
    "safeclip": ("poisoned", "augmentation"),
}

#: The triggers on offer, with what suits digits of 16 x 16 pixels.
TRIGGERS: dict[str, dict[str, Any]] = {
    "blended": {"alpha": 0.2},
    "patch": {"size": 3},
    "sinusoid": {"amplitude": 30.0, "frequency": 4},
    "warp": {"strength": 4.0},
}
#: The clean pairs are rendered under another seed than the poisoned ones: new places, noise and captions.
CLEAN_SEED_OFFSET = 1000
MANIFEST, RESULTS = "poison_manifest.json", "results.json"


def default_recipe(defence: str, quick: bool = False) -> Recipe:
    """The numbers that a run takes unless it is given others."""
    if quick:
        return QUICK
    return Recipe() if defence == "cleanclip" else PRETRAINING


def title_of(defence: str) -> str:
    """What a run is about."""
    how = (
        "fine-tuning on clean pairs does"
        if defence == "cleanclip"
        else f"pre-training with {LABELS.get(defence)} does"
    )
    return f"A backdoor in a small CLIP, and what {'three defences do' if defence == 'all' else how} to it"


def reports(defence: str) -> dict[str, str]:
    """The names of the reports of a choice of `--defence`, and what each is of: one file a defence."""
    if defence == "all":
        return {f"report-{name}.html": name for name in CONTROLS}
    return {"report.html": defence}
