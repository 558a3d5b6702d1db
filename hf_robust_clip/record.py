"""What a training run was, as plain data: what its model card, its report and the command line are made from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from .columns import POISONED
from .data.rows import column_values
from .files import RUN_FILE, write_text
from .record_form import RECORD, check_form
from .wording import MOST, listed, shortened

#: Most entries of a log that a record keeps, evenly spaced.
LOG_ENTRIES = 500
#: Most numbers of skipped rows that a record keeps.
SKIPPED_ROWS = 1000

_HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]+)/")


@dataclass
class RunRecord:
    """
    A training run, ready for JSON. Paths, tokens and data are not in it, beside what the arguments and the names say.

    Args:
        trainer (`str`): Name of the trainer's class.
        model (`dict`): `name` (Hub id of the model that training started from, or `None`), `revision` (the commit that
            it was loaded from, or `None`), `source` (`"hub"`, `"folder"` or `"memory"`), `type` (as in its config),
            `parameters`, `trainable_parameters`, `image_size`, and `adapter`, the settings of PEFT or `None`.
        data (`dict`, *optional*): The training pairs, as [`describe_dataset`] says.
        defence (`dict`): The trainer's own arguments, all of them, and their defaults in `defence_defaults`.
        settings (`dict`): Other training arguments that differ from the defaults.
        measures (`list[dict]`): What each evaluator measures: `measure`, `figures` (their names), and where it has
            them `trigger`, `target`, `images`, `classes`, `dataset`.
        before, after (`dict[str, float]`, *optional*): The evaluators' figures before training, and of the weights
            that are saved.
        after_step (`int`, *optional*): The optimizer step that `after` is of.
        steps, epochs: Optimizer steps and epochs done.
        planned_steps (`int`): Optimizer steps of the whole training.
        course (`list[dict]`): The evaluators' figures over training, each with `step` and `epoch`.
        log (`list[dict]`): What was logged, at most `LOG_ENTRIES` entries.
        details (`dict`): What a defence notes down: `splits` of SafeCLIP.
        method (`str`): The class of this package that the trainer is or derives from.
        augmentation (`dict`): What augmented `images` and `captions`, whatever the presets say; `None` for nothing.
        skipped (`dict`): Rows of the training data that were passed over, as [`describe_skipped`] says; empty where
            there are none.
        environment (`dict`): `versions`, `device`, `processes`, `precision`, `seed`, `seconds`.
    """

    trainer: str
    model: dict[str, Any]
    data: dict[str, Any] | None
    defence: dict[str, Any]
    settings: dict[str, Any]
    measures: list[dict[str, Any]]
    before: dict[str, float] | None
    after: dict[str, float] | None
    after_step: int | None
    steps: int
    epochs: float
    planned_steps: int
    environment: dict[str, Any]
    course: list[dict[str, float]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    defence_defaults: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    augmentation: dict[str, str | None] = field(default_factory=dict)
    skipped: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Its content as JSON."""
        text = json.dumps(jsonable(dataclasses.asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the text") -> RunRecord:
        """
        What [`to_json`] wrote.

        Args:
            text (`str`): The JSON.
            where (`str`): What errors call it.

        Raises:
            `ValueError`: If it is no record, or one of its entries is nothing that a record holds.
        """
        try:
            content = jsonable(json.loads(text))
        except ValueError as error:
            raise ValueError(shortened(f"{where} is no JSON: {error}")) from error
        except RecursionError as error:
            raise ValueError(f"{where} is no record of a run: its entries are nested too deeply") from error
        names = {item.name: item for item in dataclasses.fields(cls)}
        given = set(content) if isinstance(content, dict) else set()
        required = {name for name, item in names.items() if item.default_factory is dataclasses.MISSING}
        if not required <= given <= set(names):
            raise ValueError(f"{where} is no record of a run: its keys must be those of RunRecord, {listed(names)}")
        for name, value in content.items():
            check_form(value, RECORD[name], f"{where}: {name}")
        return cls(**content)

    def plain(self) -> RunRecord:
        """The same, of what JSON has a form for alone: as it is after [`save`] and [`load`]."""
        return self.from_json(self.to_json())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a model's folder, as JSON, in one move."""
        write_text(Path(folder, RUN_FILE), self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunRecord:
        """
        Read that of a model's folder.

        Raises:
            `ValueError`: If there is none, or if it is none.
        """
        path = Path(folder, RUN_FILE)
        if not path.is_file():
            raise ValueError(
                f"{shortened(str(folder), 200)} has no {RUN_FILE}: it was not saved by a trainer of hf_robust_clip"
            )
        return cls.from_json(path.read_text(encoding="utf-8"), shortened(str(path), 200))


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """
    What a dataset is, without its rows.

    Args:
        dataset: Any dataset.

    Returns:
        `dict`: `rows` and `name`, `None` where it has no length or no name of its own, and where it is known `hub_id`
        with `revision`, `split`, `fingerprint`, and `poisons`, the number of rows that a boolean column `poisoned`
        marks.
    """
    info, rows = getattr(dataset, "info", None), len(dataset) if hasattr(dataset, "__len__") else None
    name = getattr(info, "dataset_name", None)
    # A file without a name of its own is called by its format.
    found: dict[str, Any] = {"name": None if name == getattr(info, "builder_name", None) else name, "rows": rows}
    sources = _HUB_FILE.findall(" ".join(getattr(info, "download_checksums", None) or {}))
    if len({hub_id for hub_id, _ in sources}) == 1:
        found["hub_id"], found["revision"] = sources[0]
    for name, value in (
        ("split", getattr(dataset, "split", None)),
        ("fingerprint", getattr(dataset, "_fingerprint", None)),
    ):
        if value is not None:
            found[name] = str(value)
    if rows and POISONED in (getattr(dataset, "column_names", None) or ()):
        found["poisons"] = sum(map(bool, column_values(dataset, POISONED)))
    return found


def dataset_name(described: Mapping[str, Any] | None) -> str | None:
    """What to call a dataset that [`describe_dataset`] described; `None` if nothing is known."""
    return None if described is None else described.get("hub_id") or described.get("name")


def describe_skipped(rows: Sequence[int], streamed: bool) -> dict[str, Any]:
    """
    What a record says of the rows that `on_bad_row="skip"` passed over; nothing where there are none.

    Args:
        rows (sequence of `int`): Their numbers, of all ranks, in order.
        streamed (`bool`): Whether they are positions in the stream of each worker.

    Returns:
        `dict`: `count`, `rows` (at most the first `SKIPPED_ROWS` numbers) and `streamed`.
    """
    return {"count": len(rows), "rows": list(rows[:SKIPPED_ROWS]), "streamed": streamed} if rows else {}


def skipped_text(skipped: Mapping[str, Any]) -> str:
    """How many rows were passed over, and which ones: "2: 3, 17"; the first ten of many."""
    positions = " (positions in the stream of each worker)" if skipped["streamed"] else ""
    first = skipped["rows"][:MOST]
    more = skipped["count"] - len(first)
    return f"{skipped['count']:,}: {listed(first)}{f' and {more:,} more' if more else ''}{positions}"


def describe_evaluator(evaluator: Any) -> dict[str, Any]:
    """What an evaluator measures; of one that has no `describe`, its name."""
    if not hasattr(evaluator, "describe"):
        return {"measure": getattr(evaluator, "__name__", type(evaluator).__name__), "figures": []}
    dataset = getattr(evaluator, "dataset", None)
    described = dict(evaluator.describe())
    if described.get("trigger") is not None:
        described["trigger"] = describe_trigger(described["trigger"])
    return described if dataset is None else {**described, "dataset": describe_dataset(dataset)}


def describe_trigger(trigger: Any) -> dict[str, Any]:
    """A trigger's name and fields; of one that is none of ours, its name."""
    if hasattr(trigger, "to_dict"):
        return dict(trigger.to_dict())
    return {"name": getattr(trigger, "__name__", type(trigger).__name__)}


def thinned(log: list[dict[str, Any]], most: int = LOG_ENTRIES) -> list[dict[str, Any]]:
    """At most so many entries, evenly spaced, the first and the last among them."""
    if len(log) <= most:
        return list(log)
    return [log[number] for number in np.unique(np.linspace(0, len(log) - 1, most).round().astype(int))]


def jsonable(value: Any) -> Any:
    """The same with `None` for numbers that JSON does not have, and text for what it has no form for."""
    # Before text and numbers, which some enumerations are as well.
    if isinstance(value, Enum | np.generic):
        return jsonable(value.value if isinstance(value, Enum) else value.item())
    if isinstance(value, dict):
        return {_encodable(str(key)): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(entry) for entry in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else _encodable(str(value))


def _encodable(text: str) -> str:
    """A text that UTF-8 can hold: half a pair of surrogates, as in an argument that is no UTF-8, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
