"""A cell of the grid: one model, trained as its row says on what an attack planted, and what was measured of it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import set_seed

from hf_robust_clip import PairSimilarityCallback, SafeCLIPTrainer, scan_pairs
from hf_robust_clip.cli.flags import PLACEBOS
from hf_robust_clip.cli.measuring import device_of
from hf_robust_clip.cli.progress import quiet_libraries, quiet_trainers
from hf_robust_clip.cli.rows import row_trainer
from hf_robust_clip.columns import POISONED
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.versions import versions

from .attack import Planted, plant
from .filtering import SCAN_VERSION, epoch_checkpoints, random_drop
from .material import Material, load_material, start_model
from .rebound import REBOUND, rebound
from .study import FILTER, ROWS, TWIN, Study, digest

_DONE = "training.json"
#: Raised when what a result holds changes.
MEASURES_VERSION = 2
#: Fields of a study that decide how each of its models comes out.
_DATA_AND_MODEL = (
    *("target", "source", "model", "classes", "captions", "renderings", "train_per_class", "test_per_class"),
    *("image_column", "caption_column", "label_column"),
)


@dataclass(frozen=True)
class Cell:
    """
    What is trained and measured.

    Args:
        study ([`Study`]): Gives everything that is not said here.
        row (`str`): One of `ROWS`.
        attack (`str`): Its name, as the results call it.
        poisoning (mapping): The attack, as one of `Study.attacks`.
        seed (`int`): Of the data, the attack, the untrained model and training.
        arguments (mapping): Training arguments in place of the row's.
        start (`Cell`, *optional*): Whose model it starts from.
        scanned (`Cell`, *optional*): Under whose checkpoints the pairs are scanned before training, which drops a
            tenth of them, or all that are suspect where these are more. Row `filter` needs it.
        twin (`bool`): Whether nothing is planted: the same training on the pairs as they were, which the attack is
            then measured on.
        rebound_rate (`float`, *optional*): Learning rate at which a cleaned model is fine-tuned on plainly, after it
            was measured. `None`: it is not.
        left_poisons (`int`): Poisons left among the clean pairs, for rows that start from another's model.
        augment (`bool`): Whether the row's augmentations of images and captions apply.
        follow (`bool`): Whether the similarities of clean and poisoned pairs are recorded at each epoch.
    """

    study: Study
    row: str
    attack: str
    poisoning: Mapping[str, Any]
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    start: Cell | None = None
    scanned: Cell | None = None
    twin: bool = False
    rebound_rate: float | None = None
    left_poisons: int = 0
    augment: bool = True
    follow: bool = False

    def __post_init__(self) -> None:
        if (ROWS[self.row].start is None) != (self.start is None):
            raise ValueError(f"row {self.row!r} starts from {ROWS[self.row].start}, but start is {self.start}")
        if self.row == FILTER and self.scanned is None:
            raise ValueError(f"row {self.row!r}, but scanned is None")
        if self.start and self.scanned and self.start != self.scanned:
            raise ValueError(f"scanned is {self.scanned.label}, but start {self.start.label}: one model is for both")

    @property
    def starts(self) -> list[Cell]:
        """The cells whose models it needs, the nearest first."""
        needed = self.start or self.scanned
        return [] if needed is None else [needed, *needed.starts]

    def is_trained(self, work: Path) -> bool:
        """Whether its folder holds its model."""
        return (work / self.model_key / _DONE).is_file()

    @property
    def label(self) -> str:
        """For people."""
        extra = "".join(f", {name} {value}" for name, value in self.arguments.items())
        twin = " on a twin" if self.twin else ""
        return f"{self.row}{twin}, {self.attack}, seed {self.seed}{extra}"

    def settings(self) -> dict[str, Any]:
        """All that decides how its model comes out."""
        study = self.study
        arguments = study.row_arguments(self.row) | dict(self.arguments)
        if not self.augment:
            arguments["text_preset"] = "identity"
        return {
            "row": self.row,
            "poisoning": None if self.twin else dict(self.poisoning),
            "seed": self.seed,
            "arguments": arguments,
            "image_augmentation": study.row_augmentation(self.row) if self.augment else None,
            "left_poisons": self.left_poisons,
            "follow": self.follow,
            "start": self.starts[0].model_key if self.starts else None,
            **({"scanned": self.scanned.model_key} if self.start and self.scanned else {}),
            **({"scan": SCAN_VERSION} if self.scanned else {}),
            "study": {name: getattr(study, name) for name in _DATA_AND_MODEL},
        }

    @property
    def model_key(self) -> str:
        """What its model's folder is called: the same for the same settings."""
        return digest(self.settings())

    @property
    def key(self) -> str:
        """Of its result: the same for the same model, and of a twin under the same attack."""
        return digest([self.model_key, dict(self.poisoning)]) if self.twin else self.model_key

    def measuring(self) -> dict[str, Any]:
        """What is measured of its model: a result of another kind is measured anew."""
        study = self.study
        return {
            "version": MEASURES_VERSION,
            "measures": list(study.measures),
            "prompts": list(study.prompts) if study.prompts else None,
            "placebos": PLACEBOS,
            "rebound": None if self.rebound_rate is None else {"learning_rate": self.rebound_rate, **REBOUND},
        }


