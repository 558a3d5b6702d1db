"""What a folder of files is as pairs: which files are which split, what reads them, and which are left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import escape, has_magic
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import (
    SPLIT_KEYWORDS,
    _get_data_files_patterns,
    sanitize_patterns,
)
from datasets.info import DatasetInfosDict
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from fsspec.utils import glob_translate

from ..files import check_pointer
from ..locking import LOCK_FILES
from ..wording import listed, shown
from .builders import caption_files, make_builder, named_images, read_caption, read_table
from .confining import card_of, check_path
from .tables import READERS, table_kind

_TABLES = (*READERS, ".parquet")
#: Files without pairs, which nobody misses.
_ABOUT = ("README", "LICENSE", "CITATION", "POISON_MANIFEST")
_IGNORED = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
#: What reads a file, by its suffix. Archives are of images.
_MODULES = {
    **dict.fromkeys(ImageFolder.EXTENSIONS, "imagefolder"),
    **{".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"},
    **{".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"},
}
#: What the name of a file has in it that tells its split.
_SPLIT = re.compile("|".join(word for words in SPLIT_KEYWORDS.values() for word in words))


class Folder:
    """
    The pairs in a folder.

    Args:
        path (`Path`): The folder. Its `README.md` and `.huggingface.yaml` may say which files are which split, as
            `datasets` has it; else their names and those of their folders do.

    Attributes:
        files (`dict`): Of each split the absolute paths that [`builder`] makes it of.
        kind (`str`): `"tables"`, `"captioned"` for images with a file each for their caption, or the name of what
            reads it in `datasets`.
        rows (`dict`): How many rows each split has, where the card tells.
        left_out (`list`): The names of the files that are not read.

    Raises:
        `ValueError`: If it has no files of pairs, or it is not clear which they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = check_path(os.path.abspath(path))
        self._names = _names(self._root)
        card = card_of(path)
        config = _default_config(path, card)
        self._options = {
            key: value
            for key, value in config.items()
            if key not in ("config_name", "data_files", "data_dir", "default", "description", "version")
        }
        infos = DatasetInfosDict.from_dataset_card_data(card)
        info = infos.get(config.get("config_name", "default"), datasets.DatasetInfo())
        self._features = info.features
        self.rows = {name: split.num_examples for name, split in (info.splits or {}).items()}
        self._used: set[str] = set()
        self._of_images = False
        names = self._set_files(config)
        used = self._used.union(*self.files.values())
        absolute = self._absolute(names)
        self.left_out = [
            name for name, path in zip(names, absolute, strict=True) if path not in used and not self._is_no_loss(name)
        ]

    def builder(self, image_column: str) -> Any:
        """What makes the dataset of the folder."""
        about = {} if self.kind == "captioned" else {"features": self._features, **self._options}
        return make_builder(self.kind, self.files, self._root, image_column, **about)

    def _set_files(self, config: Mapping[str, Any]) -> list[str]:
        """Find out what is read. Returns the names of the files that were in question."""
        data_files = config.get("data_files")
        start = os.path.normpath(config.get("data_dir") or ".")
        if data_files is None:
            names = [name for name in self._names if start == "." or name.startswith(f"{start}/")]
            absent = [start] if start != "." and not names else []
        else:
            data_files = sanitize_patterns(data_files)
            patterns = {split: [self._relative(pattern) for pattern in some] for split, some in data_files.items()}
            named = [pattern for some in patterns.values() for pattern in some]
            names = _matched(self._names, named)
            absent = [name for name in named if name not in names and (name.startswith("..") or not has_magic(name))]
        if absent:
            raise ValueError(f"the card of {self._shown} names {listed(absent)}, which it does not have")
        images = [name for name in names if _is_image(name)]
        tables = [name for name in names if images and _is_of_images(name)]
        captions = {} if tables else self._captions(images, names)
        # What has an image's name is about it, and is not a table.
        about = {*tables, *(file for image in images for file in caption_files(image))}
        self.kind = self._kind([name for name in names if name not in about and not self._is_known(name)])
        read = [name for name in names if _MODULES.get(table_kind(name)) == self.kind and not self._is_known(name)]
        if data_files is None:
            patterns = _split_patterns(read, start, of_images=self.kind == "imagefolder")
        splits = {split: _matched(read, some) for split, some in patterns.items()}
        splits = {split: some for split, some in splits.items() if some}
        if self.kind == "imagefolder" and captions:
            self._set_captions(splits, images, captions)
        elif self.kind == "imagefolder" and tables:
            self._set_tables({split: _matched(tables, some) for split, some in patterns.items()}, tables, splits)
        else:
            self.kind = "tables" if self.kind in ("csv", "json") else self.kind
            self.files = {split: self._absolute(some) for split, some in splits.items()}
        return names

    def _set_captions(
        self, splits: Mapping[str, Sequence[str]], images: Sequence[str], captions: Mapping[str, str]
    ) -> None:
        """Images with a file each that holds their caption."""
        bare = [name for name in images if name not in captions]
        if bare:
            raise ValueError(
                f"{self._shown} has images with a text file each that holds their caption, and {len(bare):,} without: "
                f"{listed(bare)}; accepted is one for each"
            )
        self.kind, self._of_images = "captioned", True
        self.files = {split: self._absolute(some) for split, some in splits.items()}
        self._used = {file for image in self._absolute(images) for file in caption_files(image)}

    def _set_tables(
        self, own: Mapping[str, Sequence[str]], tables: Sequence[str], splits: Mapping[str, Sequence[str]]
    ) -> None:
        """Images with tables that name them: those in the folders of the splits, or those above them."""
        self.kind, self._of_images = "tables", True
        inside = {name for some in own.values() for name in some}
        above = [name for name in tables if name not in inside]
        if len({os.path.dirname(name) for name in tables}) < len(tables) or (inside and above):
            raise ValueError(
                f"{self._shown} has several tables of the same images, {listed(tables)}; accepted are one in the "
                "folder of each split, or one above them all"
            )
        self._options = {**self._options, "of_images": True}
        self.files = {split: self._absolute(above or some) for split, some in own.items() if some or split in splits}
        for table in self._absolute(tables):
            check_pointer(Path(table))
            self._used.update(path for batch in read_table(table) for path in named_images(table, batch) if path)
        if above:
            within = {split: self._absolute(some) for split, some in splits.items()}
            lost = sorted(self._used.difference(*within.values()))
            if lost:
                raise ValueError(
                    f"{listed(above)} of {self._shown} names {len(lost):,} images that are in none of its splits "
                    f"{listed(splits)}: {listed([os.path.relpath(path, self._root) for path in lost])}"
                )
            self._options["within"] = within

    def _captions(self, images: Sequence[str], names: Iterable[str]) -> dict[str, str]:
        """Of each image the name of the file with its caption, if there is one."""
        is_there = set(names).__contains__
        found = {image: next(filter(is_there, caption_files(image)), None) for image in images}
        captions = {image: file for image, file in found.items() if file is not None}
        first = next(iter(captions.values()), "")
        if first.endswith(".json"):  # a file each may be of other annotations
            try:
                read_caption(os.path.join(self._root, first))
            except ValueError:
                return {}
        return captions

    def _kind(self, names: Sequence[str]) -> str:
        """What reads most of the files."""
        modules = Counter(filter(None, (_MODULES.get(table_kind(name)) for name in names)))
        if not modules:
            raise ValueError(
                f"{self._shown} has no files of pairs; it has {listed(self._names)}. Accepted are images with their "
                f"captions, tables ({', '.join(_TABLES)}), .arrow and .tar files"
            )
        # Of as many files of two kinds tables are read, since they may name the others.
        return max(modules, key=lambda module: (modules[module], module != "imagefolder", module))

    def _is_known(self, name: str) -> bool:
        """Whether img2dataset wrote it to tell of a shard, 00000 or 00000.tar."""
        stem = re.fullmatch(r"((?:.*/)?\d+)(_stats\.json|\.parquet)", name)
        return stem is not None and (
            os.path.isdir(os.path.join(self._root, stem[1]))
            or os.path.isfile(os.path.join(self._root, stem[1] + ".tar"))
        )

    def _is_no_loss(self, name: str) -> bool:
        """Whether nobody misses a file that is not read. Images beside ordinary tables are what these name."""
        beside = _is_image(name) and self.kind != "imagefolder" and not self._of_images
        return beside or os.path.splitext(os.path.basename(name))[0].upper() in _ABOUT or self._is_known(name)

    def _relative(self, pattern: str) -> str:
        return os.path.relpath(os.path.normpath(os.path.join(self._root, pattern)), self._root)

    def _absolute(self, names: Iterable[str]) -> list[str]:
        return [os.path.join(self._root, name) for name in names]

    @property
    def _shown(self) -> str:
        return shown(str(self.path))


