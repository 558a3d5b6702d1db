"""`hf-robust-clip card`: the model card of a trained model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import RUN_FILE
from ..record import Measured, RunRecord, checked
from ..wording import shortened, shown
from .output import UsageError, say, usage_errors


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "card",
        help="write the model card of a trained model",
        description="Write README.md for a model that a trainer saved, from the record of its run, which is next "
        "to it. A README.md that a person wrote stays.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=f"folder with the model and its {RUN_FILE}")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="FILE",
        help="metrics of this model to add, or of a control, as `hf-robust-clip evaluate --json FILE` writes them; "
        "may be repeated",
    )
    parser.add_argument("--license", metavar="NAME", help="license of the weights, such as mit")
    parser.add_argument("--repo-id", metavar="REPO_ID", help="where the model is, or will be, on the Hub: name/model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    with usage_errors("FOLDER"):
        record = RunRecord.load(args.folder)
    measured = [_read_results(path, args.folder, args.repo_id) for path in args.results or ()]
    # What follows imports transformers, which takes seconds.
    from .progress import quiet_cards, quiet_libraries

    with quiet_libraries(), quiet_cards():
        from ..telling import write_card

        with usage_errors():
            written = write_card(
                record,
                args.folder,
                license=args.license,
                repo_id=args.repo_id,
                measured=measured,
            )
    if not written:
        raise FileExistsError(
            f"{args.folder / 'README.md'} was not written by hf_robust_clip and stays; move or delete it first"
        )
    say(f"Written: {args.folder / 'README.md'}")
    return 0


def _read_results(path: Path, folder: Path, repo_id: str | None) -> Measured:
    """Metrics of the model in `folder`, or of a control, and what they are of, as `evaluate --json` writes them."""
    try:
        # NaN and the infinities count as not measured.
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except OSError as error:
        raise UsageError(
            f"--results: {shortened(str(path), 200)} cannot be read: {error.strerror or error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(shortened(f"--results: {path} is not JSON: {error}")) from error
    with usage_errors():
        measured = checked(Measured, content, f"--results: {shortened(str(path), 200)}")
    own = [folder.resolve().name, *([repo_id] if repo_id is not None else [])]
    if measured.control is None and measured.model not in own:
        names = shortened(" or ".join(map(shown, own)), 200)
        raise UsageError(
            f"--results: {shortened(str(path), 120)} is of {shown(measured.model)}, and the card of {names}: "
            "accepted are metrics of the same model, whose name on the Hub --repo-id gives, and those of another one "
            "that was measured with evaluate --control LABEL"
        )
    return measured
