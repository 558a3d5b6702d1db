"""What a source of pairs may name: files in its own folder, or below it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from datasets.fingerprint import Hasher
from huggingface_hub import metadata_load

from ..settings import read_settings
from ..wording import shortened, shown

#: What says which files a folder of data is made of, for `load_dataset`.
_CARDS = {"README.md": metadata_load, ".huggingface.yaml": read_settings}
#: The same of a folder made with `save_to_disk`, and of one with several splits.
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"
#: "file:/etc", "zip::a.zip": what fsspec, which opens data files, does not take for a path.
_ELSEWHERE = re.compile(r"[A-Za-z][\w+.-]+:|.*(://|::)", re.DOTALL)
#: What a file starts with that Git LFS left in place of another.
_POINTER = b"version https://git-lfs.github.com/spec/"
_STRINGS = ("string", "large_string", "string_view")


class Bounds:
    """
    Where paths of images may lead.

    Args:
        root (`Path`, *optional*): The folder that they must not lead out of. `None`: the working directory, and no
            path may be absolute; for rows that came from elsewhere.
        start (`Path`, *optional*): The folder that relative ones are taken from, by default `root`.
    """

    def __init__(self, root: Path | None, start: Path | None = None) -> None:
        self.root = os.path.abspath(root or ".")
        self.start = self.root if start is None else os.path.abspath(start)
        self.absolute = root is not None
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
        inside = joined == self.root or joined.startswith(self._inside)
        if not inside or "://" in name or (not self.absolute and os.path.isabs(name)):
            raise ValueError(
                f"{where}: {shown(name)} leads out of {shown(self.root)}; accepted are files in that "
                "folder or below it. A list of images in several places goes into a folder above them all"
            )
        if "::" in joined:
            raise ValueError(f"{where}: {shown(name)} has '::' in it, which parts several files; rename the image")
        return joined


def names_images(feature: Any) -> bool:
    """Whether a column is of paths, or of paths and bytes, that is no `datasets.Image` yet."""
    return getattr(feature, "dtype", None) in _STRINGS or (isinstance(feature, Mapping) and "path" in feature)


def opens_images(dataset: datasets.Dataset, column: str) -> bool:
    """Whether a column of `datasets.Image` has rows whose image is a file, and not in the dataset."""
    chunks = [chunk for chunk in dataset.data.column(column).chunks if pa.types.is_struct(chunk.type)]
    return any(chunk.field("bytes").null_count > chunk.field("path").null_count for chunk in chunks)


def confine_column(
    dataset: datasets.Dataset, column: str, bounds: Bounds, source: str, first: int = 0
) -> datasets.Dataset:
    """
    A column of paths, or of paths and bytes, with every path that would be opened checked and absolute.

    Args:
        dataset (`datasets.Dataset`): As loaded: without a selection of rows.
        column (`str`): Of which [`names_images`].
        bounds ([`Bounds`]): Where the paths may lead.
        source (`str`), first (`int`): For messages: what it was loaded from, and the number of its first row there.

    Raises:
        `ValueError`: If a path leads out; names the row.
    """
    stored = dataset.data.column(column)
    chunks = []
    for chunk in stored.chunks:
        chunks.append(_confined(chunk, column, bounds, source, first))
        first += len(chunk)
    confined = pa.chunked_array(chunks) if chunks else pa.chunked_array([], pa.string())
    fingerprint = Hasher.hash([dataset._fingerprint, "confined", column, bounds.root, bounds.start])
    # With a fingerprint of our own the values, which may be bytes of images, are not hashed. Added first: a dataset
    # without columns has no rows.
    added = dataset.add_column(f"confined {column}", confined, new_fingerprint=fingerprint)
    return added.remove_columns(column).rename_column(f"confined {column}", column)


def confine_row(row: Mapping[str, Any], column: str, bounds: Bounds, source: str) -> dict[str, Any]:
    """The same of a row of a stream: its value of the column."""
    value = row.get(column)
    where = f"a row of {shown(source)}, column {column!r}"
    if isinstance(value, str):
        return {column: bounds.path(value, where)}
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return {column: {**value, "path": bounds.path(value["path"], where)}}
    return {column: value} if column in row else {}


def check_manifests(folder: Path) -> None:
    """
    Refuse a folder of data whose own files send a loader elsewhere: `README.md` and `.huggingface.yaml` by
    `data_files` and `data_dir` of their configs, `state.json` and `dataset_dict.json` by the files and the splits that
    they list.

    Raises:
        `ValueError`: Naming the file and the path that leads out, or what the file should be.
    """
    for path, metadata in _cards(folder):
        for pattern in _patterns(metadata):
            _check_name(pattern, folder, path)
    splits = [folder]
    if (folder / SPLITS_FILE).is_file():
        names = _content(folder / SPLITS_FILE, "splits", "an object with a list of names under 'splits'")
        for name in names:
            _check_name(name, folder, folder / SPLITS_FILE)
        splits += [folder / name for name in names]
    for split in splits:
        if (split / STATE_FILE).is_file():
            for name in stored_files(split):
                _check_name(name, split, split / STATE_FILE)


def card_of(folder: Path) -> dict[str, Any]:
    """What the cards of a folder say of it, as `datasets` has it: the later counts."""
    return {key: value for _, metadata in _cards(folder) for key, value in metadata.items()}


def check_path(path: str) -> str:
    """Refuse a path that fsspec, which opens data files, takes for a chain of several."""
    if "::" in path:
        raise ValueError(f"{shown(path)} has '::' in it, which parts several files in one name; give it another name")
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
        `ValueError`: If it is no such file.
    """
    shape = "an object with a list of {'filename': name} under '_data_files'"
    entries = _content(folder / STATE_FILE, "_data_files", shape)
    if not all(isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in entries):
        raise ValueError(f"{folder / STATE_FILE} cannot be used; accepted is {shape}")
    return [entry["filename"] for entry in entries]


