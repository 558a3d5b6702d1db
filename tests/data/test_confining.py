"""No path in a source of pairs, and no list of its files, leads out of its folder; honest ones start at their file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_robust_clip.data.confining import whole_paths
from hf_robust_clip.data.loading import load_pairs, stream_pairs
from hf_robust_clip.imaging import decode_image


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # datasets waits for its threads at the end of a stream; nothing here reads over a network.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def folder(pairs: datasets.Dataset, tmp_path: Path) -> Path:
    """`data`, with an image of 16 x 16 pixels in `images`, and beside it one of 7 x 5, `secret.png`."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    pairs[0]["image"].save(tmp_path / "data" / "images" / "a.png")
    pairs[0]["image"].resize((7, 5)).save(tmp_path / "secret.png")
    return tmp_path / "data"


def csv(name: str, folder: Path) -> Path:
    (folder / "train.csv").write_text(f"image,caption\n{name},a\n")
    return folder


def jsonl(name: str, folder: Path) -> Path:
    (folder / "train.jsonl").write_text(json.dumps({"image": name, "caption": "a"}) + "\n")
    return folder


def struct(name: str, folder: Path) -> Path:
    (folder / "train.jsonl").write_text(json.dumps({"image": {"path": name}, "caption": "a"}) + "\n")
    return folder


def struct_in_a_file(name: str, folder: Path) -> Path:
    value = {"image": {"path": name, "bytes": None}, "caption": "a"}
    (folder / "pairs.jsonl").write_text(json.dumps(value) + "\n")
    return folder / "pairs.jsonl"


def parquet(name: str, folder: Path) -> Path:
    datasets.Dataset.from_dict({"image": [name], "caption": ["a"]}).to_parquet(folder / "train.parquet")
    return folder


def saved(name: str, folder: Path) -> Path:
    datasets.Dataset.from_dict({"image": [name], "caption": ["a"]}).save_to_disk(folder)
    return folder


def declared(name: str, folder: Path) -> Path:
    """Paths that a Parquet file calls images."""
    schema = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}).arrow_schema
    rows = {"image": [{"path": name, "bytes": None}], "caption": ["a"]}
    pq.write_table(pa.table(rows, schema=schema), folder / "train.parquet")
    return folder


def declared_among_others(name: str, folder: Path) -> Path:
    """One such path after images that are in the file, and have no path."""
    held = (folder / "images" / "a.png").read_bytes()
    schema = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}).arrow_schema
    images = [{"path": name, "bytes": None}, {"path": None, "bytes": held}, {"path": None, "bytes": held}]
    pq.write_table(pa.table({"image": images, "caption": ["a", "b", "c"]}, schema=schema), folder / "train.parquet")
    return folder


def declared_in_a_file(name: str, folder: Path) -> Path:
    return declared(name, folder) / "train.parquet"


FORMS: tuple[Callable[[str, Path], Path], ...] = (csv, jsonl, struct, struct_in_a_file, parquet, saved)
FORMS += (declared, declared_among_others, declared_in_a_file)


