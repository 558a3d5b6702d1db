"""Arguments of another kind than what is accepted: what they are, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from os import PathLike
from typing import Any

from .wording import listed, shortened, shown

#: Tables of other libraries, by the package and the name of their class, and how a dataset is made of one.
_TABLES = {
    ("pandas", "DataFrame"): "datasets.Dataset.from_pandas({})",
    ("polars", "DataFrame"): "datasets.Dataset.from_polars({})",
    ("pyarrow", "Table"): "datasets.Dataset({})",
}


def kind(value: Any) -> str:
    """What a value is, for a message: short ones themselves, others by their class."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    if value is None or isinstance(value, str | bytes | PathLike | int | float):
        return shown(value)
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def is_rows(value: Any) -> bool:
    """Whether something has rows that are asked for by their number: a map-style dataset, a list."""
    numbered = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return (
        numbered and not isinstance(value, Mapping | str | bytes | type) and not is_stream(value) and not _table(value)
    )


def is_stream(value: Any) -> bool:
    """Whether it is an iterable dataset of torch or of `datasets`. They have a `__getitem__` that only raises."""
    return any(cls.__name__ == "IterableDataset" for cls in type(value).__mro__)


def wrong_dataset(argument: str, value: Any, accepted: str) -> ValueError:
    """The error for what is given in place of a dataset, with what to write where that is known."""
    instead = _instead(argument, value)
    return ValueError(shortened(f"{argument} must be {accepted}, but is {kind(value)}{instead and f': {instead}'}"))


def text_list(argument: str, values: Any, accepted: str) -> list[str]:
    """Texts of a list, a tuple, an array or a `datasets.ClassLabel`; `ValueError` for others, and what is not text."""
    names = getattr(values, "names", None)
    is_label = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    entries = names if is_label else values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(entries, Iterable) or isinstance(entries, str | bytes | Mapping | Set):
        raise ValueError(f"{argument} must be {accepted}, but is {shown(values)}")
    texts = list(entries)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{argument} must be {accepted}, but has {shown(text)} at place {number}")
        check_encodable(argument, text)
    return texts


def check_callable(argument: str, value: Any, accepted: str) -> Any:
    """The value, which must be a function or an object that can be called; `ValueError` for others, and a class."""
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"{argument} must be {accepted}, but is {kind(value)}")
    return value


def check_string(argument: str, value: Any) -> str:
    """The value, which must be a string; `ValueError` for others."""
    if not isinstance(value, str):
        raise ValueError(f"{argument} must be a string, but is {kind(value)}")
    return value


def check_encodable(argument: str, text: str) -> None:
    """`ValueError` for half of a pair of surrogates, which no tokenizer, file or table takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument}: {shown(text)} cannot be encoded: {error.reason}") from error


def _instead(argument: str, value: Any) -> str:
    """What to write to get a dataset of such a value; nothing where that is not known."""
    if isinstance(value, str | PathLike):
        return f"load it with load_pairs({shown(str(value))})"
    if isinstance(value, Mapping):
        if all(isinstance(entry, Sequence) for entry in value.values()):
            return f"make a dataset of its columns with datasets.Dataset.from_dict({argument})"
        name = shown(next(iter(value)))
        return f"it has {listed(value)}; pass one of them, such as {argument}[{name}]"
    if table := _table(value):
        return f"write {_TABLES[table].format(argument)}"
    if is_stream(value):
        return "load it without streaming=True, or read it into memory with datasets.Dataset.from_list(list(rows))"
    if hasattr(value, "collate_fn") and hasattr(value, "dataset"):
        return "pass the dataset that it makes batches of"
    if isinstance(value, Iterator):
        return "it can be read only once; make a dataset of its function with datasets.Dataset.from_generator"
    if isinstance(value, list | tuple) and all(isinstance(row, Mapping) for row in value[:1]):
        return f"write datasets.Dataset.from_list({argument})"
    return ""


def _table(value: Any) -> tuple[str, str] | None:
    """The package and the class of a table that is not a dataset."""
    names = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(value).__mro__)
    return next((name for name in names if name in _TABLES), None)
