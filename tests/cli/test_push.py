"""`push` uploads a model and nothing else, and says in one line why it could not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from support.stand_in import BAD_TOKEN, READ_TOKEN, WRITE_TOKEN, HubStandIn

from hf_robust_clip.cli.main import main

ROOT = Path(__file__).parents[2]
MODEL = {
    "config.json": "{}",
    "model.safetensors": save({"logit_scale": torch.zeros(2000)}).decode(),
    "tokenizer.json": "{}",
    "README.md": "---\nlicense: mit\n---\n\n# A model\n",
    "results.json": "{}",
    "robust_clip_run.json": "{}",
}
LEFT_OUT = (
    *("checkpoint-5/model.safetensors", "checkpoint-5/optimizer.pt", "_private/notes.txt", "_notes.txt", ".hidden"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "trainer_state.json"),
    *("robust_clip_state.safetensors", "robust_clip_stream.json"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {**MODEL, **dict.fromkeys(LEFT_OUT, "left out")}.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "model"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


def push(hub: HubStandIn, folder: Path, *flags: str, token: str | None = WRITE_TOKEN) -> Any:
    # The client reads its settings when it is imported, so that each push is a process of its own.
    home = folder.parent / "home"
    return subprocess.run(
        [sys.executable, "-m", "hf_robust_clip", "push", str(folder), *flags],
        env={**os.environ, **hub.environment(home, token), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_model_is_uploaded_and_nothing_else(hub: HubStandIn, folder: Path) -> None:
    done = push(hub, folder, "tester/model", "--private", "--message", "A defended model")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/tester/model" in done.stdout
    uploaded = {name: content.decode() for name, content in hub.files("tester/model").items()}
    uploaded.pop(".gitattributes", None)
    assert uploaded == MODEL
    assert hub.repositories["tester/model"].private
    # A second push, to a branch that is not there yet.
    (folder / "results.json").write_text("[]")
    done = push(hub, folder, "tester/model", "--revision", "second")
    assert done.returncode == 0, done.stderr
    assert hub.files("tester/model", "second")["results.json"] == b"[]"
    assert hub.files("tester/model")["results.json"] == b"{}"
    assert WRITE_TOKEN.encode() not in b"".join(hub.contents())


@pytest.mark.parametrize(
    "token, expected",
    [
        (BAD_TOKEN, "the Hub refuses the token, or there is none: log in with `hf auth login`, or set HF_TOKEN"),
        (READ_TOKEN, "the token does not give the right to write to tester/model"),
        (None, "hf auth login"),
    ],
)
def test_a_refusal_is_one_line(token: str | None, expected: str, hub: HubStandIn, folder: Path) -> None:
    hub.create("tester/model")
    done = push(hub, folder, "tester/model", token=token)
    assert done.returncode == 1
    assert done.stderr.startswith("hf-robust-clip push: error: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert token is None or token not in done.stdout + done.stderr


def test_folders_without_a_model(tmp_path: Path, folder: Path, capsys: Any) -> None:
    assert main(["push", str(tmp_path), "tester/model"]) == 2
    assert main(["push", str(tmp_path / "none"), "tester/model"]) == 2
    assert main(["push", str(folder), "no/such/name"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "holds no model" in errors[0] and "REPO_ID" in errors[2]


def test_a_folder_that_nobody_could_load(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"_orig_mod.logit_scale": torch.ones(())}, tmp_path / "model.safetensors")
    # Adapters have the prefix of PEFT rightly.
    save_file({"base_model.model.logit_scale": torch.ones(())}, tmp_path / "adapter_model.safetensors")
    assert main(["push", str(tmp_path), "tester/model"]) == 2
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    assert main(["push", str(tmp_path), "tester/model"]) == 2
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert main(["push", str(tmp_path), "tester/model"]) == 2
    errors = capsys.readouterr().err.splitlines()
    for error, reason in zip(errors, ("put there by torch.compile", "is cut short", "`git lfs pull`"), strict=True):
        assert reason in error
