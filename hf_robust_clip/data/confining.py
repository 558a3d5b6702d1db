"""What a source of pairs may name: files in its own folder, or below it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from huggingface_hub import metadata_load

from ..files import check_pointer
from ..settings import read_settings
from ..wording import listed, shortened, shown

#: What says which files a folder of data is made of, for `load_dataset`.
_CARDS = {"README.md": metadata_load, ".huggingface.yaml": read_settings}
#: The same of a folder made with `save_to_disk`.
STATE_FILE = "state.json"


def whole_paths(images: pa.ChunkedArray, root: str, start: str, where: str, first: int = 0) -> pa.ChunkedArray:
    """
    A column of `datasets.Image` in which every path that would be opened is absolute, and lies in a folder.

    Paths are judged by their names, without a look at the disk for each of millions: a link in the folder is its
    owner's doing. Next to bytes a path is only a name.

    Args:
        images (`pa.ChunkedArray` of structs): With `bytes` and `path`.
        root (`str`), start (`str`): The folder that paths must not lead out of, and that where relative ones start.
        where (`str`), first (`int`): For messages: the file and the column, and the number of the first row there.

    Raises:
        `ValueError`: If a path leads out. It names the row.
    """
    chunks, is_same = [], True
    for chunk in images.chunks:
        held, paths = (pc.struct_field(chunk, name) for name in ("bytes", "path"))
        opened = pc.if_else(pc.is_null(held), paths, None)
        if opened.null_count < len(chunk):
            found = [_inside(name, root, start, f"row {row} of {where}") for row, name in enumerate(opened, first)]
            for path in list(filter(None, found))[:1]:
                check_pointer(Path(path))  # one for all: Git LFS leaves pointers of a kind of file
            whole = pc.coalesce(pa.array(found, pa.string()), paths)
            chunk, is_same = pa.StructArray.from_arrays([held, whole], ["bytes", "path"]), False
        chunks.append(chunk)
        first += len(chunk)
    return images if is_same else pa.chunked_array(chunks, images.type)


def _inside(path: pa.StringScalar, root: str, start: str, where: str) -> str | None:
    name = path.as_py()
    if name is None:
        return None
    whole = os.path.normpath(os.path.join(start, name))
    if not whole.startswith(os.path.join(root, "")) or "://" in name:
        raise ValueError(
            f"{where}: {shown(name)} leads out of {shown(root)}; accepted are files in that "
            "folder or below it. A list of images in several places goes into a folder above them all"
        )
    if "::" in whole:
        raise ValueError(f"{where}: {shown(name)} has '::' in it, which parts several files; rename the image")
    return whole


def card_of(folder: Path) -> dict[str, Any]:
    """The metadata in the cards of a folder, as `datasets` reads them: the later counts."""
    card: dict[str, Any] = {}
    for name, read in _CARDS.items():
        path = folder / name
        if path.is_file():
            try:
                metadata = read(path)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                reason = shortened(" ".join(str(error).split()), 300)
                raise ValueError(f"the metadata of {path} is not YAML: {reason}") from error
            card.update(metadata if isinstance(metadata, dict) else {})
    return card


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


def stored_files(folder: Path) -> list[str]:
    """The files that the `state.json` of a folder lists; `ValueError` if it cannot be used, or one leads out."""
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
