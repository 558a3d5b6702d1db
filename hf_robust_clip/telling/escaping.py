"""Text from data, made safe for Markdown, for its tables, and for code on a card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..wording import shortened

#: Characters of the longest text in the front matter.
LONGEST = 2_000

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$!])")
#: What at the beginning of a line makes a list, a rule or a heading of it.
_OPENING = re.compile(r"^([-+=](?![\w.])|\d+(?=[.)](\s|$)))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Markdown(str):
    """Text that is Markdown already. Whatever else a template prints is escaped."""

    __slots__ = ()


def one_line(text: Any) -> str:
    """A text without line breaks, control characters and what reverses its direction, each a space."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())


def escaped(value: Any) -> Markdown:
    """A value as Markdown that reads as it stands, in a table as well; [`Markdown`] stays as it is."""
    if isinstance(value, Markdown):
        return value
    text = _SPECIAL.sub(r"\\\1", one_line(value))
    text = _OPENING.sub(lambda found: f"\\{found[0]}" if found[0] in "-+=" else f"{found[0]}\\", text)
    return Markdown("".join(_ENTITIES.get(sign, sign) for sign in text))


def fenced(text: str, language: str = "") -> Markdown:
    """A text in a block of code, behind a fence that it cannot close."""
    text = "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def literal(text: str) -> str:
    """A text as a string in Python without a backtick or an angle bracket in it."""
    quoted = json.dumps(one_line(text), ensure_ascii=False)
    return "".join(f"\\u{ord(sign):04x}" if sign in "<>&`" else sign for sign in quoted)


def tidy(value: Any) -> Any:
    """A value for the front matter: texts on one line of at most [`LONGEST`], and no entries that are `None`."""
    if isinstance(value, Mapping):
        return {one_line(key): tidy(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [tidy(entry) for entry in value if entry is not None]
    # The pixels of a trigger are one text.
    return shortened(one_line(value), LONGEST) if isinstance(value, str) else value
