"""A study: a dataset, a model, attacks and recipes, as a description file says."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_robust_clip.cli.rows import Row, row_arguments, row_augmentation
from hf_robust_clip.settings import read_settings

STUDIES = Path(__file__).parents[1] / "studies"
#: What the embedded dataset is called in place of files.
DIGITS = "digits"


ROWS: dict[str, Row] = {
    "undefended": Row("undefended", "clip"),
    "twin": Row("never poisoned", "clip", control="undefended"),
    "plain": Row("plain fine-tuning", "clip", start="undefended"),
    "cleanclip": Row("CleanCLIP", "cleanclip", start="undefended", control="plain"),
    "par": Row("PAR", "par", start="undefended", control="plain"),
    "unbind": Row("Unbind", "unbind", start="undefended", control="plain"),
    "unbind_learned": Row("Unbind, perturbations that learn", "unbind", start="undefended", control="unbind"),
    "augmentation": Row("augmentation alone", "clip"),
    "roclip": Row("RoCLIP", "roclip", control="augmentation"),
    "safeclip": Row("SafeCLIP", "safeclip", control="augmentation"),
    "filter": Row("scan, drop a tenth, retrain", "clip", control="undefended"),
    "combined": Row("scan, retrain, then Unbind", "unbind", start="filter", control="unbind"),
    "random_drop": Row("a random tenth dropped", "clip", control="undefended"),
    "rebound": Row("plain fine-tuning after CleanCLIP", "clip", start="cleanclip", control="plain"),
}
#: The rows of the table; a study can name others of those above.
GRID = (
    *("undefended", "twin", "plain", "cleanclip", "par", "unbind"),
    *("augmentation", "roclip", "safeclip", "filter", "combined", "random_drop"),
)
#: Trained on pairs without poisons, and measured under each attack.
TWIN = "twin"
#: Trained on what a scan leaves of the pairs, under the checkpoints of the undefended model.
FILTER = "filter"
#: The whole way: the model that is trained on what a scan leaves, cleaned.
COMBINED = "combined"
#: What [`Study.only`] calls the never-poisoned model after each cleaning.
CLEANED_TWINS = "cleaned_twins"
PHASES = ("all", "pretraining", "finetuning")
MEASURES = ("zero_shot", "attack", "linear_probe", "retrieval")


@dataclass(frozen=True)
class Search:
    """
    The search for each row's learning rate, on an attack and seeds that the table does not report.

    Args:
        attack (mapping): As one of `Study.attacks`.
        seeds (sequence of `int`): None of `Study.seeds`.
        learning_rates (mapping): Of `pretraining` and `finetuning`, or of a row, to the rates tried.
    """

    attack: Mapping[str, Any]
    seeds: Sequence[int]
    learning_rates: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Study:
    """
    A grid of rows, attacks and seeds on one dataset.

    Args:
        name (`str`): Of the result files.
        target (`str`): The class that the attacks are for.
        attacks (mapping): Of name to the fields of a [`~hf_robust_clip.PoisonSpec`], its trigger as a dictionary.
            Mode `targeted` has `images` and `captions`, the number of images and of captions each.
        arguments (mapping): Training arguments of `all` rows, of the `pretraining` and `finetuning` ones, and of rows
            by name; the more special goes before, and a row has those of its control.
        search ([`Search`]): For the learning rates.
        source (`str` or mapping, defaults to `"digits"`): The embedded dataset, or the files `train` and `test` in the
            folder of the data.
        model (mapping): Arguments of [`~hf_robust_clip.data.scratch.build_model`], with `image_size` and `merges` of
            the processor; or `id`, a checkpoint on the Hub or in a folder.
        classes (mapping or sequence, *optional*): Of a class to the words that name it, for labels from captions; or
            the names of those classes of `label_column` that are used. `None`: all classes.
        prompts (sequence of `str`, *optional*): With one `{}` each, for zero-shot classification.
        captions (sequence of `str`, *optional*): Templates of captions, for data with labels only.
        image_augmentation (mapping): Of row to the arguments of [`~hf_robust_clip.ImageAugmentation`].
        rows (sequence of `str`): Those of the table, of `ROWS`.
        seeds (sequence of `int`): Those of the table.
        only (mapping): Of a row or `"cleaned_twins"`, the never-poisoned model after each cleaning, to the `attacks`
            and `seeds` that it has cells for; of an attack to its `rows` and `seeds`. Default: all.
        measures (sequence of `str`): Of `MEASURES`.
        renderings (`int`): Of each digit.
        train_per_class, test_per_class (`int`, *optional*): Most photos of a class, the first ones.
        image_column, caption_column, label_column (`str`): Of the files.
        note (`str`): Printed above the table.
    """

    name: str
    target: str
    attacks: Mapping[str, Mapping[str, Any]]
    arguments: Mapping[str, Mapping[str, Any]]
    search: Search
    source: str | Mapping[str, str] = DIGITS
    model: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, Sequence[str]] | Sequence[str] | None = None
    prompts: Sequence[str] | None = None
    captions: Sequence[str] | None = None
    image_augmentation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Sequence[str] = GRID
    seeds: Sequence[int] = (0, 1, 2)
    only: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    measures: Sequence[str] = ("zero_shot", "attack")
    renderings: int = 4
    train_per_class: int | None = None
    test_per_class: int | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    label_column: str = "label"
    note: str = ""

    def __post_init__(self) -> None:
        _check_names("rows", self.rows, ROWS)
        _check_names("measures", self.measures, MEASURES)
        _check_names("arguments", self.arguments, (*PHASES, *ROWS))
        _check_names("image_augmentation", self.image_augmentation, tuple(ROWS))
        _check_names("search.learning_rates", self.search.learning_rates, (*PHASES[1:], *ROWS))
        _check_names("only", self.only, (*self.rows, *self.attacks, CLEANED_TWINS))
        for name, parts in self.only.items():
            _check_names(f"only.{name}", parts, ("rows" if name in self.attacks else "attacks", "seeds"))
            for part, values in parts.items():
                _check_names(f"only.{name}.{part}", values, getattr(self, part))
        if not self.attacks:
            raise ValueError("attacks is empty; a study needs at least one")
        common = sorted(set(self.seeds) & set(self.search.seeds))
        if common:
            raise ValueError(
                f"search.seeds has {common[0]}, a seed of the table: what is reported must not be searched"
            )
        if self.search.attack in self.attacks.values():
            raise ValueError("search.attack is one of attacks: what is reported must not be searched")
        if self.source != DIGITS and not (isinstance(self.source, Mapping) and set(self.source) == {"train", "test"}):
            raise ValueError(
                f"source={self.source!r}; accepted are 'digits' and a mapping with the files train and test"
            )

    def row_arguments(self, row: str) -> dict[str, Any]:
        """The training arguments of a row, those of its phase and its control included."""
        return row_arguments(ROWS, self.arguments, row)

    def row_augmentation(self, row: str) -> dict[str, Any] | None:
        """The image augmentation of a row: its own or its control's."""
        return row_augmentation(ROWS, self.image_augmentation, row)

    def has(self, name: str, attack: str, seed: int) -> bool:
        """Whether a row or `"cleaned_twins"` has a cell for an attack and a seed."""
        parts, own = self.only.get(name, {}), self.only.get(attack, {})
        # A cleaned twin's own row has been asked for.
        if name not in (CLEANED_TWINS, *own.get("rows", (name,))) or attack not in parts.get("attacks", (attack,)):
            return False
        return all(seed in one.get("seeds", (seed,)) for one in (parts, own))

    def rates(self, row: str) -> list[float]:
        """The learning rates that the search tries for a row."""
        phase = "finetuning" if ROWS[row].start else "pretraining"
        rates = self.search.learning_rates
        return [float(rate) for rate in rates.get(row, rates.get(phase, ()))]