@pytest.mark.parametrize("form", FORMS)
def test_paths_stay_in_their_folder(
    form: Callable[[str, Path], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file of that name in the working directory is another one.
    shutil.copytree(folder / "images", folder.parent / "images")
    shutil.copy(folder.parent / "secret.png", folder.parent / "images" / "a.png")
    monkeypatch.chdir(folder.parent)
    for name in ("images/a.png", str(folder / "images" / "a.png")):
        source = str(form(name, folder))
        assert load_pairs(source)[0]["image"].size == (16, 16)
        assert all(decode_image(row["image"]).size == (16, 16) for row in stream_pairs(source))
    for name in ("../secret.png", str(folder.parent / "secret.png"), "http://127.0.0.1:9/x.png"):
        source = str(form(name, folder))
        with pytest.raises(ValueError, match=r"row 0 of .*, column 'image': .* leads out of"):
            load_pairs(source)
        with pytest.raises(ValueError, match=r"row.* of .*, column 'image': .* leads out of"):
            list(stream_pairs(source))


@pytest.mark.parametrize("stream", [False, True])
def test_paths_start_at_the_folder_of_their_file(stream: bool, folder: Path, pairs: datasets.Dataset) -> None:
    for number, name in enumerate("xy"):
        (folder / name).mkdir()
        pairs[number]["image"].save(folder / name / "0.png")
        lines = ["image;caption", f"0.png;{name}", f"../images/a.png;{name} beside"]
        (folder / name / "train.csv").write_text("\n".join(lines) + "\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*/*.csv'\n  sep: ;\n---\n"
    (folder / "README.md").write_text(card)  # without it, three images are more than two tables
    found: Any = (stream_pairs if stream else load_pairs)(str(folder))
    rows = list(found)
    assert [row["caption"] for row in rows] == ["x", "x beside", "y", "y beside"]
    expected = [decode_image(pairs[number]["image"]).tobytes() for number in (0, 0, 1, 0)]
    assert [decode_image(row["image"]).tobytes() for row in rows] == expected
    (folder / "y" / "train.csv").write_text("image;caption\n0.png;y\n../../secret.png;y\n")
    with pytest.raises(ValueError, match=r"\.\./\.\./secret.png' leads out of"):
        list((stream_pairs if stream else load_pairs)(str(folder)))
    with pytest.raises(ValueError, match=r"row 1 of '.*/y/train.csv', column 'image'"):
        list((stream_pairs if stream else load_pairs)(str(folder)))
    if not stream:
        (folder / "y" / "train.csv").write_text("image;caption\n0.png;y\n")
        assert load_pairs(str(folder), split="train[1:]")["caption"][:] == ["x beside", "y"]


def test_a_column_of_paths_and_bytes(tmp_path: Path) -> None:
    values = [{"bytes": b"x", "path": "/not/opened.png"}, {"bytes": None, "path": "a.png"}, None]
    dataset = datasets.Dataset.from_dict({"image": values, "id": [0, 1, 2]})
    large = pa.table({"image": pa.array(["a.png", None], pa.large_string())})
    for found, expected in (
        (dataset, [values[0], {"bytes": None, "path": str(tmp_path / "a.png")}, None]),
        (datasets.Dataset(large), [{"bytes": None, "path": str(tmp_path / "a.png")}, None]),
    ):
        images = found.cast_column("image", datasets.Image())
        whole = whole_paths(images.data.column("image"), str(tmp_path), str(tmp_path), "it")
        assert [None if image == {"bytes": None, "path": None} else image for image in whole.to_pylist()] == expected
    datasets.Dataset.from_dict({"image": ["a.png"], "id": [0]}).save_to_disk(tmp_path / "saved")
    found, again = load_pairs(str(tmp_path / "saved")), load_pairs(str(tmp_path / "saved"))
    assert found._fingerprint == again._fingerprint != datasets.load_from_disk(tmp_path / "saved")._fingerprint


def test_other_columns_of_images_stay_in_their_folder(folder: Path) -> None:
    schema = datasets.Features({"image": datasets.Image(), "other": datasets.Image(decode=False)}).arrow_schema
    for name, leads_out in (("images/a.png", False), ("../secret.png", True)):
        rows = {"image": [{"path": None, "bytes": b"x"}], "other": [{"path": name, "bytes": None}]}
        pq.write_table(pa.table(rows, schema=schema), folder / "train.parquet")
        if leads_out:
            with pytest.raises(ValueError, match=r"row 0 of .*, column 'other': .* leads out of"):
                load_pairs(str(folder))
        else:
            assert load_pairs(str(folder))["other"][0]["path"] == str(folder / name)


def test_the_card_of_a_folder_names_its_own_files(folder: Path) -> None:
    csv("images/a.png", folder)
    shutil.copytree(folder, folder.parent / "private")
    for name, fence in (("README.md", "---\n"), (".huggingface.yaml", "")):
        for entry in (
            "data_files: ABOVE/private/*.png",
            "data_files: ../private/*.csv",
            "data_files: [train.csv, ../private/x.csv]",
            "data_files: [{split: train, path: [train.csv, 'a/../../private/x.csv']}]",
            "data_files: 'file:ABOVE/private/x.csv'",
            "data_files: 'simplecache::ABOVE/private/x.csv'",
            "data_files: 'http://127.0.0.1:9/x.csv'",
            "data_dir: ../private",
        ):
            entry = entry.replace("ABOVE", str(folder.parent))
            (folder / name).write_text(f"{fence}configs:\n- config_name: default\n  {entry}\n{fence}")
            for load in (load_pairs, stream_pairs):
                with pytest.raises(ValueError, match=r"the card of '.*data' names '.*', which it does not have"):
                    load(str(folder))
        (folder / name).write_text(f"{fence}configs:\n- config_name: default\n  data_files: '*.csv'\n{fence}")
    assert len(load_pairs(str(folder))) == 1
    (folder / "README.md").write_text("---\n- [\n---\n")
    with pytest.raises(ValueError, match=r"the metadata of .*README.md is not YAML"):
        load_pairs(str(folder))


def test_a_folder_that_was_saved_lists_its_own_files(pairs: datasets.Dataset, tmp_path: Path) -> None:
    pairs.select([0]).save_to_disk(tmp_path / "other")
    plain, several = tmp_path / "plain", tmp_path / "several"
    pairs.select([1]).save_to_disk(plain)
    datasets.DatasetDict(train=pairs.select([1])).save_to_disk(several)
    for folder, state in ((plain, plain / "state.json"), (several, several / "train" / "state.json")):
        content = json.loads(state.read_text())
        above = "../other" if folder == plain else "../../other"
        for name in (f"{above}/data-00000-of-00001.arrow", str(tmp_path / "other" / "data-00000-of-00001.arrow")):
            state.write_text(json.dumps({**content, "_data_files": [{"filename": name}]}))
            with pytest.raises(ValueError, match=r"state.json names '.*arrow', which leads out"):
                load_pairs(str(folder))
        for broken in ("{", "[]", json.dumps({**content, "_data_files": [{}]})):
            state.write_text(broken)
            with pytest.raises(ValueError, match=r"state.json (is not JSON|cannot be used; accepted is)"):
                load_pairs(str(folder))
        state.write_text(json.dumps(content))
        assert load_pairs(str(folder))[0]["caption"] == pairs[1]["caption"]
    (several / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(ValueError, match=r"split='../other' is not in .*; its splits are 'train'"):
        load_pairs(str(several), "../other")


@pytest.mark.parametrize("value", [1, ["images/a.png"]])
def test_a_column_that_holds_no_images_is_named(value: Any, folder: Path) -> None:
    pq.write_table(pa.table({"image": [value]}), folder / "t.parquet")
    with pytest.raises(ValueError, match=r"t.parquet' cannot be read with 'image' as images: "):
        load_pairs(str(folder / "t.parquet"))
