"""Arguments of the command line, and of a YAML file behind them."""

from __future__ import annotations

import argparse
import difflib
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from ..wording import MOST, listed, shortened, shown

#: Arguments that no configuration file holds.
_NO_SETTINGS = ("help", "traceback", "config", "dry_run")
#: Arguments whose values are shown nowhere.
SECRETS = ("hub_token",)
_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a mapping",
    Path: "a path",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it, and knows `--traceback`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Without a default of its own it can stand before or behind the name of the sub-command.
        self.add_argument(
            "--traceback",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show where an error comes from, for bug reports",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {shortened(' '.join(message.split()))} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, extras = super().parse_known_args(args, namespace)
        if extras:
            # Only the flags where there are any: what stands behind a mistyped one may be a token.
            flags = [extra.partition("=")[0] for extra in extras if extra.startswith("-")]
            known = [flag for action in self._actions for flag in action.option_strings if flag != "--help"]
            near = difflib.get_close_matches(flags[0], known, n=1) if flags else []
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join((flags or extras)[:MOST])}{hint}")
        return parsed, extras


class ConfigParser(Parser):
    """
    A [`Parser`] whose arguments can also stand in a YAML file: `--config FILE`, with the names of the flags, without
    dashes in front and with underscores. What is given on the command line goes before the file, and the file before
    the defaults. `--dry-run` is for the command to heed, with [`dump`].

    Args:
        required (sequence of `str`): Names that must come from either.
        hints (mapping, *optional*): Types of arguments, where they say more than the argument itself.
    """

    def __init__(self, required: Sequence[str] = (), hints: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.required, self.hints = tuple(required), dict(hints or {})
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML file of arguments: the flags' names with underscores. Flags that are given go before it",
        )
        self.add_argument(
            "--dry-run", "--dry_run", action="store_true", help="print the resulting arguments as YAML, and do no more"
        )

    @property
    def settings(self) -> dict[str, argparse.Action]:
        """The arguments that a file can hold, by name."""
        # Of several flags with one name (--x and --no_x), the first says what the default is.
        named = {action.dest: action for action in reversed(self._actions)}
        return {name: named[name] for name in reversed(named) if name not in _NO_SETTINGS}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        settings = self.settings
        # An argument that starts as None, which no flag gives, is one that was not given.
        blank = argparse.Namespace(**dict.fromkeys(settings))
        parsed, extras = super().parse_known_args(arguments, blank)
        given = {name: value for name, value in vars(parsed).items() if value is not None}
        config = self._read(given["config"]) if "config" in given else {}
        values = {name: action.default for name, action in settings.items()} | config | given
        missing = [name for name in self.required if values[name] is None]
        if missing:
            names = ["/".join(settings[name].option_strings[:1]) or name.upper() for name in missing]
            self.error("the following arguments are required: " + shortened(", ".join(names), 300))
        return argparse.Namespace(**values, parser=self), extras

    def resolved(self, args: argparse.Namespace) -> dict[str, Any]:
        """The arguments as plain data, without secrets and without those that are `None`."""
        values = {name: _plain(getattr(args, name)) for name in self.settings if name not in SECRETS}
        return {name: value for name, value in values.items() if value is not None}

    def dump(self, args: argparse.Namespace) -> str:
        """The arguments as a YAML file that `--config` takes."""
        import yaml

        text = yaml.safe_dump(self.resolved(args), sort_keys=False, allow_unicode=True)
        hidden = [name for name in SECRETS if getattr(args, name, None) is not None]
        return "".join(f"# {name} is given, and left out here\n" for name in hidden) + text

    def _read(self, path: Path) -> dict[str, Any]:
        from ..settings import read_arguments

        try:
            content, written = read_arguments(path)
        except OSError as error:
            self.error(f"--config: {path} cannot be read: {error.strerror or error}")
        except ValueError as error:
            self.error(f"--config: {error}")
        if not isinstance(content, dict):
            found = "empty" if content is None else f"a {type(content).__name__}"
            self.error(f"--config: {path} is {found}; accepted is a mapping of argument names to values")
        settings = self.settings
        return {key: self._checked(path, key, value, written.get(key), settings) for key, value in content.items()}

    def _checked(self, path: Path, key: Any, value: Any, text: Any, settings: Mapping[str, argparse.Action]) -> Any:
        if key not in settings:
            nearest = difflib.get_close_matches(str(key), settings, n=1, cutoff=0.0)[0]
            self.error(f"--config: {path}: unknown key {shown(str(key))}; did you mean {shown(nearest)}?")
        action = settings[key]
        hint = self.hints.get(key, _hint(action))
        value = _as_written(hint, value, text)
        entry = _entry(hint)
        if entry is not None and not isinstance(value, list) and not _fits(hint, value):
            alone = _as_written(entry, value, text)
            value = [alone] if _fits(entry, alone) else value
        if not _fits(hint, value):
            found = "" if key in SECRETS else f" is {shown(value)}"
            self.error(f"--config: {path}: {key}{found}; accepted is {_accepted(hint)}")
        if isinstance(value, int | float) and not isinstance(value, bool) and not _is_decimal(text, value):
            self.error(
                f"--config: {path}: {key} is {shown(text)}, which YAML takes for {value}: write a decimal number"
            )
        if value is None:
            return None
        if action.choices is not None and value not in action.choices:
            self.error(f"--config: {path}: {key} is {shown(value)}; accepted are {listed(list(action.choices))}")
        if float in _alternatives(hint) and isinstance(value, str) and str not in _alternatives(hint):
            return float(value)
        if key not in self.hints and callable(action.type) and action.type not in (int, float):
            try:
                return [action.type(entry) for entry in value] if isinstance(value, list) else action.type(value)
            except argparse.ArgumentTypeError as error:
                self.error(f"--config: {path}: {key}: {error}")
        return value


