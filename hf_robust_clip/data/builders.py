"""What makes a dataset of tables, and of images with a file each for their caption, for the cache and for streams."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.arrow import arrow
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet import parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.table import table_cast
from datasets.utils.file_utils import xopen

from .. import __version__
from ..files import check_pointer
from ..wording import listed, shortened, shown
from .confining import check_path, whole_paths
from .tables import BATCH_ROWS, READERS, table_kind, text_of

#: The column with the path of an image in a table that lies with images.
FILE_NAME = "file_name"


@dataclass
class TablesConfig(datasets.BuilderConfig):
    """
    How tables are read.

    Args:
        features (`datasets.Features`, *optional*): Of the dataset, by default what the first table has.
        sep, delimiter (`str`, *optional*): What parts the fields of CSV files, by default what their header shows.
        names, column_names (list of `str`, *optional*): Of the columns of CSV files without a header.
        of_images (`bool`): Whether `file_name` and `*_file_name` are the columns `image` and `*`.
        within (mapping, *optional*): Of each split, the images that its rows name; rows that name others are not its
            own. `None`: all rows of its tables are.
    """

    features: datasets.Features | None = None
    sep: str | None = None
    delimiter: str | None = None
    names: list[str] | None = None
    column_names: list[str] | None = None
    of_images: bool = False
    within: Mapping[str, Sequence[str]] | None = None


class InFolder(datasets.ArrowBasedBuilder):
    """
    Mixed into what reads tables: every image is in the table, or a file in the folder of the source, whose path there
    starts at the table's own folder.
    """

    root: str
    image_column: str

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        splits: list[datasets.SplitGenerator] = super()._split_generators(dl_manager)
        if self.image_column in self.info.features:
            self.info.features = datasets.Features({**self.info.features, self.image_column: datasets.Image()})
        return splits

    def _generate_tables(self, files: Sequence[str], **options: Any) -> Iterator[tuple[Key, pa.Table]]:
        images = [name for name, feature in self.info.features.items() if isinstance(feature, datasets.Image)]
        rows: Counter[int] = Counter()
        for key, table in super()._generate_tables(files, **options):
            number = key.original_shard_id
            file = files[number].split("::")[-1]  # without the gzip:// of a compressed one
            for name in images:
                where = f"{shown(file)}, column {shown(name)}"
                paths = whole_paths(table[name], self.root, os.path.dirname(file), where, rows[number])
                table = table.set_column(table.column_names.index(name), table.schema.field(name), paths)
            rows[number] += len(table)
            yield key, table


class Parquet(InFolder, parquet.Parquet):
    """A dataset of Parquet files."""


class Arrow(InFolder, arrow.Arrow):
    """A dataset of Arrow files."""


class _Tables(datasets.ArrowBasedBuilder):
    BUILDER_CONFIG_CLASS = TablesConfig
    inferred: datasets.Features | None = None

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        dl_manager.download_config.extract_on_the_fly = True
        splits = dl_manager.extract(dl_manager.download(self.config.data_files))
        for files in splits.values():
            tables = (table for file in files for table in self._read(file, None))
            table = next(filter(len, tables), None)
            if table is None:
                raise no_rows(files)
            if self.info.features is None:
                self.info.features = self.inferred = datasets.Features.from_arrow_schema(table.schema)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": list(files), "split": split})
            for split, files in splits.items()
        ]

    def _generate_tables(self, files: Sequence[str], *, split: str) -> Iterator[tuple[Key, pa.Table]]:
        features = self.info.features
        for number, file in enumerate(files):
            for batch, table in enumerate(self._read(file, self.inferred, split)):
                if set(table.column_names) != set(features):
                    raise ValueError(
                        f"{shortened(file, 200)} has the columns {listed(table.column_names)}, and the first table "
                        f"has {listed(features)}; accepted are tables of the same columns"
                    )
                if len(table):  # `datasets` casts no column without chunks
                    yield Key(number, batch), table_cast(table.select(list(features)), features.arrow_schema)

    def _read(self, file: str, features: datasets.Features | None, split: str | None = None) -> Iterator[pa.Table]:
        config = self.config
        images = None if config.within is None or split is None else frozenset(config.within[split])
        for table in read_table(
            file,
            delimiter=config.sep or config.delimiter,
            names=config.names or config.column_names,
            features=None if features is None or config.of_images else features,
        ):
            if config.of_images:
                if images is not None:
                    own = [path in images for path in named_images(file, table)]
                    table = table.filter(pa.array(own, pa.bool_()))
                table = table.rename_columns([_column_of_images(name) for name in table.column_names])
            yield table


class Tables(InFolder, _Tables):
    """A dataset of the rows of CSV, TSV, JSON, JSON Lines and Parquet files, as [`tables`] reads them."""


class Images(ImageFolder):
    """[`ImageFolder`] whose tables, as archives have them, are read as all others are."""

    def _read_metadata(self, metadata_file: str, metadata_ext: str = "") -> Iterator[pa.Table]:
        return read_table(metadata_file)


class Captioned(datasets.ArrowBasedBuilder):
    """A dataset of images, by their paths, and of the caption that stands in a file of its own beside each."""

    def _info(self) -> datasets.DatasetInfo:
        text = datasets.Value("string")
        return datasets.DatasetInfo(features=datasets.Features({"image": text, "caption": text}))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(
                name=split,
                gen_kwargs={"folders": [list(group) for _, group in itertools.groupby(images, key=os.path.dirname)]},
            )
            for split, images in self.config.data_files.items()
        ]

    def _generate_tables(self, folders: Sequence[Sequence[str]]) -> Iterator[tuple[Key, pa.Table]]:
        for number, images in enumerate(folders):
            for start in range(0, len(images), BATCH_ROWS):
                batch = images[start : start + BATCH_ROWS]
                captions = [read_caption(next(filter(os.path.isfile, caption_files(image)))) for image in batch]
                yield Key(number, start), pa.table([batch, captions], self.info.features.arrow_schema)


def make_builder(
    kind: str,
    files: Mapping[str, Sequence[str]],
    root: str,
    image_column: str,
    features: datasets.Features | None = None,
    **options: Any,
) -> Any:
    """
    What makes a dataset of files, each of which is one file, whatever characters are in its name.

    Args:
        kind (`str`), files (mapping): A key of [`BUILDERS`], and the paths of each split.
        root (`str`), image_column (`str`): The folder that the paths of images in that column must not lead out of.
        features (`datasets.Features`, *optional*), **options: Of the config of the builder.

    Raises:
        `ValueError`: If an option is unknown, a path has "::" in it, or a file is a pointer of Git LFS.
    """
    origin = f"{root} {image_column} "
    found = DataFilesDict({split: _listing(paths, kind, origin) for split, paths in files.items()})
    cls = BUILDERS[kind]
    accepted = {item.name for item in fields(cls.BUILDER_CONFIG_CLASS)}
    unknown = sorted(set(options) - accepted)  # a folder for the cache among them, which is not the card's to choose
    if unknown:
        own = accepted.difference(item.name for item in fields(datasets.BuilderConfig))
        raise ValueError(f"the config of {kind} has {listed(unknown)}; accepted are {listed(sorted(own))}")
    builder: Any = cls(dataset_name=kind, hash=__version__, data_files=found, features=features, **options)
    builder.root, builder.image_column = root, image_column
    return builder


#: What makes a dataset, by the kind of its files.
BUILDERS: dict[str, Any] = {
    "tables": Tables,
    "parquet": Parquet,
    "arrow": Arrow,
    "captioned": Captioned,
    "imagefolder": Images,
    "webdataset": WebDataset,
}


def no_rows(files: Iterable[str]) -> ValueError:
    """The error for a split whose files are empty, or hold a header alone."""
    names = listed(list(files), most=3, longest=120)
    return ValueError(f"there are no rows in {names}; accepted are files with at least one row beneath their header")


def caption_files(image: str) -> list[str]:
    """What the file with an image's caption may be called, as kohya and img2dataset call it."""
    return [os.path.splitext(image)[0] + suffix for suffix in (".txt", ".json")]


