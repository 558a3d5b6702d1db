"""Tables of pairs read as they are written: CSV, TSV, JSON and JSON Lines, in which text stays text."""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
from datasets.utils.file_utils import xopen

from ..columns import POISONED
from ..wording import listed, shortened, shown

#: Rows that are held at a time.
BATCH_ROWS = 10_000
_FLAGS = {"": None, "true": True, "1": True, "false": False, "0": False}


def read_csv(
    path: str, delimiter: str | None = None, names: Sequence[str] | None = None, **_: Any
) -> Iterator[pa.Table]:
    """
    A CSV or TSV file, every cell as the text that stands there, and an empty one as missing. Of a column `poisoned`
    the words true, false, 1 and 0 are booleans.

    Args:
        path (`str`): In UTF-8, with or without a byte order mark. A line without a filled cell is passed over.
        delimiter (`str`, *optional*): By default a tab in a `.tsv` file, and else the first of comma, tab and
            semicolon that separates the names in the header.
        names (sequence of `str`, *optional*): Of the columns, where the file has no header.

    Yields:
        `pyarrow.Table`: Of at most [`BATCH_ROWS`] rows.

    Raises:
        `ValueError`: If a row has more or fewer fields than the header, if its quotes do not close, or if the file is
            not UTF-8. It names the line that the row starts at, from 1.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Python's limit of 128 kB is less than a long caption
    with xopen(path, encoding="utf-8-sig", newline="") as file:
        delimiter = delimiter or _delimiter(path, file)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = list(names or _header(path, next(_csv_rows(path, reader, (), delimiter), (1, []))[1]))
        rows = _csv_rows(path, reader, header, delimiter)
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            lines, cells = zip(*batch, strict=True)
            columns = zip(*cells, strict=True)
            arrays = [_csv_column(path, name, column, lines) for name, column in zip(header, columns, strict=True)]
            yield pa.Table.from_arrays(arrays, names=header)


def read_json(path: str, features: datasets.Features | None = None, **_: Any) -> Iterator[pa.Table]:
    """
    A JSON file: an object a line, a list of objects, or one object of lists, which are the columns. Text stays text,
    also where it looks like a date.

    Args:
        path (`str`): In UTF-8.
        features (`datasets.Features`, *optional*): What the columns are, by default what the first [`BATCH_ROWS`] rows
            have in them. A column of several types there is a `datasets.Json`.

    Yields:
        `pyarrow.Table`: Of at most [`BATCH_ROWS`] rows, whose schema has their features.

    Raises:
        `ValueError`: If it is not such a file. It names the row, from 0, or the line, from 1.
    """
    rows = _json_rows(path)
    first = 0
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        if features is None:
            names = list(dict.fromkeys(name for row in batch for name in row))
            features = datasets.Features({name: _json_feature([row.get(name) for row in batch]) for name in names})
        unknown = {name for row in batch for name in row}.difference(features)
        where = f"{shortened(path, 200)}, rows {first:,} to {first + len(batch) - 1:,}"
        if unknown:
            raise ValueError(
                f"{where} have {listed(sorted(unknown))}, which the first rows lack; accepted are rows that have "
                "what the first have: give these columns in one of them, with null"
            )
        arrays = [_json_column(where, name, [row.get(name) for row in batch], features) for name in features]
        yield pa.Table.from_arrays(arrays, schema=features.arrow_schema)
        first += len(batch)


#: What reads a table, by how its file is called.
READERS: dict[str, Callable[..., Iterator[pa.Table]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
}


def table_kind(path: str) -> str:
    """By which suffix a file is read: the last, or that before the one of a compression."""
    stem, suffix = os.path.splitext(path.split("::")[0].lower())  # of a member of an archive its own
    return os.path.splitext(stem)[1] if suffix in (".gz", ".bz2", ".xz", ".zst", ".lz4") else suffix


def text_of(path: str) -> str:
    """A text file in UTF-8, with or without a byte order mark. `ValueError` if it is in another encoding."""
    try:
        with xopen(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _not_utf8(path: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{shortened(path, 200)} is not UTF-8: {error.reason}; save it as UTF-8")


def _csv_rows(path: str, reader: Any, header: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each row with the line that it starts at. One is as long as the header, if there is one yet."""
    line, width = reader.line_num + 1, len(header)
    try:
        for row in reader:
            if any(row):
                if width and len(row) != width:
                    raise ValueError(
                        f"{shortened(path, 200)}, line {line} has {len(row)} fields where the header has {width}; "
                        f"accepted are as many, parted by {shown(delimiter)}. A field with that in it goes in double "
                        "quotes"
                    )
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{shortened(path, 200)}, line {line}: {error}; a field that starts with a double quote ends with "
            "one, and those inside of it are doubled"
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _delimiter(path: str, file: Any) -> str:
    """What parts the header of a file, which is read from its start again."""
    if table_kind(path) == ".tsv":
        return "\t"
    for delimiter in (",", "\t", ";"):
        file.seek(0)
        try:
            header = next(csv.reader(file, delimiter=delimiter), [])
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
        file.seek(0)
        if len(header) > 1:
            if any("\t" in name for name in header):
                raise ValueError(
                    f"{shortened(path, 200)}: its header has both {shown(delimiter)} and tabs in it; call it "
                    ".tsv if its fields are parted by tabs"
                )
            return delimiter
    return ","


