"""Settings from a YAML file, which may be anyone's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

#: Largest file that is read, in bytes: settings are a few kB.
LARGEST = 1_000_000


class _Loader(yaml.SafeLoader):
    """Plain data only, and no aliases: nine lines of them stand for a billion entries, which an error would print."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not accepted here", mark)
        return super().compose_node(parent, index)


def read_settings(path: Path) -> Any:
    """
    What a YAML file holds: mappings, lists, texts, numbers, dates and `None`.

    Args:
        path (`Path`): Of a file in UTF-8, of at most [`LARGEST`] bytes.

    Raises:
        `ValueError`: If it is no such file. The message has the line's number, and nothing of the line, in which a
            token may stand.
        `OSError`: If it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST:,} bytes; accepted is a file of settings")
    try:
        return yaml.load(content.decode(), Loader=_Loader)  # nosec B506 # derives from SafeLoader
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no YAML: it is not text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path} is no YAML{where}: {getattr(error, 'problem', None) or 'it is not text'}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no YAML of settings: its entries are nested too deeply") from error
    # A date such as 2001-99-99, or an integer of thousands of digits: YAML passes the error on as it is; and it trips
    # over a value that does not fit the type that is written before it, such as "!!bool maybe" or "!!int ''".
    except (ValueError, OverflowError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is no YAML: one of its values is no number or date of the form that it has"
        ) from error