def may_hold_captions(name: str) -> bool:
    """Whether it may be a table of captions, or of other annotations, by its name."""
    return os.path.splitext(name)[1].lower() in (*_TABLES, ".xml", ".xlsx", ".arrow")


def _names(root: str) -> list[str]:
    """
    The files of a folder and of those below it, hidden ones aside, with / in their names. Links to folders, which are
    not followed, end in one.
    """
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        inside = os.path.join(folder[len(root) :].strip(os.sep), "").replace(os.sep, "/")
        found += [f"{inside}{name}/" for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [inside + name for name in files if not name.startswith(".") and name not in (*_IGNORED, *LOCK_FILES)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS


def _is_of_images(name: str) -> bool:
    """Whether it is a table that lies with images, by its name."""
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    return stem == "metadata" and suffix in _TABLES


def _default_config(path: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    configs = [config for config in card.get("configs") or () if isinstance(config, dict)]
    chosen = [
        config
        for config in configs
        if len(configs) == 1 or config.get("config_name") == "default" or config.get("default")
    ]
    if configs and len(chosen) != 1:
        raise ValueError(
            f"the card of {shown(str(path))} has the configs {listed([c.get('config_name') for c in configs])}, and "
            f"{len(chosen)} of them are the default; accepted is one"
        )
    return chosen[0] if chosen else {}


def _matched(names: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """The names that fit one of the patterns, or are one."""
    everything, found = set(names), {}
    for pattern in patterns:
        fits = re.compile(glob_translate(pattern)).match
        found.update(dict.fromkeys([pattern] if pattern in everything else filter(fits, names)))
    return list(found)


def _split_patterns(names: Sequence[str], start: str, of_images: bool) -> dict[str, list[str]]:
    """
    The patterns by which `datasets` tells splits. Images are of one by their folders, or by their own names if all of
    them are: "a test.jpg" among others is a picture of a test.
    """
    prefix = "" if start == "." else f"{escape(start)}/"

    def found(names: Sequence[str]) -> dict[str, list[str]]:
        patterns: Mapping[str, Sequence[str]] = _get_data_files_patterns(lambda p: _matched(names, [prefix + p]))
        return {str(split): [prefix + pattern for pattern in some] for split, some in patterns.items()}

    if not of_images:
        return found(names)
    patterns = found(sorted({os.path.join(os.path.dirname(name), "0") for name in names}))
    if patterns.get("train") == [f"{prefix}**"] and all(map(_SPLIT.search, names)):
        by_names = found(names)
        if len(_matched(names, [pattern for some in by_names.values() for pattern in some])) == len(names):
            return by_names
    return patterns