def read_table(path: str, **options: Any) -> Iterator[pa.Table]:
    """The rows of a table, whatever its kind."""
    kind = table_kind(path)
    if kind == ".parquet":
        with xopen(path, "rb") as file:  # which opens members of archives
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
                yield pa.Table.from_batches([batch])
    elif kind in READERS:
        yield from READERS[kind](path, **options)
    else:
        raise ValueError(f"{shortened(path, 200)} is not a table; accepted are {listed([*READERS, '.parquet'])}")


def read_caption(path: str) -> str | None:
    """A file's caption of its image: all of a text, stripped, or `caption` in JSON; `ValueError` for other files."""
    text = text_of(path)
    if not path.lower().endswith(".json"):
        return text.strip()
    try:
        caption = json.loads(text)["caption"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{shortened(path, 200)} is not a JSON object with a 'caption'") from error
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{shortened(path, 200)}: 'caption' is {type(caption).__name__}; accepted is a text")
    return caption


def named_images(file: str, table: pa.Table) -> list[str | None]:
    """The paths of the images that the rows of a table name, one a row; `ValueError` without a column for them."""
    column = next((name for name in table.column_names if _column_of_images(name) != name), None)
    if column is None:
        raise ValueError(
            f"{shortened(file, 200)} lies with images and has no column {shown(FILE_NAME)} with their "
            f"paths; its columns are {listed(table.column_names)}"
        )
    folder = os.path.dirname(file)
    names = table[column].to_pylist()
    return [None if name is None else os.path.normpath(os.path.join(folder, str(name))) for name in names]


def _column_of_images(name: str) -> str:
    return "image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}")


def _listing(paths: Sequence[str], kind: str, about: str) -> DataFilesList:
    """Files with what tells `datasets` that one has changed since it was cached."""
    origins: list[tuple[str]] = []
    for path in paths:
        beside = filter(os.path.isfile, caption_files(path)) if kind == "captioned" else ()
        origin = about
        for file in (check_path(path), *beside):
            check_pointer(Path(file))
            stat = os.stat(file)
            origin += f"{file} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_size} "
        origins.append((origin,))
    return DataFilesList(list(paths), origins)
