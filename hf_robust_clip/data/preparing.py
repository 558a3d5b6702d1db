"""Image-caption pairs decoded and resized once: a dataset on disk that trains as its source does."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..columns import ROW_INDEX, has_transform
from ..kinds import kind, wrong_dataset
from ..locking import sole_writer
from ..models import check_processor
from ..wording import listed, shown
from .confining import check_path
from .images import ImagePreprocessor
from .rows import (
    ON_BAD_ROW,
    BadRowError,
    IndexedDataset,
    OnBadRow,
    check_dataset,
    decode_row,
)
from .shards import RECORD_FILE, Shard, finish, is_finished, record_of, write_shard

logger = logging.get_logger(__name__)

IMAGE_FORMATS = ("ppm", "png")
#: Rows of a record batch: few, since they hold images.
_GROUP = 64


def prepare_dataset(
    dataset: datasets.Dataset,
    processor: Any,
    folder: str | os.PathLike[str],
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    image_format: str = "ppm",
    rows_per_shard: int = 2048,
    num_proc: int | None = None,
    on_bad_row: OnBadRow = "raise",
) -> datasets.Dataset:
    """
    Decode and resize image-caption pairs once, and keep them in a folder.

    Training on the result is, to the bit, training on the source: images are of the size that the model's own image
    processor leaves alone, in a format without loss, and captions and all other columns are as they were.

    The folder is written shard by shard, each under its name only once it is whole. After an interruption, the same
    call goes on where it stopped; once all is done, it returns at once. Of several processes that make the same call,
    one works while the others wait; a folder that a training or another command writes to is refused. The folder loads
    with `datasets.load_from_disk`, too.

    Args:
        dataset (`datasets.Dataset`):
            With an image and a caption, or a list of captions, a row.
        processor (`transformers.ProcessorMixin`):
            Of the model that will be trained.
        folder (`str` or path):
            A new or empty folder, or that of an earlier call.
        image_column, caption_column (`str`, default to `"image"` and `"caption"`):
            Names of the columns.
        image_format (`str`, defaults to `"ppm"`):
            `"ppm"` is read fastest, and takes 3 bytes a pixel: 150 kB for 224 x 224. `"png"` takes about half of that
            for photos, and several times as long to read.
        rows_per_shard (`int`, defaults to 2048):
            Rows in a file, which one process makes, and which an interruption may cost each of them.
        num_proc (`int`, *optional*):
            Processes that decode, beside this one; the result is the same for any number. `None`: this one does.
        on_bad_row (`str`, defaults to `"raise"`):
            `"raise"`, or `"skip"`: leave unusable rows out, and list them in a warning and in `prepared.json`. The
            rows behind them move up, so that what is drawn for a row is no longer what is drawn for it in the source.

    Returns:
        `datasets.Dataset`: The rows in order, with all columns; `image_column` is a `datasets.Image`.

    Raises:
        `ValueError`: If the dataset, the image processor or another argument cannot be used, or the folder was made
            by another call: the message says in what it differs.
        [`~data.rows.BadRowError`]: If a row cannot be used and `on_bad_row="raise"`; it names the row.
    """
    _check_arguments(dataset, folder, image_format, rows_per_shard, num_proc, on_bad_row)
    check_dataset(dataset, image_column, caption_column, "dataset", on_bad_row)
    check_processor(processor, "processor")
    preparation = _Preparation(dataset, processor, (image_column, caption_column), image_format, on_bad_row)
    folder = Path(folder)
    made_from = {**preparation.made_from(), "rows_per_shard": rows_per_shard, "on_bad_row": on_bad_row}
    starts = range(0, len(dataset), rows_per_shard)
    names = [f"data-{number:05d}-of-{len(starts):05d}.arrow" for number in range(len(starts))]  # as of `datasets`
    with sole_writer(folder, "folder", "a preparation", wait=True):
        record = record_of(folder, made_from)
        wanted = {
            name: range(start, min(start + rows_per_shard, len(dataset)))
            for name, start in zip(names, starts, strict=True)
            if name not in record.shards
        }
        for name, shard in _write_shards(folder, wanted, preparation, num_proc):
            record.shards[name] = shard
            record.write(folder)
        if wanted or not is_finished(folder, names):
            finish(folder, names, preparation.features, dataset)
    bad = [row for name in names for row in record.shards[name].bad_rows]
    if len(bad) == len(dataset):
        raise BadRowError(
            f"none of the {len(dataset)} rows of dataset can be used; see {shown(str(folder / RECORD_FILE))}"
        )
    if bad:
        logger.warning(
            f"{len(bad)} unusable rows of dataset were left out: {listed(bad)}. {RECORD_FILE} lists them all"
        )
    prepared: datasets.Dataset = datasets.load_from_disk(str(folder))
    if len(prepared) != len(dataset) - len(bad):
        raise ValueError(
            f"folder={shown(str(folder))} holds {len(prepared)} rows where {len(dataset) - len(bad)} were prepared: "
            "its shards are not those that were written. Give another folder, or delete this one"
        )
    return prepared


class _Preparation(torch.utils.data.Dataset[Any]):
    """Makes shards, in worker processes: indexed by the path of one and its rows, so that little has to come back."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Any,
        columns: tuple[str, str],
        image_format: str,
        on_bad_row: OnBadRow,
    ) -> None:
        self.dataset = dataset
        self.rows = IndexedDataset(dataset, *columns)
        self.columns = columns
        self.preprocess = ImagePreprocessor(processor.image_processor)
        self.image_format = image_format
        self.on_bad_row = on_bad_row
        if self.preprocess.kept_size is None:
            raise ValueError(
                f"processor: {type(processor.image_processor).__name__} leaves images of no size as they are, so that "
                "it would change prepared images again; prepare_dataset takes one that resizes to the size it crops to"
            )
        self.features = dataset.features.copy()
        self.features[columns[0]] = datasets.Image()

    def made_from(self) -> dict[str, Any]:
        """All that the result depends on, as plain data."""
        image_processor = self.preprocess.image_processor
        found = {
            "dataset": {
                "fingerprint": self.dataset._fingerprint,
                "rows": len(self.dataset),
                "features": self.dataset.features.to_dict(),
            },
            "image_column": self.columns[0],
            "caption_column": self.columns[1],
            "image_format": self.image_format,
            "image_size": dict(zip(("width", "height"), self.preprocess.kept_size or (), strict=False)),
            "image_processor": {"class": type(image_processor).__name__, **image_processor.to_dict()},
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    def __getitem__(self, shard: tuple[Path, range]) -> Shard | BadRowError:
        path, rows = shard
        bad: list[int] = []
        tables = (self._table(rows[i : i + _GROUP], bad) for i in range(0, len(rows), _GROUP))
        try:
            count = write_shard(path, self.features.arrow_schema, tables)
            return Shard(rows=count, bytes=path.stat().st_size, bad_rows=bad)
        except BadRowError as error:
            # Raised here, it would keep the loader alive in its traceback, and with it the other processes.
            return error

    def _table(self, numbers: Sequence[int], bad_rows: list[int]) -> pa.Table:
        """These rows as they are stored, without those that cannot be used, which are added to `bad_rows`."""
        kept, images = [], []
        for row in self.rows.__getitems__(numbers):
            try:
                decoded = decode_row(row, *self.columns)
            except BadRowError:
                if self.on_bad_row == "raise":
                    raise
                bad_rows.append(row[ROW_INDEX])
                continue
            kept.append(row[ROW_INDEX])
            images.append({"bytes": self._encoded(decoded[self.columns[0]]), "path": None})
        schema = self.features.arrow_schema
        others = self.dataset.with_format("arrow").remove_columns(self.columns[0])[kept]
        columns = [
            pa.array(images, field.type) if field.name == self.columns[0] else others[field.name] for field in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def _encoded(self, image: Image.Image) -> bytes:
        pixels = self.preprocess([image])[0]  # (3, H, W)
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, self.image_format.upper())
        return buffer.getvalue()


def _check_arguments(
    dataset: Any, folder: Any, image_format: str, rows_per_shard: int, num_proc: int | None, on_bad_row: str
) -> None:
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"folder must be the path of a folder, but is {kind(folder)}")
    check_path(os.path.abspath(folder))
    if os.path.isfile(folder):
        raise ValueError(
            f"folder={shown(str(folder))} is a file; accepted is a new or empty folder, or that of a same call"
        )
    if not isinstance(dataset, datasets.Dataset):
        needed = "a datasets.Dataset, whose rows can be read again after an interruption"
        raise wrong_dataset("dataset", dataset, needed)
    if has_transform(dataset):
        raise ValueError(
            "dataset has a transform (with_transform), which makes other rows at each visit; apply it with map, or "
            "remove it with with_format(None)"
        )
    for name, value, accepted in (
        ("image_format", image_format, IMAGE_FORMATS),
        ("on_bad_row", on_bad_row, ON_BAD_ROW),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {listed(accepted)}, but is {shown(value)}")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, but is {shown(rows_per_shard)}")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc must be None or at least 1, but is {shown(num_proc)}")


def _write_shards(
    folder: Path, wanted: Mapping[str, range], preparation: _Preparation, num_proc: int | None
) -> Iterator[tuple[str, Shard]]:
    """Write these shards, and yield the name and the record of each as soon as it is whole, in order."""
    loader: DataLoader[Any] = DataLoader(
        preparation,
        batch_size=1,
        sampler=[(folder / name, rows) for name, rows in wanted.items()],
        num_workers=min(num_proc or 0, len(wanted)),
        collate_fn=itemgetter(0),
        generator=torch.Generator(),  # its own, or the workers' seed would be drawn from the global one
    )
    total = sum(map(len, wanted.values()))
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=total, desc="Preparing rows", unit="row", leave=False, disable=None if total else True) as bar:
        for (name, rows), shard in zip(wanted.items(), loader, strict=True):
            if isinstance(shard, BadRowError):
                raise shard
            bar.update(len(rows))
            yield name, shard
