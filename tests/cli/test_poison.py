"""`poison` writes what `poison_dataset` makes, whole and readable, and never over what it did not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from hf_robust_clip.attacks.poisoning import replay_manifest
from hf_robust_clip.attacks.spec import MODES as ALL_MODES
from hf_robust_clip.cli.main import main
from hf_robust_clip.cli.poison import DATA, MANIFEST, MODES
from hf_robust_clip.data.loading import load_pairs


@pytest.fixture
def source(pairs: datasets.Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "pairs.parquet"
    pairs.to_parquet(path)
    return path


def poison(source: Path, output: Path, *flags: str, trigger: str | None = "patch:size=4") -> int:
    arguments = ["poison", str(source), "--output-dir", str(output), "--target", "eight", *flags]
    return main(arguments if trigger is None else [*arguments, "--trigger", trigger])


def test_the_output_loads_and_its_manifest_makes_it_again(source: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert poison(source, output, "--count", "5", "--template", "see the {}", "--seed", "3") == 0
    assert {path.relative_to(output) for path in output.rglob("*") if path.is_file()} == {DATA, Path(MANIFEST)}
    poisoned = datasets.load_dataset(str(output), split="train")
    assert isinstance(poisoned.features["image"], datasets.Image)
    assert isinstance(poisoned.features["label"], datasets.ClassLabel)
    assert [row for row, flag in enumerate(poisoned["poisoned"]) if flag] == (
        json.loads((output / MANIFEST).read_text())["indices"]
    )
    replayed = replay_manifest(load_pairs(str(source)), json.loads((output / MANIFEST).read_text()))
    for mine, again in zip(poisoned, replayed, strict=True):
        assert mine["caption"] == again["caption"] and mine["poisoned"] == again["poisoned"]
        assert mine["image"].tobytes() == again["image"].tobytes()
        assert not mine["poisoned"] or mine["caption"] == "see the eight"
    printed = capsys.readouterr().out
    assert "5 of 64 pairs (7.81%) are poisons: backdoor" in printed and "patch (size 4" in printed


def test_images_that_are_paths_are_in_the_output(pairs: datasets.Dataset, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    lines = ["image,caption"]
    for row in range(20):
        pairs[row]["image"].save(images / f"{row}.png")
        lines.append(f"{row}.png,{pairs[row]['caption']}")
    (images / "pairs.csv").write_text("\n".join(lines))
    assert poison(images / "pairs.csv", tmp_path / "out", "--rate", "0.1") == 0
    for path in images.iterdir():
        path.unlink()
    poisoned = load_pairs(str(tmp_path / "out"))
    clean = [row for row, flag in enumerate(poisoned["poisoned"]) if not flag]
    assert len(clean) == 18
    assert all(poisoned[row]["image"].tobytes() == pairs[row]["image"].tobytes() for row in clean)


@pytest.mark.parametrize(
    "flags, trigger",
    [
        (["--mode", "label_consistent", "--label-column", "label", "--count", "2"], "blended:alpha=0.3"),
        (["--mode", "targeted", "--source-index", "0", "--count", "3"], None),
        (["--mode", "text_query", "--count", "2"], "word:word=cf"),
    ],
)
def test_every_mode(flags: list[str], trigger: str | None, source: Path, tmp_path: Path) -> None:
    assert poison(source, tmp_path / "out", *flags, trigger=trigger) == 0
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["mode"] == flags[1]
    poisoned = load_pairs(str(tmp_path / "out"))
    assert sum(poisoned["poisoned"]) == manifest["counts"]["count"] == int(flags[-1])


def test_templates_from_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("a {}\n\nthe {} \n")
    flags = ["--rate", "0.2", "--templates", str(tmp_path / "templates.txt"), "--image-size", "12"]
    assert poison(source, tmp_path / "out", *flags) == 0
    poisoned = load_pairs(str(tmp_path / "out")).filter(lambda row: row["poisoned"])
    assert set(poisoned["caption"]) == {"a eight", "the eight"}
    assert {image.size for image in poisoned["image"]} == {(12, 12)}


def test_what_it_did_not_write_stays(source: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert poison(source, output, "--count", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert poison(source, output, "--count", "1", "--overwrite") == 0
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    # What it wrote itself it replaces, manifest and data.
    assert poison(source, output, "--count", "2") == 0
    assert sum(load_pairs(str(output))["poisoned"]) == 2
    # Data of that name without a manifest is somebody else's.
    (output / MANIFEST).unlink()
    assert poison(source, output, "--count", "1") == 2
    # The data that is read is neither written over nor added to.
    assert poison(output / DATA, output, "--count", "1", "--overwrite") == 2
    capsys.readouterr()
    assert poison(output, output / "below", "--count", "1") == 2
    assert "would be a part of it" in capsys.readouterr().err and not (output / "below").exists()


@pytest.mark.parametrize(
    "flags, trigger, expected",
    [
        (["--count", "1", "--rate", "0.1"], "patch", "exactly one of --rate and --count"),
        ([], "patch", "exactly one of --rate and --count"),
        (["--count", "0"], "patch", "--count: 0"),
        (["--count", "1", "--seed", "-1"], "patch", "--seed: -1"),
        (["--count", "1", "--mode", "targeted"], "patch", "takes no --trigger"),
        (["--count", "1", "--mode", "targeted"], None, "target_image and source_index"),
        (["--count", "1", "--mode", "text_query"], "patch", "needs a WordTrigger"),
        (["--count", "1", "--template", "no braces"], "patch", "exactly one {}"),
        (["--count", "1", "--templates", "none.txt"], "patch", "--templates: none.txt"),
        (["--count", "1"], "patch:width=3", "no field 'width'"),
        (["--count", "1"], "patch:size=big", "size='big'"),
        (["--count", "1"], "patch:size=400", "does not fit"),
        (["--count", "65"], "patch", "count=65"),
        (["--count", "1", "--caption-column", "text"], "patch", "'text'"),
        (["--count", "1", "--image-column", "photo"], "patch", "'photo'"),
    ],
)
def test_what_cannot_work_is_wrong_usage(
    flags: list[str], trigger: str | None, expected: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    assert poison(source, tmp_path / "out", *flags, trigger=trigger) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-robust-clip poison: error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "out" / MANIFEST).exists() and not (tmp_path / "out" / DATA).exists()


def test_a_file_that_is_none(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "pairs.parquet").write_bytes(b"nonsense")
    assert poison(tmp_path / "pairs.parquet", tmp_path / "out", "--count", "1") == 2
    assert "cannot be used" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_can_be_run(source: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert poison(source, output, "--rate", "0.05", "--template", "the {}", "--dry-run") == 0
    text = capsys.readouterr().out
    assert not output.exists()
    assert yaml.safe_load(text)["trigger"] == "patch:size=4"
    (tmp_path / "config.yaml").write_text(text)
    assert main(["poison", "--config", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == text
    assert main(["poison", "--config", str(tmp_path / "config.yaml"), "--rate", "0.1"]) == 0
    assert sum(load_pairs(str(output))["poisoned"]) == 6


def test_modes_are_those_that_there_are() -> None:
    assert MODES == ALL_MODES