def _header(path: str, row: Sequence[str]) -> list[str]:
    names = [name or f"Unnamed: {i}" for i, name in enumerate(row)]  # as pandas calls them
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice or any("\0" in name for name in names):
        wrong = (
            f"it has {listed(twice)} more than once" if twice else "it has none" if not names else "it is not UTF-8"
        )
        raise ValueError(
            f"{shortened(path, 200)}: {wrong}; accepted is a header that names each column once, in UTF-8"
        )
    return names


def _csv_column(path: str, name: str, cells: Sequence[str], lines: Sequence[int]) -> Any:
    if name != POISONED:
        return pa.array([cell or None for cell in cells], pa.string())
    flags = []
    for cell, line in zip(cells, lines, strict=True):
        if cell.lower() not in _FLAGS:
            raise ValueError(
                f"{shortened(path, 200)}, line {line}: {shown(name)} is {shown(cell)}; accepted are true, "
                "false, 1 and 0"
            )
        flags.append(_FLAGS[cell.lower()])
    return pa.array(flags, pa.bool_())


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        with xopen(path, encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            alone = not any(line.strip() for line in file)  # one object on one line may be of columns
            whole = alone or first.lstrip().startswith("[") or not _is_json(first)
            file.seek(0)
            if whole:
                yield from _rows_of(shortened(path, 200), _parsed(shortened(path, 200), file.read()))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from _rows_of(where := f"{shortened(path, 200)}, line {number}", [_parsed(where, line)])
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _rows_of(where: str, content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        columns = list(content.values())
        if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            content = [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
        else:
            content = [content]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(
            f"{where} is {shown(content)}; accepted are objects, one a line or in a list, or an object of lists of "
            "one length"
        )
    yield from content


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON: {shortened(str(error), 200)}") from error


def _json_feature(values: Sequence[Any]) -> Any:
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return datasets.Json()
    if pa.types.is_null(array.type):
        return datasets.Json()  # which any value fits that comes later
    return datasets.Features.from_arrow_schema(pa.schema({"it": array.type}))["it"]


def _has_fields_of(kind: pa.DataType, other: pa.DataType) -> bool:
    """Whether a type has every field of another; pyarrow leaves out the others."""
    if pa.types.is_struct(other) and pa.types.is_struct(kind):
        names = {field.name for field in kind}
        return all(field.name in names and _has_fields_of(kind.field(field.name).type, field.type) for field in other)
    if pa.types.is_list(other) and pa.types.is_list(kind):
        return _has_fields_of(kind.value_type, other.value_type)
    return True


def _json_column(where: str, name: str, values: Sequence[Any], features: datasets.Features) -> Any:
    kind = features.arrow_schema.field(name).type
    try:
        if isinstance(features[name], datasets.Json):
            texts = [None if value is None else json.dumps(value) for value in values]
            return pa.array(texts, pa.string()).cast(kind)
        if pa.types.is_nested(kind) and not _has_fields_of(kind, pa.infer_type(values)):
            raise ValueError("its objects have fields that those of the first rows lack")
        return pa.array(values, kind)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise ValueError(
            f"{where}, column {shown(name)}: {shortened(str(error), 200)}; the first rows have {features[name]} there"
        ) from error
