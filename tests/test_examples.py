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


def run(arguments: list[str], example: str = "train_cleanclip") -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / f"{example}.py"
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
    "name, settings",
    [
        ("roclip", ["--pool_size", "16", "--matching_start_epoch", "1", "--match_every_n_epochs", "1"]),
        ("safeclip", ["--warmup_unimodal_epochs", "1", "--warmup_cross_epochs", "0", "--unimodal_pool_size", "16"]),
    ],
)
def test_pretrains_beside_its_controls(
    name: str, settings: list[str], pairs: datasets.Dataset, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        pairs.to_parquet(tmp_path / f"{split}.parquet")
    data = ["--train_data", str(tmp_path / "train.parquet"), "--eval_data", str(tmp_path / "validation.parquet")]
    settings = [
        *settings,
        "--from_scratch",
        "--image_size",
        "16",
        "--num_train_epochs",
        "2",
        "--save_strategy",
        "epoch",
    ]
    settings += ["--per_device_train_batch_size", "16", "--use_cpu", "--report_to", "none", "--logging_steps", "1"]
    settings += [
        "--poison_target",
        "eight",
        "--poison_rate",
        "0.1",
        "--targeted_images",
        "2",
        "--image_preset",
        "weak",
    ]
    settings += ["--targeted_captions", "3"]
    output = tmp_path / "run"
    done = run([*data, *settings, "--output_dir", str(output)], f"train_{name}")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    for model in ("undefended", "augmentation", name):
        assert {"clean_accuracy", "attack_success_rate", "poison_success_rate"} <= results[model].keys()
        CLIPModel.from_pretrained(output / model)
        AutoProcessor.from_pretrained(output / model)
    own = {"roclip": "distinct_matches", "safeclip": "split_auroc"}[name]
    assert any(own in entry for entry in results[f"{name}_log"])
    manifests = json.loads((output / "poisons.json").read_text())
    assert set(manifests) == {"targeted 0", "targeted 1", "backdoor"}
    assert manifests["targeted 0"]["counts"]["count"] == 3


def test_pretrains_without_an_attack(pairs: datasets.Dataset, tmp_path: Path) -> None:
    pairs.to_parquet(tmp_path / "train.parquet")
    settings = ["--train_data", str(tmp_path / "train.parquet"), "--from_scratch", "--image_size", "16", "--use_cpu"]
    settings += ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--report_to", "none"]
    done = run([*settings, "--output_dir", str(tmp_path / "run")], "train_roclip")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "run" / "poisons.json").exists()
    CLIPModel.from_pretrained(tmp_path / "run" / "roclip")


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either --model or --from_scratch"),
        (["--model", "x", "--targeted_images", "2"], "a planted attack needs --eval_data"),
    ],
)
def test_pretraining_arguments_that_make_no_sense(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(["--train_data", "pairs.parquet", "--output_dir", str(tmp_path), *arguments], "train_safeclip")
    assert done.returncode == 2
    assert message in done.stderr
