"""From flags to data, models and evaluators, with errors that name the flag."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets.exceptions import DatasetsError
from transformers.utils import logging

from ..attacks.found import FoundTrigger, load_found
from ..attacks.triggers import TextTrigger, Trigger, trigger_from_name
from ..data.loading import encode_labels, label_by_captions, load_pairs, stream_pairs
from ..data.tables import text_of
from ..evaluation.attack_success import AttackSuccessEvaluator
from ..evaluation.zero_shot import DEFAULT_TEMPLATES, ZeroShotEvaluator
from ..models import check_processor, load_dual_encoder, load_processor
from ..wording import listed, shortened, shown
from .flags import FOUND, parse_trigger, value_of
from .output import UsageError, usage_errors

logger = logging.get_logger(__name__)


class Labelled(NamedTuple):
    """Images to measure on: the dataset, the names of its classes, and its columns with the image and the class."""

    dataset: datasets.Dataset
    class_names: list[str]
    image_column: str
    label_column: str


def load_data(flag: str, source: str, split: str, image_column: str, streaming: bool = False) -> Any:
    """
    [`~data.loading.load_pairs`], or [`~data.loading.stream_pairs`], for the source that a flag names.

    Raises:
        `UsageError`: If it is not what can be read so.
        `OSError`: If the Hub does not have it, or cannot be reached.
    """
    try:
        return (stream_pairs if streaming else load_pairs)(source, split, image_column)
    except (ValueError, DatasetsError) as error:
        # Ours says what is wrong with which file; of one of `datasets` that stands in the cause.
        reason = error if isinstance(error, ValueError) else error.__cause__ or error
        if isinstance(error, ValueError) or Path(source).exists():
            raise UsageError(f"{flag}: {shown(source)} cannot be used: {shortened(str(reason), 400)}") from error
        raise OSError(f"{flag}: {shown(source)} cannot be loaded: {shortened(str(reason), 400)}") from error


def load_model(flag: str, name: str) -> tuple[Any, Any]:
    """
    The dual encoder that a flag names by folder or Hub id, adapters put on their model, and its processor.

    Raises:
        `UsageError`: If it is not a dual encoder with a processor.
        `OSError`: If the Hub does not have it, or cannot be reached.
    """
    try:
        with usage_errors(flag):
            model, processor = load_dual_encoder(name), load_processor(name, None)
            check_processor(processor, "the processor")
    except OSError as error:
        if Path(name).exists():
            raise UsageError(f"{flag}: {shown(name)} cannot be loaded: {error}") from error
        raise
    return model, processor


def device_of(name: str | None) -> torch.device:
    """The device that `--device` names; by default an accelerator, if there is one."""
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(shortened(f"--device: {shown(name)} cannot be used: {error}")) from error
    return device


def load_labelled(args: argparse.Namespace, data: str, split: str, image_column: str) -> Labelled | None:
    """The images of `--data` and the flags beside it, in a column; `None` where it is not given."""
    source = value_of(args, data)
    if source is None:
        return None
    dataset = relabelled(args, load_data(data, source, value_of(args, split), image_column))
    if args.label_column not in dataset.column_names:
        raise UsageError(
            f"--label-column: {shown(args.label_column)} is not a column of {shown(source)}; its columns are "
            f"{listed(dataset.column_names)}"
        )
    are_text = not isinstance(dataset.features[args.label_column], datasets.ClassLabel)
    dataset = encode_labels(dataset, args.label_column)
    feature = dataset.features[args.label_column]
    if not isinstance(feature, datasets.ClassLabel):
        raise UsageError(
            f"--label-column: {shown(args.label_column)} of {shown(source)} is {shown(feature)}; accepted are a "
            "ClassLabel and names of classes (string). Or give --classes"
        )
    if are_text and all(name.isdecimal() for name in feature.names):
        logger.warning(
            f"{data}: the classes of {shown(args.label_column)} are called {listed(feature.names)}, and prompts have "
            "these names in them; write the names of what is seen where these are numbers of classes"
        )
    return Labelled(dataset, list(feature.names), image_column, args.label_column)


def relabelled(args: argparse.Namespace, dataset: Any) -> Any:
    """The images with the classes that `--classes` reads off their captions; as they are without it."""
    if args.classes is None:
        return dataset
    words = _read_classes(args.classes)
    with usage_errors("--classes"):
        return label_by_captions(dataset, words, args.caption_column, label_column=args.label_column)


def make_trigger(text: str) -> Trigger | TextTrigger:
    """The trigger that a flag was given; `ValueError` where its fields, or its folder, do not make one."""
    name, fields = parse_trigger(text)
    return load_found(**fields) if name == FOUND else trigger_from_name(name, **fields)


def target_of(trigger: Trigger, target: str | None) -> str:
    """The class that a trigger is for: that of `--target` or, without one, its own."""
    if target is None:
        assert isinstance(trigger, FoundTrigger)  # check_measuring lets no others pass
        return trigger.target
    return target


def make_triggers(texts: Sequence[str] | None, flag: str = "--trigger") -> list[Trigger]:
    """The triggers on images that a flag was given."""
    triggers = []
    for text in texts or ():
        with usage_errors(flag):
            trigger = make_trigger(text)
        if not isinstance(trigger, Trigger):
            raise UsageError(f"{flag}: {shown(text)} goes on captions; accepted is a trigger on images")
        triggers.append(trigger)
    return triggers


def make_evaluators(args: argparse.Namespace, labelled: Labelled) -> list[Any]:
    """Zero-shot accuracy, and the success of each `--trigger` and of its placebos under its own prefix."""
    data, names, image_column, label_column = labelled
    how: dict[str, Any] = {
        "templates": args.template or DEFAULT_TEMPLATES,
        "image_column": image_column,
        "label_column": label_column,
    }
    triggers = make_triggers(args.trigger)
    with usage_errors("--label-column" if not triggers else "--trigger" if args.target is None else "--target"):
        evaluators: list[Any] = [ZeroShotEvaluator(data, names, **how)]
        for trigger, prefix in zip(triggers, prefixes(triggers), strict=True):
            beside: dict[str, Any] = {"prefix": prefix, "placebos": args.placebos}
            target = target_of(trigger, args.target)
            evaluators.append(AttackSuccessEvaluator(data, trigger, target, names, **how, **beside))
    return evaluators


def prefixes(triggers: Sequence[Trigger]) -> list[str]:
    """What the figures of each trigger start with: its name, and from the second of a name on its number."""
    names = [trigger.name for trigger in triggers]
    numbers = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [f"{name}_" if number == 1 else f"{name}_{number}_" for name, number in zip(names, numbers, strict=True)]


def _read_classes(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(text_of(str(path)))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--classes: {path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(words, list) and words and all(isinstance(word, str) for word in words)
        for words in content.values()
    ):
        raise UsageError(f"--classes: {path} must hold an object of class names to lists of words that name them")
    return content
