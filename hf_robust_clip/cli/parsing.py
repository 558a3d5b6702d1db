"""Arguments of the command line, and of a YAML file behind them."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from ..wording import MOST, shortened, shown

#: Arguments that no configuration file holds.
_NO_SETTINGS = ("help", "traceback", "config", "dry_run")
#: Arguments whose values are shown nowhere.
SECRETS = ("hub_token",)


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
        self.exit(2, f"{self.prog}: error: {shortened(' '.join(message.split()), 500)} (see {self.prog} --help)\n")

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
    dashes in front and with underscores. The command line overrides the file, and the file overrides the defaults.
    `--dry-run` is for the command to heed, with [`dump`].

    Args:
        required (sequence of `str`): Names that must come from either.
        structures (mapping, *optional*): Of the names of arguments that a file can give a `dict` or a `list`, which
            no flag can, to these types.
    """

    def __init__(
        self, required: Sequence[str] = (), structures: Mapping[str, Collection[type]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.required, self.structures = tuple(required), structures or {}
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
        # No flag gives None: an argument that still is None was not on the command line.
        blank = argparse.Namespace(**dict.fromkeys(settings))
        parsed, extras = super().parse_known_args(arguments, blank)
        # Of names without a flag, of which there may be none, argparse makes an empty list.
        from_flags = {name: value for name, value in vars(parsed).items() if value is not None and value != []}
        config = self._read(from_flags["config"]) if "config" in from_flags else {}
        # A default that is text is what the flag makes of it, as argparse has it.
        defaults = {
            name: self._get_value(action, action.default) if isinstance(action.default, str) else action.default
            for name, action in settings.items()
        }
        values = defaults | config | from_flags
        missing = [name for name in self.required if values[name] in (None, [])]
        if missing:
            names = ["/".join(settings[name].option_strings[:1]) or name.upper() for name in missing]
            self.error("the following arguments are required: " + shortened(", ".join(names), 300))
        return argparse.Namespace(**values, parser=self), extras

    def resolved(self, args: argparse.Namespace) -> dict[str, Any]:
        """The arguments as plain data, without secrets and without those that are `None`."""
        values = {name: _for_yaml(getattr(args, name)) for name in self.settings if name not in SECRETS}
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
        values, settings = {}, self.settings
        for (key, value), text in zip(content.items(), written.values(), strict=True):
            if key not in settings:
                nearest = difflib.get_close_matches(str(key), settings, n=1, cutoff=0.0)[0]
                self.error(f"--config: {path}: unknown key {shown(str(key))}; did you mean {shown(nearest)}?")
            try:
                values[key] = self._value(settings[key], value, text)
            except argparse.ArgumentError as error:
                self.error(f"--config: {path}: {error}")
        return values

    def _value(self, action: argparse.Action, value: Any, text: Any) -> Any:
        """What an argument is by its value in a file, which flags would be given as `text`."""
        if type(value) in self.structures.get(action.dest, ()):
            return value if isinstance(value, dict) else text
        several = isinstance(action, argparse._AppendAction) or action.nargs in ("+", "*")
        texts = text if several and isinstance(text, list) else [text]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise argparse.ArgumentError(action, f"it is {shown(text)}; accepted is true or false")
            return value
        if value is None and action.default is None:
            return None
        if value is None or not all(isinstance(one, str) for one in texts):
            found = "null" if value is None else f"a {type(value).__name__}"
            raise argparse.ArgumentError(action, f"it is {found}; accepted is what the flag takes")
        values = [self._get_value(action, one) for one in texts]
        for one in values:
            self._check_value(action, one)
        return values if several else values[0]


def _for_yaml(value: Any) -> Any:
    """The same of what YAML and JSON have."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # as a flag has it, which YAML's .inf is not
    if isinstance(value, Mapping):
        return {str(key): _for_yaml(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_for_yaml(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