def twin_row(row: str, rows: Sequence[str]) -> str:
    """
    The row of a study's `rows` that the twin of a row's model is in: what was not cleaned has one of its own, and what
    was trained anew and then cleaned has the one of the same cleaning.
    """
    if row == COMBINED:
        return "unbind_learned" if "unbind_learned" in rows else "unbind"
    return TWIN if ROWS[row].start is None else row


def load_study(name: str) -> Study:
    """
    Read a study's description.

    Args:
        name (`str`): One of `benchmarks/studies`, without its ending, or the path of a YAML file.

    Raises:
        `ValueError`: If there is no such file, or it holds what is not a field of a study.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else STUDIES / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise ValueError(f"--study {name!r}: no file {path}; accepted are {there}, or the path of a YAML file")
    content = read_settings(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; accepted is a mapping with the fields of a study")
    try:
        _check_names("the study", content, [item.name for item in fields(Study)])
        missing = [name for name in ("name", "target", "attacks", "arguments", "search") if name not in content]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        _check_kinds(content)
        _check_names("search", content["search"], [item.name for item in fields(Search)])
        return Study(**{**content, "search": Search(**content["search"])})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def digest(settings: Any) -> str:
    """A short name for settings: the same for the same ones."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_kinds(content: Mapping[str, Any]) -> None:
    """That what is looked into is there to be looked into."""
    for name in ("attacks", "arguments", "search", "model", "image_augmentation", "only"):
        if name in content and not isinstance(content[name], Mapping):
            raise ValueError(f"{name} is a {type(content[name]).__name__}; accepted is a mapping")
    for name in ("attacks", "arguments", "image_augmentation", "only"):
        for key, value in content.get(name, {}).items():
            if not isinstance(value, Mapping):
                raise ValueError(f"{name}.{key} is a {type(value).__name__}; accepted is a mapping")
    if not isinstance(content["search"].get("learning_rates", {}), Mapping):
        raise ValueError("search.learning_rates must be a mapping")
    for name in ("rows", "seeds", "measures"):
        if not isinstance(content.get(name, []), list):
            raise ValueError(f"{name} is a {type(content[name]).__name__}; accepted is a list")


def _check_names(where: str, names: Any, accepted: Any) -> None:
    for name in names:
        if name not in accepted:
            near = difflib.get_close_matches(str(name), list(map(str, accepted)), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: {name!r} is not accepted{hint} Accepted are {', '.join(map(str, accepted))}")
