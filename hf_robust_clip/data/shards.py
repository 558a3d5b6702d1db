"""A dataset on disk that is written shard by shard, so that an interruption costs no more than one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher
from pydantic import BaseModel, StrictInt, ValidationError

from ..files import in_one_move, remove_partial, write_text
from ..locking import LOCK_FILES
from ..wording import listed, shortened, shown
from .confining import STATE_FILE, stored_files

RECORD_FILE = "prepared.json"


class Shard(BaseModel):
    """How many rows and bytes a shard has, and the numbers of the rows that were left out of it."""

    rows: StrictInt
    bytes: StrictInt
    bad_rows: list[StrictInt]


class ShardRecord(BaseModel):
    """What `prepared.json` says: all that the shards depend on, as JSON has it, and the shards that are whole."""

    made_from: dict[str, Any]
    shards: dict[str, Shard] = {}

    def write(self, folder: Path) -> None:
        """Write it into the folder of the shards, which are sorted by their names."""
        self.shards = dict(sorted(self.shards.items()))
        write_text(folder / RECORD_FILE, self.model_dump_json(indent=1) + "\n")


def record_of(folder: Path, made_from: dict[str, Any]) -> ShardRecord:
    """
    The record of a folder, with the shards of earlier calls that are whole. Removes files that were left unfinished.

    Raises:
        `ValueError`: If the folder was made from something else, which the message says, or holds other things, or if
            its record cannot be used.
    """
    remove_partial(folder)
    path = folder / RECORD_FILE
    if not path.is_file():
        names = sorted(file.name for file in folder.iterdir())
        foreign = [name for name in names if not name.startswith(".") and name not in LOCK_FILES]
        # Without a record no shard counts, and what an interrupted call left is written over.
        foreign = [name for name in foreign if not (name.startswith("data-") and name.endswith(".arrow"))]
        if foreign:
            raise ValueError(
                f"folder={shown(str(folder))} holds {listed(foreign)} and no {RECORD_FILE}; accepted is "
                "a new or empty folder, or that of an earlier call"
            )
        return ShardRecord(made_from=made_from)
    try:
        record = ShardRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = shortened(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}", 200)
        raise ValueError(
            f"{shortened(str(path), 200)} cannot be used: {reason}. Give another folder, or delete that one"
        ) from error
    differences = shortened("; ".join(_differences(record.made_from, made_from)), 300)
    if differences:
        raise ValueError(
            f"folder={shown(str(folder))} was prepared otherwise: {differences}. Give another folder, or delete that "
            "one"
        )
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    record.shards = {name: shard for name, shard in record.shards.items() if sizes.get(name) == shard.bytes}
    return record


def write_shard(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write an Arrow file in one move. Returns how many rows it has."""
    rows = 0
    with in_one_move(path) as partial, partial.open("wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
                rows += len(table)
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine could leave its name without its content
    return rows


def is_finished(folder: Path, names: Sequence[str]) -> bool:
    """Whether [`finish`] has been here, and nobody since has made the folder one of other files."""
    try:
        return stored_files(folder) == list(names)
    except (OSError, ValueError):
        return False


def finish(folder: Path, names: Sequence[str], features: datasets.Features, source: datasets.Dataset) -> None:
    """Write what `load_from_disk` reads beside the shards, with licence and split of the source, `state.json` last."""
    about = {name: getattr(source.info, name) for name in ("description", "citation", "homepage", "license")}
    datasets.DatasetInfo(**about, features=features).write_to_directory(str(folder), pretty_print=True)
    # Dataset.save_to_disk would write the shards again.
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": Hasher.hash((folder / RECORD_FILE).read_text(encoding="utf-8")),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None if source.split is None else str(source.split),
    }
    write_text(folder / STATE_FILE, json.dumps(state, indent=1) + "\n")


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    for name in dict.fromkeys((*then, *now)):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{inside}{name}.")
        elif before != after:
            yield f"{inside}{name} was {shown(before)}, and is {shown(after)}"
