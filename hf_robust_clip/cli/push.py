"""`hf-robust-clip push`: a trained model onto the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import check_pulled
from ..weight_names import check_names
from .output import UsageError, say, usage_errors

#: What is left out: checkpoints, what only training resumes from, and pickled arguments with local paths in them.
LEFT_OUT = (
    *("_*", "*/_*", ".*", "*/.*", "checkpoint-*", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*"),
    *("trainer_state.json", "training_args.bin", "robust_clip_state.safetensors", "robust_clip_stream.json"),
    "global_step*",
)


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "push",
        help="upload a trained model to the Hub",
        description="Upload the folder of a trained model, without its checkpoints and optimizer states. The token is "
        "that of `hf auth login`, or in the environment variable HF_TOKEN.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with the model and its processor")
    parser.add_argument("repo_id", metavar="REPO_ID", help="such as name/model; created if there is none")
    parser.add_argument("--private", action="store_true", help="if it is created, then as a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; created if there is none")
    parser.add_argument("--message", default="Upload model", help="message of the commit (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    check_model_folder(args.folder)
    url = push(args.folder, args.repo_id, args.private, args.revision, args.message)
    say(f"{args.folder} is at {url}")
    return 0


def check_model_folder(folder: Path) -> None:
    """`UsageError` for a folder without a model or adapters in it, or with what nobody could load."""
    if not folder.is_dir():
        raise UsageError(f"FOLDER: {folder} is not a folder")
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UsageError(f"FOLDER: {folder} has neither a config.json nor an adapter_config.json: it holds no model")
    with usage_errors("FOLDER"):
        check_pulled(folder)
        for weights in folder.glob("*model*.safetensors"):
            check_names(weights)


def push(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """
    Upload a folder, and return the address of the repository.

    Raises:
        `UsageError`: If `repo_id` cannot be the name of a repository.
        `OSError`: If there is no token, the Hub refuses it, or the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    with usage_errors("REPO_ID"):
        validate_repo_id(repo_id)
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(LEFT_OUT),
        )
    except LocalTokenNotFoundError as error:
        raise OSError("there is no token: log in with `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        reason = {
            401: "the Hub refuses the token, or there is none: log in with `hf auth login`, or set HF_TOKEN",
            403: f"the token does not give the right to write to {repo_id}",
        }.get(error.response.status_code)
        if reason is None:
            raise
        raise OSError(reason) from error
    return str(repo)
