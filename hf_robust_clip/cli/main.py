"""The command `hf-robust-clip`. Only what parses arguments is imported here, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from . import demo

#: Sub-commands, in the order of `--help`. Each module has `add_parser(commands)`, which sets `run(args) -> int`.
COMMANDS = (demo,)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and of its sub-commands."""
    parser = _Parser(
        prog="hf-robust-clip",
        description="Train and fine-tune CLIP models that resist data poisoning and backdoors.",
    )
    parser.add_argument("--version", action="version", version=f"hf-robust-clip {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, for bug reports")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv (sequence of `str`, *optional*): Its arguments; `None`: those of the process.

    Returns:
        `int`: The exit code: 0, or 2 when the arguments, the files or the installation do not allow what was asked,
        or 130 when it was interrupted. Wrong arguments raise `SystemExit(2)`, as argparse does.
    """
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nhf-robust-clip: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if args.traceback:
            raise
        print(f"hf-robust-clip {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