def run_cell(
    cell: Cell, data: Path | None, work: Path, threads: int, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Train the cell's model, unless its folder holds it, and measure it.

    Args:
        cell ([`Cell`]): What to train.
        data (`Path`, *optional*): The folder of the study's files.
        work (`Path`): For the models.
        threads (`int`): That torch may use.
        earlier (mapping, *optional*): What an earlier run returned, of other measures; its `rebound` is kept.

    Returns:
        `dict`: `figures`, `counts`, `seconds` of training and of measuring, `course` of what was followed, and what is
        needed to do it again; ready for JSON.
    """
    torch.set_num_threads(threads)
    # What a trainer warns of, that matching collapsed or that a split separates nothing, the figures show.
    with quiet_libraries(), quiet_trainers():
        return _run(cell, data, work, threads, earlier)


def _run(cell: Cell, data: Path | None, work: Path, threads: int, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    material = load_material(cell.study, data, cell.seed)
    folder = work / cell.model_key
    model, processor = _start(cell, material, work)
    size = ImagePreprocessor(processor.image_processor).image_size
    planted = plant(cell.study, cell.poisoning, material, size, cell.seed)
    if not cell.is_trained(work):
        _train(cell, model, processor, material, planted, folder)
    training = json.loads((folder / _DONE).read_text())
    model = load_dual_encoder(folder).to(device_of(None))
    start = time.perf_counter()
    figures = run_evaluators(planted.evaluators, processor, Embedder(model, processor, batch_size=256))
    measuring_seconds = round(time.perf_counter() - start, 1)
    course = None
    if earlier and earlier["measuring"] | {"measures": list(cell.study.measures)} == cell.measuring():
        course = earlier["rebound"]
    elif cell.rebound_rate is not None:
        # One twin is measured under every attack.
        course = rebound(cell.study, folder, material, planted, cell.seed, cell.rebound_rate, keep=cell.twin)
    return {
        "key": cell.key,
        "row": cell.row,
        "attack": cell.attack,
        "seed": cell.seed,
        "twin": cell.twin,
        "figures": {name: _finite(value) for name, value in figures.items()},
        "success": planted.success,
        "counts": planted.counts,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": training["seconds"],
        "measuring_seconds": measuring_seconds,
        "rebound": course,
        "course": training["course"],
        "measuring": cell.measuring(),
        "settings": cell.settings(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread(s)",
        "versions": versions(("torch", "transformers", "accelerate", "datasets")),
    }


def _start(cell: Cell, material: Material, work: Path) -> tuple[Any, Any]:
    if cell.start is None:
        return start_model(cell.study, material, cell.seed)
    folder = work / cell.start.model_key
    return load_dual_encoder(folder), load_processor(folder, None)


def _train(cell: Cell, model: Any, processor: Any, material: Material, planted: Planted, folder: Path) -> None:
    """Train and save model, processor and last of all the note that this is done."""
    shutil.rmtree(folder, ignore_errors=True)
    settings, study = cell.settings(), cell.study
    poisoned = material.pairs if cell.twin else planted.pairs
    pairs = poisoned if cell.start is None else _clean_pairs(cell, material, planted)
    columns = {"image_column": study.image_column, "caption_column": study.caption_column}

    start = time.perf_counter()
    left_out: dict[str, int] = {}
    if cell.row == "random_drop":
        pairs = random_drop(pairs, seed=cell.seed)
    elif cell.scanned:
        checkpoints = epoch_checkpoints(folder.parent / cell.scanned.model_key)
        scan = scan_pairs(checkpoints, processor, pairs, **columns, batch_size=256, seed=cell.seed)
        pairs = scan.keep(pairs, drop=None)
        poisons = sum(pairs[POISONED]) if POISONED in pairs.column_names else 0
        left_out = {"kept": len(pairs), "poisons_kept": poisons, "suspect": scan.suspects}
    # What a scan of pairs needs of those that learn the pairs as they are.
    saving = {"save_strategy": "epoch", "save_only_model": True} if cell.row in ("undefended", TWIN) else {}
    set_seed(cell.seed)
    trainer = row_trainer(
        ROWS[cell.row].trainer,
        folder,
        cell.seed,
        {**columns, **settings["arguments"], **saving},
        settings["image_augmentation"],
        model=model,
        train_dataset=pairs,
        processing_class=processor,
    )
    similarities = None
    if cell.follow:
        similarities = PairSimilarityCallback(planted.pairs, study.image_column, study.caption_column)
        trainer.add_callback(similarities)
    trainer.train()
    seconds = round(time.perf_counter() - start, 1)
    course: dict[str, Any] = {"log": [_numbers(entry) for entry in trainer.state.log_history if "loss" in entry]}
    if left_out:
        course["filter"] = left_out
    if isinstance(trainer, SafeCLIPTrainer):
        course["splits"] = [_numbers(record._asdict()) for record in trainer.splits.records]
    if similarities is not None:
        course["similarities"] = [_numbers(asdict(record)) for record in similarities.records]
    trainer.save_model(str(folder))
    processor.save_pretrained(folder)
    (folder / _DONE).write_text(json.dumps({"seconds": seconds, "course": course}))


def _clean_pairs(cell: Cell, material: Material, planted: Planted) -> Dataset:
    """What a model is fine-tuned on: clean pairs, and as many poisons as were left among them."""
    if cell.twin:
        return material.clean or material.pairs
    poisoned = [row for row, mark in enumerate(planted.pairs[POISONED]) if mark]
    if material.clean is None:
        left = set(poisoned[cell.left_poisons :])
        return planted.pairs.select([row for row in range(len(planted.pairs)) if row not in left])
    if cell.left_poisons == 0:
        return material.clean
    clean = material.clean.add_column(POISONED, [False] * len(material.clean))
    return concatenate_datasets([clean, planted.pairs.select(poisoned[: cell.left_poisons])])


def with_learning_rate(cell: Cell, rate: float | None) -> Cell:
    """The cell at a learning rate, where one was found for its row."""
    return cell if rate is None else replace(cell, arguments={**cell.arguments, "learning_rate": rate})


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _finite(float(value)) for name, value in entry.items() if isinstance(value, int | float)}


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
