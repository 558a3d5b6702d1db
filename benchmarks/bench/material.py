"""What a study is made of: pairs, clean pairs, photos to measure on, and a model to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from hf_robust_clip.cli.rows import CLEAN_SEED_OFFSET
from hf_robust_clip.data import digits
from hf_robust_clip.data.loading import label_by_captions, load_pairs
from hf_robust_clip.data.scratch import build_model, build_processor
from hf_robust_clip.evaluation.zero_shot import DEFAULT_TEMPLATES
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.seeding import derive_seed

from .study import DIGITS, Study

#: The cells of a seed share their digits.
_digits = lru_cache(maxsize=8)(digits.load_digit_pairs)


@dataclass(frozen=True)
class Material:
    """
    Args:
        pairs (`Dataset`): To be poisoned.
        clean (`Dataset`, *optional*): For fine-tuning; `None`: the pairs that were not poisoned.
        later (`Dataset`, *optional*): Other clean pairs, on which a cleaned model is fine-tuned further.
        labelled (`Dataset`): Photos with a class, for zero-shot classification.
        captioned (`Dataset`): Photos with captions, for retrieval.
        names (`list[str]`): The classes.
        prompts (`list[str]`): Of zero-shot classification.
        label_column (`str`, *optional*): Of `pairs`, where they have labels.
        templates (`list[str]`, *optional*): Of the captions of `pairs`, where they are made from such; an attacker
            writes captions like those that there are.
    """

    pairs: Dataset
    clean: Dataset | None
    later: Dataset | None
    labelled: Dataset
    captioned: Dataset
    names: list[str]
    prompts: list[str]
    label_column: str | None
    templates: list[str] | None


def load_material(study: Study, data: Path | None, seed: int) -> Material:
    """
    The study's datasets. Photos are the same under every seed; digits are rendered, and captions drawn, under it.

    Raises:
        `ValueError`: If the study needs files and `data` is not a folder that has them.
    """
    if study.source == DIGITS:
        pairs = _digits("train", study.renderings, seed)
        clean = _digits("train", study.renderings, seed + CLEAN_SEED_OFFSET)
        later = _digits("train", study.renderings, seed + 2 * CLEAN_SEED_OFFSET)
        test = _digits("test", seed=seed)
        prompts = list(study.prompts or digits.CAPTION_TEMPLATES)
        names, templates = list(digits.CLASS_NAMES), list(digits.CAPTION_TEMPLATES)
        return Material(pairs, clean, later, test, test, names, prompts, "label", templates)
    assert isinstance(study.source, Mapping)
    if data is None:
        raise ValueError(f"--data is missing: the study {study.name!r} needs the folder with {study.source['train']}")
    paths = {split: data / name for split, name in study.source.items()}
    for path in paths.values():
        if not path.is_file():
            raise ValueError(f"--data {str(data)!r} has no {path.name}; the study {study.name!r} needs it")
    pairs, test = (load_pairs(str(paths[split]), image_column=study.image_column) for split in ("train", "test"))
    prompts = list(study.prompts or DEFAULT_TEMPLATES)
    if isinstance(study.classes, Mapping):
        labelled = label_by_captions(test, study.classes, study.caption_column, label_column=study.label_column)
        return Material(pairs, None, None, labelled, test, list(study.classes), prompts, None, None)
    names = list(study.classes or pairs.features[study.label_column].names)
    after = study.train_per_class
    later = _of_classes(pairs, names, study, after, 2 * after) if after else None
    pairs = _of_classes(pairs, names, study, 0, after)
    test = _of_classes(test, names, study, 0, study.test_per_class)
    templates = list(study.captions) if study.captions else None
    if study.captions:
        pairs, test = (_with_captions(dataset, names, study, seed) for dataset in (pairs, test))
        later = _with_captions(later, names, study, seed) if later is not None else None
    return Material(pairs, None, later, test, test, names, prompts, study.label_column, templates)


def start_model(study: Study, material: Material, seed: int) -> tuple[Any, Any]:
    """The model that pre-training starts from, and its processor."""
    settings = dict(study.model)
    if "id" in settings:
        return load_dual_encoder(settings["id"]), load_processor(settings["id"], None)
    size, merges = settings.pop("image_size", 32), settings.pop("merges", 2000)
    if study.source == DIGITS:
        processor = digits.digit_processor()
    else:
        captions = [[entry] if isinstance(entry, str) else entry for entry in material.pairs[study.caption_column]]
        processor = build_processor([text for entry in captions for text in entry], image_size=size, merges=merges)
    return build_model(processor, **settings, seed=seed), processor


def _of_classes(dataset: Dataset, names: list[str], study: Study, first: int, end: int | None) -> Dataset:
    """The photos from `first` to `end` of each of the classes, in order, labelled by the place of it in `names`."""
    feature = dataset.features[study.label_column]
    if not isinstance(feature, ClassLabel) or not set(names) <= set(feature.names):
        raise ValueError(
            f"classes={names}: column {study.label_column!r} is {feature}, which does not have all of them"
        )
    labels = np.asarray(dataset[study.label_column])
    rows = np.sort(np.concatenate([np.flatnonzero(labels == feature.str2int(name))[first:end] for name in names]))
    new = [names.index(feature.int2str(int(label))) for label in labels[rows]]
    chosen = dataset.select(rows).remove_columns(study.label_column)
    label: Any = ClassLabel(names=names)
    return chosen.add_column(study.label_column, new, feature=label)


def _with_captions(dataset: Dataset, names: list[str], study: Study, seed: int) -> Dataset:
    """A caption for each photo, from the study's templates."""
    assert study.captions is not None
    rng = np.random.default_rng(derive_seed(seed, len(dataset)))
    drawn = rng.integers(len(study.captions), size=len(dataset))
    texts = [
        study.captions[template].replace("{}", names[label])
        for template, label in zip(drawn, dataset[study.label_column], strict=True)
    ]
    return dataset.add_column(study.caption_column, texts)