def _plain(value: Any) -> Any:
    """The same of what YAML and JSON have."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _hint(action: argparse.Action) -> Any:
    """The type of an argument's value."""
    if action.nargs == 0:
        return bool
    single: Any = action.type if action.type in (int, float) else str
    several = isinstance(action, argparse._AppendAction)
    hint = list[single] if several else single
    return hint if action.default is not None else hint | None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value, as YAML has it, is of a type."""
    if len(_alternatives(hint)) > 1:
        return any(_fits(alternative, value) for alternative in _alternatives(hint))
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(get_args(hint)[0], entry) for entry in value)
    if hint is float and isinstance(value, str):
        return _is_number(value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    return isinstance(value, origin or hint)


def _as_written(hint: Any, value: Any, text: Any) -> Any:
    """A value; where a string is accepted, and YAML made something else of it, the text that is written there."""
    if isinstance(value, list):
        entry = _entry(hint)
        return value if entry is None else [_as_written(entry, *pair) for pair in zip(value, text, strict=True)]
    if value is None or isinstance(value, Mapping) or _fits(hint, value):
        return value
    return text if _fits(hint, text) else value


def _entry(hint: Any) -> Any:
    """The type of a list's entries; `None` where no list is accepted."""
    return next((get_args(argument)[0] for argument in _alternatives(hint) if get_origin(argument) is list), None)


def _is_decimal(text: Any, value: float) -> bool:
    """Whether a number is what a flag would make of its text: YAML takes 010 for 8, and 1:30 for 90."""
    try:
        found = int(text) if isinstance(value, int) else float(str(text).replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return False
    return found == value or value != value


def _is_number(text: str) -> bool:
    """A number in quotes is one as well."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _accepted(hint: Any) -> str:
    return " or ".join(dict.fromkeys(_phrases(_alternatives(hint))))


def _phrases(alternatives: Iterable[Any]) -> Iterable[str]:
    for hint in alternatives:
        if hint is type(None):
            yield "null"
        elif get_origin(hint) is list:
            yield f"a list, each of it {_accepted(get_args(hint)[0])}"
        elif get_origin(hint) is Literal:
            yield from map(str, get_args(hint))
        elif isinstance(hint, type) and issubclass(hint, Enum):
            yield f"one of {', '.join(str(member.value) for member in hint)}"
        else:
            yield _NAMES.get(get_origin(hint) or hint, str(getattr(hint, "__name__", hint)))
