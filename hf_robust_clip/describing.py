"""What a record says of datasets, evaluators, triggers and skipped rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .data.filtered import filtered_of
from .data.rows import poison_flags
from .record import Measure, Skipped, checked, jsonable

#: Most entries of a log that a record keeps, evenly spaced.
LOG_ENTRIES = 500
#: Most numbers of skipped rows that a record keeps.
SKIPPED_ROWS = 1000

_HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]+)/")


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """
    What a dataset is, without its rows.

    Args:
        dataset: Any dataset.

    Returns:
        `dict`: `rows` and `name`, `None` where it has no length or no name of its own, and where it is known `hub_id`
        with `revision`, `split`, `fingerprint`, `poisons`, the number of rows that a boolean column `poisoned` marks,
        and `filtered`, what a scan left out of it, as [`~data.filtered.filtered_of`] says.
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
    if (filtered := filtered_of(dataset)) is not None:
        found["filtered"] = filtered
    if rows and (flags := poison_flags(dataset)) is not None:
        found["poisons"] = int(flags.sum())
    return found


def describe_skipped(rows: Sequence[int], streamed: bool) -> Skipped | None:
    """
    What a record says of the rows that `on_bad_row="skip"` passed over; `None` where there are none.

    Args:
        rows (sequence of `int`): Their numbers, of all ranks, in order.
        streamed (`bool`): Whether they are positions in the stream of each worker.
    """
    return Skipped(count=len(rows), rows=list(rows[:SKIPPED_ROWS]), streamed=streamed) if rows else None


def describe_evaluator(evaluator: Any) -> dict[str, Any]:
    """
    What an evaluator measures; of one that has no `describe`, its name.

    Raises:
        `ValueError`: If it describes what no record holds.
    """
    if not hasattr(evaluator, "describe"):
        return {"measure": getattr(evaluator, "__name__", type(evaluator).__name__), "figures": []}
    dataset = getattr(evaluator, "dataset", None)
    described = dict(evaluator.describe())
    if described.get("trigger") is not None:
        described["trigger"] = describe_trigger(described["trigger"])
    if dataset is not None:
        described["dataset"] = describe_dataset(dataset)
    checked(Measure, jsonable(described), f"evaluators: what {type(evaluator).__name__} describes")
    return described


def describe_trigger(trigger: Any) -> dict[str, Any]:
    """A trigger's name and fields; of one of the user's own, its name."""
    if hasattr(trigger, "to_dict"):
        return dict(trigger.to_dict())
    return {"name": getattr(trigger, "__name__", type(trigger).__name__)}


def thinned(log: list[dict[str, Any]], most: int = LOG_ENTRIES) -> list[dict[str, Any]]:
    """At most so many entries, evenly spaced, the first and the last among them."""
    if len(log) <= most:
        return list(log)
    return [log[number] for number in np.unique(np.linspace(0, len(log) - 1, most).round().astype(int))]
