"""The scores of a scan's second pass on the disk, part by part, so that an interruption costs no more than one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..data.shards import write_shard
from ..data.streams import Place
from ..files import remove_partial, write_text
from ..wording import listed, shortened, shown

SETTINGS_FILE = "scan.json"


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Note down what a scan depends on, or compare it with what an earlier one noted down.

    Raises:
        `ValueError`: If the folder holds another scan, or other things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    if not path.is_file():
        foreign = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
        if foreign:
            raise ValueError(
                f"cache_dir={shown(str(folder))} holds {listed(foreign)} and no {SETTINGS_FILE}; accepted is a new or "
                "empty folder, or that of an earlier call"
            )
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(shortened(f"{path} cannot be used: {error}; give another folder, or delete it")) from error
    before = before if isinstance(before, dict) else {}
    names = [name for name in dict.fromkeys((*before, *settings)) if before.get(name) != settings.get(name)]
    if names:
        name = names[0]
        raise ValueError(
            f"cache_dir={shown(str(folder))} holds the scan of something else: {name} was {shown(before.get(name))}, "
            f"and is {shown(settings.get(name))}. Give another folder, or delete that one"
        )


class Parts:
    """
    The tables of one rank.

    Args:
        folder (`Path`): Of all ranks.
        rank (`int`): This one.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        remove_partial(folder, f"scores-{rank:05d}-*")
        self._count = len(list(self._own()))

    def places(self) -> list[Place]:
        """Where reading goes on after the parts that are there."""
        if not self._count:
            return []
        with pa.memory_map(str(self._path(self._count - 1))) as source:
            about = pa.ipc.open_stream(source).schema.metadata[b"places"]
        return [Place(*place) for place in json.loads(about)]

    def write(self, tables: Sequence[pa.Table], places: Sequence[Place]) -> None:
        """Add a part, and the places after it."""
        schema = tables[0].schema.with_metadata({"places": json.dumps(places)})
        write_shard(self._path(self._count), schema, (table.cast(schema) for table in tables))
        self._count += 1

    def _own(self) -> Iterator[Path]:
        return self._folder.glob(f"scores-{self._rank:05d}-*.arrow")

    def _path(self, number: int) -> Path:
        return self._folder / f"scores-{self._rank:05d}-{number:08d}.arrow"


def read_parts(folder: Path) -> pa.Table:
    """What all ranks have written, in order, left on the disk."""
    tables = []
    for path in sorted(folder.glob("scores-*.arrow")):
        tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all().replace_schema_metadata(None))
    return pa.concat_tables(tables)
