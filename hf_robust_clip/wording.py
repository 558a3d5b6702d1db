"""How messages show what they speak of, so that they end: long values are cut, long lists are counted."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Any

#: The longest message of this package, in characters.
LONGEST = 600
#: How many entries of a list a message shows.
MOST = 10

_CUT = reprlib.Repr()
_CUT.maxstring = _CUT.maxother = _CUT.maxlong = 80
_CUT.maxlist = _CUT.maxtuple = _CUT.maxset = _CUT.maxfrozenset = _CUT.maxdict = _CUT.maxarray = 4


def shown(value: Any) -> str:
    """The `repr` of a value of any size, on one line: at most 80 characters of a string, the middle left out."""
    return shortened(_CUT.repr(value).replace("\n", " "), 160)


def listed(values: Collection[Any], most: int = MOST, longest: int = 30) -> str:
    """What a message shows of a list: `"'a', 'b' and 12 more"`, so many entries at most, each cut to `longest`."""
    first = [shortened(repr(value), longest) for _, value in zip(range(most), values, strict=False)]
    more = len(values) - len(first)
    return ", ".join(first) + (f" and {more:,} more" if more else "") if first else "none"


def shortened(text: str, most: int = LONGEST) -> str:
    """A text of at most so many characters, the middle left out where it is longer."""
    if len(text) <= most:
        return text
    tail = (most - 3) // 2
    return f"{text[: most - 3 - tail]}...{text[len(text) - tail :]}"


def said(error: BaseException, most: int = LONGEST) -> str:
    """What an error of a library says, after its kind, in one line of at most so many characters."""
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()), most)
