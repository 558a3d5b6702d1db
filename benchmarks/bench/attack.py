"""An attack of a study: the poisons that it plants, and what tells whether it succeeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    LinearProbeEvaluator,
    PoisonSpec,
    PoisonSuccessEvaluator,
    RetrievalEvaluator,
    TextQueryEvaluator,
    ZeroShotEvaluator,
    poison_dataset,
)
from hf_robust_clip.attacks.spec import targeted_specs
from hf_robust_clip.attacks.triggers import trigger_from_dict
from hf_robust_clip.cli.flags import PLACEBOS
from hf_robust_clip.data.loading import label_by_captions

from .material import Material
from .study import Study

#: The figure that says how far an attack got, by its mode.
SUCCESS = {
    "backdoor": "attack_success_rate",
    "label_consistent": "attack_success_rate",
    "targeted": "poison_success_rate",
    "text_query": "triggered_hit_rate_at_1",
}


@dataclass(frozen=True)
class Planted:
    """
    Args:
        pairs (`Dataset`): With the poisons, marked in the column `poisoned`.
        evaluators (`list`): What is measured, in turn.
        counts (`dict[str, int]`): Sample counts for the table.
        success (`str`): The figure that says how far the attack got.
    """

    pairs: Dataset
    evaluators: list[Any]
    counts: dict[str, int]
    success: str


def plant(study: Study, attack: Mapping[str, Any], material: Material, image_size: int, seed: int) -> Planted:
    """
    Poison the pairs of a study, and make its evaluators. An attack of `parts` plants one after the other, each with
    its `share` of the `rate`; success is that of the first. A `word` is what captions call the target, in place of
    its name.
    """
    if "parts" in attack:
        planted = []
        for part in attack["parts"]:
            one = {name: value for name, value in part.items() if name != "share"}
            one["rate"] = attack["rate"] * part["share"]
            planted.append(plant(study, one, material, image_size, seed))
            material = replace(material, pairs=planted[-1].pairs)
        counts = {**planted[0].counts, "poisons": int(sum(material.pairs["poisoned"]))}
        return replace(planted[0], pairs=material.pairs, counts=counts)
    settings = dict(attack)
    mode = settings.pop("mode", "backdoor")
    target = settings.pop("target", study.target)
    word = settings.pop("word", None)
    trigger = trigger_from_dict(settings.pop("trigger")) if "trigger" in settings else None
    if trigger is not None:
        trigger = trigger.reseeded(seed)
    columns = {"image_column": study.image_column, "caption_column": study.caption_column}
    labelled, names, prompts = material.labelled, material.names, {"templates": material.prompts}
    evaluators: list[Any] = []
    chosen: list[int] = []
    if mode == "targeted":
        images, captions = int(settings.pop("images")), int(settings.pop("captions"))
        chosen, adversarial = _targets(material, images, study.label_column, seed)
        photos = [labelled[row][study.image_column] for row in chosen]
        specs: Any = targeted_specs(photos, adversarial, captions, seed=seed, image_size=image_size, **settings)
        few = labelled.select(chosen)
        evaluators.append(PoisonSuccessEvaluator(few, adversarial, names, **prompts, image_column=study.image_column))
        labelled = labelled.select(np.setdiff1d(np.arange(len(labelled)), chosen))
    else:
        size = None if mode == "text_query" else image_size
        if mode == "backdoor" and material.templates is not None:
            settings.setdefault("templates", material.templates)
        specs = PoisonSpec(trigger, word or target, seed=seed, mode=mode, image_size=size, **settings)
    label_column = None if word else material.label_column
    pairs, _ = poison_dataset(material.pairs, specs, **columns, label_column=label_column)
    labels = {"image_column": study.image_column, "label_column": study.label_column}
    evaluators.append(ZeroShotEvaluator(labelled, names, **prompts, **labels))
    counts = {"pairs": len(material.pairs), "poisons": int(sum(pairs["poisoned"])), "test_images": len(labelled)}
    on_images = trigger if SUCCESS[mode] == "attack_success_rate" else None
    if on_images is not None:
        evaluator = AttackSuccessEvaluator(labelled, on_images, target, names, **prompts, **labels, placebos=PLACEBOS)
        evaluators.append(evaluator)
        counts["attacked"] = evaluator.attacked_images
    elif mode == "text_query":
        queries = TextQueryEvaluator(material.captioned, trigger, target, **columns)
        evaluators.append(queries)
        counts["attacked"] = queries.attacked_queries
    else:
        counts["attacked"] = len(chosen)
    aimed = {"trigger": on_images, "target": target} if on_images is not None else {}
    if "linear_probe" in study.measures:
        probed = _probe_images(study, material)
        evaluators.append(LinearProbeEvaluator(probed, labelled, material.names, **aimed, **labels))
    if "retrieval" in study.measures:
        evaluators.append(RetrievalEvaluator(material.captioned, **columns, **aimed))
    return Planted(pairs, evaluators, counts, SUCCESS[mode])


def _targets(material: Material, count: int, label_column: str, seed: int) -> tuple[list[int], list[str]]:
    """Photos to be misread, and the class for each that it is not of."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(material.labelled))[:count].tolist()
    adversarial = []
    for row in chosen:
        others = [name for i, name in enumerate(material.names) if i != material.labelled[row][label_column]]
        adversarial.append(others[rng.integers(len(others))])
    return chosen, adversarial


def _probe_images(study: Study, material: Material) -> Dataset:
    """Labelled training photos, without poisons: a probe is fitted by whoever uses the model."""
    if material.label_column is not None:
        return material.clean if material.clean is not None else material.pairs
    assert isinstance(study.classes, Mapping)
    return label_by_captions(material.pairs, study.classes, study.caption_column, label_column=study.label_column)
