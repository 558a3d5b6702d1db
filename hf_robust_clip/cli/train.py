"""`hf-robust-clip train`: the trainers, with every argument of theirs as a flag."""

from __future__ import annotations

import argparse
from typing import Any

from ..defences import LINES


class _MethodParser(argparse.ArgumentParser):
    """
    Stands in for the parser of a method, whose flags are known only once transformers is imported: that takes seconds,
    which the other commands, and a wrong method, need not wait for.
    """

    def __init__(self, method: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.method = method

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        from .train_flags import method_parser

        return method_parser(self.method, self.prog).parse_known_args(args, namespace)


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "train",
        help="train or fine-tune a CLIP, with a defence or without",
        description="Train a dual encoder on image-caption pairs, measure it before and after, and save it. On "
        "several GPUs: accelerate launch -m hf_robust_clip train METHOD ... The flags are those of the method: "
        "hf-robust-clip train METHOD --help.",
    )
    parser.set_defaults(run=run)
    make_parser: Any = _MethodParser
    methods = parser.add_subparsers(
        title="methods", metavar="METHOD", dest="method", required=True, parser_class=make_parser
    )
    for method, (_, text) in LINES.items():
        methods.add_parser(method, help=text, add_help=False, method=method)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    from .progress import quiet_libraries

    with quiet_libraries():
        from .train_steps import train

        return train(args)
