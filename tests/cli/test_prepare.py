"""`prepare` writes what `prepare_dataset` makes, and goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_robust_clip.cli.main import main
from hf_robust_clip.data.preparing import prepare_dataset


@pytest.fixture
def arguments(pairs: datasets.Dataset, processor: Any, tmp_path: Path) -> list[str]:
    """Of the command, but for the output folder."""
    pairs.to_parquet(tmp_path / "pairs.parquet")
    processor.save_pretrained(tmp_path / "model")
    return ["prepare", str(tmp_path / "pairs.parquet"), "--model", str(tmp_path / "model")]


def test_the_output_is_what_the_function_makes(
    arguments: list[str], pairs: datasets.Dataset, processor: Any, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--image-format", "png", "--rows-per-shard", "40"]
    for _ in range(2):
        assert main([*arguments, "--output-dir", str(tmp_path / "out"), *flags]) == 0
        assert "64 of 64 pairs are prepared" in capsys.readouterr().out
    options: Any = {"image_format": "png", "rows_per_shard": 40}
    expected = prepare_dataset(pairs, processor, tmp_path / "same", **options)
    assert datasets.load_from_disk(str(tmp_path / "out")).data.table.equals(expected.data.table)
    assert len(list((tmp_path / "out").glob("*.arrow"))) == 2
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert "was prepared otherwise: image_format was 'png', and is 'ppm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-proc", "0"], "--num-proc: 0 is too small"),
        (["--caption-column", "text"], "caption_column='text' is not a column of dataset"),
        (["--image-column", "photo"], "image_column='photo' is not a column"),
        (["--output-dir", "."], "holds DATA"),
        (["--output-dir", "model/prepared", "model"], "would be a part of it"),
    ],
)
def test_what_cannot_work_is_said(
    arguments: list[str], tmp_path: Path, flags: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if flags[-1] == "model":  # in place of the file
        arguments[1] = flags.pop()
    assert main([*arguments, "--output-dir", "out", *flags]) == 2
    assert message in capsys.readouterr().err
