"""What a source of pairs may name: files in its own folder, or below it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from datasets.fingerprint import Hasher
from huggingface_hub import metadata_load

from ..settings import read_settings
from ..wording import listed, shortened, shown

#: What says which files a folder of data is made of, for `load_dataset`.
_CARDS = {"README.md": metadata_load, ".huggingface.yaml": read_settings}
#: The same of a folder made with `save_to_disk`.
STATE_FILE = "state.json"
#: What a file starts with that Git LFS left in place of another.
_POINTER = b"version https://git-lfs.github.com/spec/"


class Bounds:
    """
    Where paths of images may lead.

    Args:
        root (`Path`): The folder that they must not lead out of.
        start (`Path`, *optional*): The folder that relative ones are taken from, by default `root`.
    """

    def __init__(self, root: Path, start: Path | None = None) -> None:
        self.root = os.path.abspath(root)
        self.start = self.root if start is None else os.path.abspath(start)
        self._inside = os.path.join(self.root, "")

    def path(self, name: str | None, where: str) -> str | None:
        """
        The path of an image by its name. By the name alone, without a look at the disk for each of millions: a link in
        the folder is its owner's doing.

        Raises:
            `ValueError`: If it leads out. `where` is what the message calls the row.
        """
        if name is None:
            return None  # a bad row
        joined = os.path.normpath(os.path.join(self.start, name))
        if not joined.startswith(self._inside) or "://" in name:
            raise ValueError(
                f"{where}: {shown(name)} leads out of {shown(self.root)}; accepted are files in that "
                "folder or below it. A list of images in several places goes into a folder above them all"
            )
        if "::" in joined:
            raise ValueError(f"{where}: {shown(name)} has '::' in it, which parts several files; rename the image")
        return joined


def names_images(dataset: datasets.Dataset, column: str) -> bool:
    """Whether a column of `datasets.Image` has rows whose image is a file, and not in the dataset."""
    return any(_named(chunk).null_count < len(chunk) for chunk in dataset.data.column(column).chunks)


def confine_column(
    dataset: datasets.Dataset, column: str, bounds: Bounds, source: str, first: int = 0
) -> datasets.Dataset:
    """
    A column of `datasets.Image` with every path that would be opened checked and absolute.

    Args:
        dataset (`datasets.Dataset`): Without a selection of rows.
        column (`str`): Of images.
        bounds ([`Bounds`]): Where the paths may lead.
        source (`str`), first (`int`): For messages: what it was loaded from, and the number of its first row there.

    Raises:
        `ValueError`: If a path leads out; names the row.
    """
    where, chunks = f"of {shown(source)}, column {column!r}", []
    for chunk in dataset.data.column(column).chunks:
        held, paths = (pc.struct_field(chunk, name) for name in ("bytes", "path"))
        found = [bounds.path(name, f"row {row} {where}") for row, name in enumerate(_named(chunk).to_pylist(), first)]
        check_pointer(next(filter(None, found), ""))  # one stands for all: Git LFS leaves pointers of a kind of file
        first += len(chunk)
        confined = pc.coalesce(pa.array(found, pa.string()), paths)
        chunks.append(pa.StructArray.from_arrays([held, confined], ["bytes", "path"]))
    fingerprint = Hasher.hash([dataset._fingerprint, "confined", column, bounds.root, bounds.start])
    # With a fingerprint of our own the values, which may be bytes of images, are not hashed. Added first: a dataset
    # without columns has no rows.
    added = dataset.add_column(
        f"confined {column}", pa.chunked_array(chunks, datasets.Image().pa_type), new_fingerprint=fingerprint
    )
    return added.remove_columns(column).rename_column(f"confined {column}", column)


def confine_row(row: Mapping[str, Any], column: str, bounds: Bounds, source: str) -> dict[str, Any]:
    """The same of a row of a stream: its value of the column."""
    value = row[column]
    if value is None or value["bytes"] is not None:
        return {column: value}
    return {column: {**value, "path": bounds.path(value["path"], f"a row of {shown(source)}, column {column!r}")}}


def _named(chunk: Any) -> Any:
    """The paths of the images of a chunk that are files; beside bytes a path is only a name."""
    return pc.if_else(pc.is_null(pc.struct_field(chunk, "bytes")), pc.struct_field(chunk, "path"), None)


def card_of(folder: Path) -> dict[str, Any]:
    """What the cards of a folder say of it, as `datasets` has it: the later counts."""
    found: dict[str, Any] = {}
    for name, read in _CARDS.items():
        path = folder / name
        if path.is_file():
            try:
                metadata = read(path)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                reason = shortened(" ".join(str(error).split()), 300)
                raise ValueError(f"the metadata of {path} is not YAML: {reason}") from error
            found.update(metadata if isinstance(metadata, dict) else {})
    return found


def check_path(path: str) -> str:
    """Refuse a path that what opens data files takes for another: a chain of several, or one with variables in it."""
    if "::" in path:
        raise ValueError(f"{shown(path)} has '::' in it, which parts several files in one name; give it another name")
    if os.path.expandvars(path) != path:  # as `datasets` would
        raise ValueError(
            f"{shown(path)} has the name of an environment variable after a '$' in it, in whose place its value would "
            "be read; give it another name"
        )
    return path


def check_pointer(path: str) -> None:
    """Refuse a file that Git LFS left in place of another."""
    if os.path.isfile(path) and os.path.getsize(path) < 1024:
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{path} is a Git LFS pointer, and not the file itself; get that with `git lfs pull`")


def stored_files(folder: Path) -> list[str]:
    """
    The files that the `state.json` of a folder lists.

    Raises:
        `ValueError`: If it is no such file, or lists one that is not in the folder.
    """
    path = folder / STATE_FILE
    try:
        names = [entry["filename"] for entry in json.loads(path.read_text(encoding="utf-8"))["_data_files"]]
        outside = [name for name in names if os.path.basename(name) != name]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be used; accepted is an object with a list of {{'filename': name}} under '_data_files'"
        ) from error
    if outside:
        raise ValueError(f"{path} names {listed(outside)}, which leads out of {shown(str(folder))}")
    return names
