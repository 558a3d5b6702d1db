"""The command `hf-robust-clip`. Only what parses arguments is imported here, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..wording import shortened
from . import card, demo, evaluation, info, poison, prepare, push, scan_checkpoint, scan_pairs, train
from .output import UsageError
from .parsing import ConfigParser, Parser

#: Sub-commands, in the order of `--help`. Each module has `add_parser(commands)`, which sets `run(args) -> int`.
COMMANDS = (demo, poison, prepare, scan_pairs, scan_checkpoint, train, evaluation, card, push, info)
#: What can go wrong without being a mistake of the package's: files, the network, memory, a missing package.
FAILURES = (ValueError, OSError, RuntimeError, ImportError)


def build_parser() -> Parser:
    """The parser of the command and of its sub-commands."""
    parser = Parser(
        prog="hf-robust-clip",
        description="Train and fine-tune CLIP models that resist data poisoning and backdoors.",
    )
    parser.add_argument("--version", action="version", version=f"hf-robust-clip {__version__}")
    make_parser: Any = _make_parser
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=make_parser
    )
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv (sequence of `str`, *optional*): Its arguments; `None`: those of the process.

    Returns:
        `int`: The exit code: 0; 1 when it failed while working; 2 when the arguments, or the files that they name, do
        not allow what was asked; 130 when it was interrupted. Arguments that do not parse raise `SystemExit(2)`, as
        argparse does.
    """
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nhf-robust-clip: interrupted", file=sys.stderr)
        return 130
    except _failures() as error:
        if getattr(args, "traceback", False):
            raise
        print(shortened(f"hf-robust-clip {args.command}: error: {_one_line(error)}"), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _make_parser(required: Sequence[str] | None = None, **kwargs: Any) -> Parser:
    """A sub-command that names required arguments takes them from a configuration file, too."""
    return Parser(**kwargs) if required is None else ConfigParser(required=required, **kwargs)


def _failures() -> tuple[type[BaseException], ...]:
    """[`FAILURES`], and the errors of the Hub's client, where it is loaded: they are not all `OSError`s."""
    hub = sys.modules.get("huggingface_hub.errors")
    return FAILURES if hub is None else (*FAILURES, hub.HTTPError)


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    # A file's name or a dataset's may hold what a terminal would carry out.
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)


if __name__ == "__main__":
    sys.exit(main())