def _confined(chunk: Any, column: str, bounds: Bounds, source: str, first: int) -> Any:
    named = is_bytes = paths = None
    if pa.types.is_struct(chunk.type):
        has_bytes = chunk.type.get_field_index("bytes") >= 0
        is_bytes = pc.struct_field(chunk, "bytes") if has_bytes else pa.nulls(len(chunk), pa.binary())
        paths = pc.struct_field(chunk, "path").cast(pa.string())
        named = pc.if_else(pc.is_null(is_bytes), paths, None)  # beside bytes a path is only a name
    else:
        named = chunk
    where = f"of {shown(source)}, column {column!r}"
    found = [bounds.path(name, f"row {row} {where}") for row, name in enumerate(named.to_pylist(), first)]
    check_pointer(next(filter(None, found), ""))  # one stands for all: Git LFS leaves pointers of a kind of file
    confined = pa.array(found, pa.string())
    if is_bytes is None:
        return confined
    return pa.StructArray.from_arrays([is_bytes, pc.coalesce(confined, paths)], ["bytes", "path"])


def _check_name(name: Any, folder: Path, file: Path) -> None:
    root = os.path.abspath(folder)
    joined = os.path.normpath(os.path.join(root, str(name)))
    if (
        not isinstance(name, str)
        or _ELSEWHERE.match(name)
        or not (joined == root or joined.startswith(os.path.join(root, "")))
    ):
        raise ValueError(
            f"{file} names {shown(name)}, which leads out of {shown(str(folder))}; accepted are files of that folder"
        )


def _cards(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name, read in _CARDS.items():
        path = folder / name
        if path.is_file():
            try:
                metadata = read(path)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                reason = shortened(" ".join(str(error).split()), 300)
                raise ValueError(f"the metadata of {path} is not YAML: {reason}") from error
            if isinstance(metadata, dict):
                yield path, metadata


def _patterns(metadata: Mapping[str, Any]) -> Iterator[str]:
    """What the configs of a dataset's card give as files and folders."""
    configs = metadata.get("configs")
    for config in configs if isinstance(configs, list) else ():
        for key in ("data_files", "data_dir"):
            yield from _strings(config.get(key) if isinstance(config, dict) else None)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def _content(path: Path, key: str, shape: str) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {shortened(str(error), 200)}") from error
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{path} cannot be used; accepted is {shape}")
    return found
