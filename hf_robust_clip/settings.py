"""Settings from a YAML file, which may be anyone's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

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

    def flatten_mapping(self, node: Any) -> None:
        """Nor merges (<<), which want aliases."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            # YAML forbids it, and PyYAML takes the last.
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", node.start_mark)
        return mapping


# 1e-5 is the number that it is: YAML 1.1 wants a dot in it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _TextLoader(_Loader):
    """Leaves every value the text that it is."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def read_arguments(path: Path) -> tuple[Any, Any]:
    """
    What a YAML file of arguments holds, as [`read_settings`] has it, and the same with every value as it is written:
    YAML takes `no` for false, `007` for 7 and `2024-01-01` for a date.
    """
    content = _content(path)
    return _loaded(path, content, _Loader), _loaded(path, content, _TextLoader)


def read_settings(path: Path) -> Any:
    """
    What a YAML file holds: mappings, lists, texts, numbers, dates and `None`.

    Args:
        path (`Path`): Of a file in UTF-8, of at most [`LARGEST`] bytes.

    Raises:
        `ValueError`: If it is not such a file. The message has the number of the line, but not the line: a token may
            stand in it.
        `OSError`: If it cannot be read.
    """
    return _loaded(path, _content(path), _Loader)


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST:,} bytes; accepted is a file of settings")
    return content


def _loaded(path: Path, content: bytes, loader: type[_Loader]) -> Any:
    try:
        return yaml.load(content.decode(), Loader=loader)  # nosec B506 # derives from SafeLoader
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: it is not text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(
            f"{path} is not YAML{where}: {getattr(error, 'problem', None) or 'it is not text'}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is not YAML of settings: its entries are nested too deeply") from error
    # A date such as 2001-99-99, or an integer of thousands of digits: YAML passes the error on as it is; and it trips
    # over a value that does not fit the type that is written before it, such as "!!bool maybe" or "!!int ''".
    except (ValueError, OverflowError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not YAML: a value has the form of a number or a date, but is not one") from error
