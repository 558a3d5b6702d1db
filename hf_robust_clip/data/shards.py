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

from ..files import in_one_move, remove_partial, write_text
from ..locking import LOCK_FILES
from ..wording import listed, shortened, shown
from .confining import STATE_FILE, stored_files

#: What a folder was made from, and the shards that are whole.
RECORD_FILE = "prepared.json"


def shard_name(number: int, count: int) -> str:
    """What `datasets` calls the shard of this number, from 0."""
    return f"data-{number:05d}-of-{count:05d}.arrow"


def whole_shards(folder: Path, made_from: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """
    The shards of an earlier call that are whole: file names to what [`write_shard`] returned. Removes files that an
    interrupted one left unfinished.

    Args:
        folder (`Path`): Is there.
        made_from (mapping): All that the shards depend on, as JSON has it.

    Raises:
        `ValueError`: If the folder was made from something else, which the message says, or holds other things, or if
            its record is none.
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
        return {}
    record = _read_record(path)
    differences = shortened("; ".join(_differences(record["made_from"], made_from)), 300)
    if differences:
        raise ValueError(
            f"folder={shown(str(folder))} was prepared otherwise: {differences}. Give another folder, or delete that "
            "one"
        )
    shards: dict[str, dict[str, Any]] = record["shards"]
    return {
        name: shard
        for name, shard in shards.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == shard["bytes"]
    }


def write_record(folder: Path, made_from: Mapping[str, Any], shards: Mapping[str, Mapping[str, Any]]) -> None:
    """Note which shards are whole."""
    record = {"made_from": made_from, "shards": dict(sorted(shards.items()))}
    write_text(folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")


def write_shard(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> dict[str, Any]:
    """Write an Arrow file in one move. Returns how many `rows` and `bytes` it has."""
    rows = 0
    with in_one_move(path) as partial, partial.open("wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
                rows += len(table)
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine could leave its name without its content
    return {"rows": rows, "bytes": path.stat().st_size}


def is_finished(folder: Path, names: Sequence[str]) -> bool:
    """Whether [`finish`] has been here, and nobody since has made the folder one of other files."""
    try:
        return stored_files(folder) == list(names)
    except (OSError, ValueError):
        return False


def finish(
    folder: Path,
    names: Sequence[str],
    features: datasets.Features,
    source: datasets.Dataset,
    made_from: Mapping[str, Any],
) -> None:
    """
    Write what `load_from_disk` reads, its `state.json` last.

    Args:
        folder (`Path`): With all shards.
        names (sequence of `str`): Of the shards, in the order of their rows.
        features (`datasets.Features`): Of the shards.
        source (`datasets.Dataset`): What it was made from, whose licence and split go along.
        made_from (mapping): As of [`whole_shards`]; the dataset's fingerprint is one of it.
    """
    about = {name: getattr(source.info, name) for name in ("description", "citation", "homepage", "license")}
    datasets.DatasetInfo(**about, features=features).write_to_directory(str(folder), pretty_print=True)
    # Dataset.save_to_disk would write the shards again.
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": Hasher.hash(dict(made_from)),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None if source.split is None else str(source.split),
    }
    write_text(folder / STATE_FILE, json.dumps(state, indent=1) + "\n")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wrong = _what_is_wrong(record)
    except (ValueError, RecursionError) as error:
        wrong = shortened(f"it is not JSON: {error}", 200)
    if wrong is not None:
        raise ValueError(
            f"{shortened(str(path), 200)} cannot be used: {wrong}. Give another folder, or delete that one"
        )
    found: dict[str, Any] = record
    return found


def _what_is_wrong(record: Any) -> str | None:
    """Why a record is not what [`write_record`] writes, if it is not."""
    for key in ("made_from", "shards"):
        if not isinstance(record, dict) or not isinstance(record.get(key), dict):
            return f"it has no object under {key!r}"
    for name, shard in record["shards"].items():
        counts = [shard.get(key) for key in ("rows", "bytes")] if isinstance(shard, dict) else [None]
        rows = shard.get("bad_rows") if isinstance(shard, dict) else None
        if not isinstance(rows, list) or not all(type(count) is int for count in (*counts, *rows)):
            return f"its shard {name!r} must have integers as 'rows' and 'bytes', and a list of them as 'bad_rows'"
    return None


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    for name in dict.fromkeys((*then, *now)):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{inside}{name}.")
        elif before != after:
            yield f"{inside}{name} was {shown(before)}, and is {shown(after)}"
