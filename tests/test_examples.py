"""The examples run as their docstrings say, on a few digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from transformers import AutoProcessor, CLIPModel

ROOT = Path(__file__).parents[1]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "train_cleanclip.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_plants_a_backdoor_and_cleans_it(pairs: datasets.Dataset, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        pairs.to_parquet(tmp_path / f"{split}.parquet")
    settings = ["--from_scratch", "--image_size", "16", "--poison_epochs", "1", "--num_train_epochs", "1"]
    settings += ["--per_device_train_batch_size", "16", "--use_cpu", "--report_to", "none", "--poison_rate", "0.1"]
    data = ["--train_data", str(tmp_path / "train.parquet"), "--eval_data", str(tmp_path / "validation.parquet")]
    output = tmp_path / "run"
    done = run([*data, *settings, "--poison_target", "eight", "--output_dir", str(output)])
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    for name in ("poisoned", "finetuned", "cleanclip"):
        assert {"clean_accuracy", "clean_balanced_accuracy", "attack_success_rate"} <= results[name].keys()
        CLIPModel.from_pretrained(output / name)
        AutoProcessor.from_pretrained(output / name)
    assert len(json.loads((output / "poisons.json").read_text())["indices"]) == 6
    settings = ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu", "--report_to", "none"]
    settings += ["--poison_target", "eight", "--poison_rate", "0", "--poison_trigger", "sinusoid"]
    done = run([*data, *settings, "--model", str(output / "poisoned"), "--output_dir", str(tmp_path / "second")])
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    assert {"before", "finetuned", "cleanclip"} <= results.keys()
    assert not (tmp_path / "second" / "poisons.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either --model, or --from_scratch with --poison_target"),
        (["--model", "x", "--poison_target", "eight"], "--poison_target needs --eval_data"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(["--train_data", "pairs.parquet", "--output_dir", str(tmp_path), *arguments])
    assert done.returncode == 2
    assert message in done.stderr
