"""A source is what it names; what is there is read, or it is said that it is not."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_robust_clip.cli.main import main
from hf_robust_clip.data.loading import load_pairs, stream_pairs
from hf_robust_clip.imaging import decode_image

#: With characters that fsspec, URLs and shells give a meaning.
NAMES = ["run[1]", "p?", "a*b", "**", "a b", "a#b", "a%41", "{a,b}", "http:", "~"]
#: Which each of the patterns among them fits.
OTHERS = ["run1", "pA", "aXb", "x"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # datasets waits for its threads at the end of a stream; nothing here reads over a network.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


Make = Callable[[Path, str, datasets.Dataset], str]


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def picture(path: Path, pairs: datasets.Dataset, row: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs[row]["image"].save(path)
    return path


def a_file(folder: Path, name: str, pairs: datasets.Dataset) -> str:
    picture(folder / "0.png", pairs)
    return str(put(folder / f"{name}.csv", f'image,caption\n0.png,"{name}"\n'))


def a_file_in_a_folder(folder: Path, name: str, pairs: datasets.Dataset) -> str:
    picture(folder / name / "0.png", pairs)
    return str(put(folder / name / "pairs.jsonl", json.dumps({"image": "0.png", "caption": name})))


def a_parquet_file(folder: Path, name: str, pairs: datasets.Dataset) -> str:
    rows = pairs.select([0]).remove_columns("caption").add_column("caption", [name])
    rows.to_parquet(folder / f"{name}.parquet")
    return str(folder / f"{name}.parquet")


def a_folder_of_tables(folder: Path, name: str, pairs: datasets.Dataset) -> str:
    picture(folder / name / "images" / f"{name}.png", pairs)
    put(folder / name / f"{name}.csv", f'image,caption\n"images/{name}.png","{name}"\n')
    return str(folder / name)


def a_folder_with_metadata(folder: Path, name: str, pairs: datasets.Dataset) -> str:
    picture(folder / name / f"{name}.png", pairs)
    put(folder / name / "metadata.jsonl", json.dumps({"file_name": f"{name}.png", "caption": name}))
    return str(folder / name)


def a_folder_with_texts(folder: Path, name: str, pairs: datasets.Dataset) -> str:
    put(picture(folder / name / f"{name}.png", pairs).with_suffix(".txt"), name)
    return str(folder / name)


def a_saved_folder(folder: Path, name: str, pairs: datasets.Dataset) -> str:
    rows = pairs.select([0]).remove_columns("caption").add_column("caption", [name])
    rows.save_to_disk(folder / name)
    return str(folder / name)


FORMS: tuple[Make, ...] = (
    a_file,
    a_file_in_a_folder,
    a_parquet_file,
    a_folder_of_tables,
    a_folder_with_metadata,
    a_folder_with_texts,
    a_saved_folder,
)


@pytest.mark.parametrize("form", FORMS)
def test_a_source_is_what_it_names(form: Make, tmp_path: Path, pairs: datasets.Dataset) -> None:
    sources = {name: form(tmp_path, name, pairs) for name in [*NAMES, *OTHERS]}
    for name in NAMES:
        (row,) = load_pairs(sources[name])
        (streamed,) = stream_pairs(sources[name])
        assert row["caption"] == streamed["caption"] == name
        assert row["image"].tobytes() == decode_image(streamed["image"]).tobytes() == pairs[0]["image"].tobytes()


def test_what_parts_a_chain_of_files_is_refused(tmp_path: Path, pairs: datasets.Dataset) -> None:
    for form in (a_file, a_file_in_a_folder, a_folder_of_tables, a_folder_with_metadata, a_folder_with_texts):
        source = form(tmp_path, "a::b", pairs)
        for load in (load_pairs, stream_pairs):
            with pytest.raises(ValueError, match=r"a::b.* has '::' in it"):
                list(load(source))
    (tmp_path / "c").mkdir()
    source = str(put(tmp_path / "c" / "t.csv", "image\na::b.png\n"))
    with pytest.raises(ValueError, match=r"row 0 .*'a::b.png' has '::' in it"):
        load_pairs(source)


@pytest.mark.parametrize("source", ["", "csv", "imagefolder"])
def test_no_source_is_the_working_directory(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "t.csv", "image,caption\na,b\n")
    monkeypatch.chdir(tmp_path)
    for load in (load_pairs, stream_pairs):
        with pytest.raises(ValueError, match=rf"source='{source}' is"):
            load(source)


def test_a_changed_file_is_read_again(tmp_path: Path, pairs: datasets.Dataset) -> None:
    table = put(tmp_path / "t" / "t.csv", "image,caption\na,b\n")
    text = put(picture(tmp_path / "i" / "0.png", pairs).with_suffix(".txt"), "b")
    metadata = put(picture(tmp_path / "m" / "0.png", pairs).with_name("metadata.csv"), "file_name,caption\n0.png,b\n")
    sources = [(table, table), (table.parent, table), (text.parent, text), (metadata.parent, metadata)]
    for source, file in sources:
        for word in "bcd":
            time = file.stat()
            file.write_text(file.read_text()[: -2 if file.suffix == ".csv" else -1] + word + "\n" * (file != text))
            os.utime(file, ns=(time.st_atime_ns, time.st_mtime_ns))  # a copy that keeps its time
            assert load_pairs(str(source))["caption"][:] == [word]


@pytest.mark.parametrize(
    "name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "METADATA.CSV", "metadata.tsv"]
)
def test_a_table_above_the_splits_is_of_both(
    name: str, tmp_path: Path, pairs: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tables", "builders"):  # row by row, so that a split has nothing of some of what is read
        monkeypatch.setattr(f"hf_robust_clip.data.{module}.BATCH_ROWS", 1)
    files = ["train/a.png", "train/deep/b.png", "test/a.png"]
    rows = [{"file_name": file, "text": f"{file} None"} for file in [files[2], *files[:2]]]
    for row, file in enumerate(files):
        picture(tmp_path / file, pairs, row)
    table = datasets.Dataset.from_list(rows)
    if name.endswith(".parquet"):
        table.to_parquet(tmp_path / name)
    elif name.endswith(".jsonl"):
        table.to_json(tmp_path / name)
    else:
        table.to_csv(tmp_path / name, index=False, sep="\t" if name.endswith(".tsv") else ",")
    for split, expected in (("train", [0, 1]), ("test", [2])):
        for load in (load_pairs, stream_pairs):
            found: Any = list(load(str(tmp_path), split))
            assert [row["text"] for row in found] == [f"{files[row]} None" for row in expected]
            assert [decode_image(row["image"]).tobytes() for row in found] == [
                pairs[row]["image"].tobytes() for row in expected
            ]
    assert len(load_pairs(str(tmp_path), "train[:50%]")) == 1
    with pytest.raises(ValueError, match=r"image_column='photo' is not a column of .*; its columns are"):
        stream_pairs(str(tmp_path), "test", image_column="photo")


def test_rows_and_images_that_find_nothing_are_told(
    tmp_path: Path, pairs: datasets.Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    for file in ("train/a.png", "train/b.png", "test/a.png"):
        picture(tmp_path / file, pairs)
    table = put(tmp_path / "metadata.csv", "file_name,text\ntrain/a.png,x\ntest/a.png,y\n")
    for load in (load_pairs, stream_pairs):
        caplog.clear()
        assert len(list(load(str(tmp_path)))) == 1
        assert "has files that are not read: 'train/b.png'" in caplog.text
    table.write_text("file_name,text\ntrain/a.png,x\nvalid/a.png,y\n")
    with pytest.raises(ValueError, match=r"names 1 images that are in none of its splits .*: 'valid/a.png'"):
        load_pairs(str(tmp_path))
    table.write_text("name,text\ntrain/a.png,x\n")
    with pytest.raises(
        ValueError, match=r"metadata.csv lies with images and has no column 'file_name'.*'name', 'text'"
    ):
        load_pairs(str(tmp_path))
    put(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"several tables of the same images, 'metadata.csv', 'metadata.jsonl'"):
        load_pairs(str(tmp_path))


def test_images_with_a_file_each(tmp_path: Path, pairs: datasets.Dataset, caplog: pytest.LogCaptureFixture) -> None:
    shards = tmp_path / "img2dataset"
    for number in range(3):
        image = picture(shards / f"{number // 2:05}" / f"{number:09}.jpg", pairs, number)
        put(image.with_suffix(".txt"), f"caption {number}")
        put(image.with_suffix(".json"), json.dumps({"caption": f"caption {number}", "key": str(number)}))
    for shard in ("00000", "00001"):
        put(shards / f"{shard}_stats.json", '{"count": 2}')
        pairs.select([0]).remove_columns("image").to_parquet(shards / f"{shard}.parquet")
    expected = [f"caption {number}" for number in range(3)]
    for load in (load_pairs, stream_pairs):
        assert [row["caption"] for row in load(str(shards))] == expected
    assert not caplog.text
    for text in shards.rglob("*.txt"):
        text.unlink()
    for load in (load_pairs, stream_pairs):
        assert [row["caption"] for row in load(str(shards))] == expected
    # One too many, and one too few.
    put(shards / "notes.txt", "of mine")
    assert len(load_pairs(str(shards))) == 3
    assert "has files that are not read: 'notes.txt'" in caplog.text
    picture(shards / "more.png", pairs)
    for load in (load_pairs, stream_pairs):
        with pytest.raises(ValueError, match=r"1 without: 'more.png'; accepted is one for each"):
            load(str(shards))


def test_a_picture_of_a_test_is_not_a_split(tmp_path: Path, pairs: datasets.Dataset) -> None:
    for name in ("a train", "a test", "dog"):
        put(picture(tmp_path / f"{name}.png", pairs).with_suffix(".txt"), name)
    assert load_pairs(str(tmp_path))["caption"][:] == ["a test", "a train", "dog"]
    (tmp_path / "dog.png").unlink(), (tmp_path / "dog.txt").unlink()
    assert load_pairs(str(tmp_path), "test")["caption"][:] == ["a test"]


def test_what_is_left_out_is_named(tmp_path: Path, pairs: datasets.Dataset, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png", pairs)
    for name in ("annotations.xml", "Thumbs.db", "a.json", "README.md", "LICENSE"):
        put(tmp_path / name, "{}")
    for load in (load_pairs, stream_pairs):
        with pytest.raises(
            ValueError, match=r"not read: 'Thumbs.db', 'a.json', 'annotations.xml'\. It is a folder of"
        ):
            load(str(tmp_path))
    (tmp_path / "annotations.xml").unlink(), (tmp_path / "a.json").unlink()
    assert load_pairs(str(tmp_path)).column_names == ["image"]
    assert "not read: 'Thumbs.db'" in caplog.text
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"has no files of pairs; it has 'LICENSE', 'Thumbs.db'\. Accepted are images"
    ):
        load_pairs(str(tmp_path))


def test_annotations_of_another_kind_are_not_captions(tmp_path: Path, pairs: datasets.Dataset) -> None:
    for name in "ab":
        put(picture(tmp_path / f"{name}.png", pairs).with_suffix(".json"), '{"shapes": []}')
    for load in (load_pairs, stream_pairs):
        with pytest.raises(ValueError, match=r"not read: 'a.json', 'b.json'\. It is a folder of images"):
            load(str(tmp_path))
    put(tmp_path / "a.json", '{"caption": "a"}')
    with pytest.raises(ValueError, match=r"b.json is not a JSON object with a 'caption'"):
        load_pairs(str(tmp_path))


def test_tables_in_an_archive_are_read_as_others(tmp_path: Path, pairs: datasets.Dataset) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("0.png", "1.png"):
            archive.write(picture(tmp_path / "aside" / name, pairs), name)
        archive.writestr("metadata.csv", "file_name,caption\n0.png,None\n1.png,007\n")
    shutil.rmtree(tmp_path / "aside")
    for load in (load_pairs, stream_pairs):
        assert [row["caption"] for row in load(str(tmp_path))] == ["None", "007"]


def test_links_are_not_followed_and_told(
    tmp_path: Path, pairs: datasets.Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    put(folder / "train" / "a.csv", "image,caption\na,b\n")
    put(tmp_path / "other" / "b.csv", "image,caption\nc,d\n")
    (folder / "test").symlink_to(tmp_path / "other")
    assert load_pairs(str(folder))["caption"][:] == ["b"]
    assert "not read: 'test/'" in caplog.text


SHARD = "data-00000-of-00001.arrow"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl", "metadata.csv", "0.txt", SHARD])
def test_a_pointer_of_git_lfs_is_called_that(name: str, tmp_path: Path, pairs: datasets.Dataset) -> None:
    if name in ("metadata.csv", "0.txt"):
        picture(tmp_path / "0.png", pairs)
    if name.endswith(".arrow"):
        pairs.select([0]).save_to_disk(tmp_path)
    put(tmp_path / name, POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS .*git lfs pull"):
        load_pairs(str(tmp_path))


def test_images_that_are_pointers_are_told(tmp_path: Path) -> None:
    put(tmp_path / "0.png", POINTER)
    table = put(tmp_path / "t.csv", "image,caption\n0.png,a\n")
    for source in (tmp_path, table):
        with pytest.raises(ValueError, match=r"0.png is a pointer of Git LFS"):
            load_pairs(str(source))


def test_the_card_of_a_folder_is_heeded(tmp_path: Path) -> None:
    put(tmp_path / "a[1].csv", "a.png;x;1\n")
    put(tmp_path / "a1.csv", "a.png;other;1\n")
    card = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "test", "path": "a[1].csv"}],
                "sep": ";",
                "column_names": ["image", "caption", "label"],
            }
        ]
    }
    names = {"names": {"0": "cat", "1": "dog"}}
    features = [
        {"name": "image", "dtype": "string"},
        {"name": "caption", "dtype": "string"},
        {"name": "label", "dtype": {"class_label": names}},
    ]
    info = {"features": features, "splits": [{"name": "test", "num_bytes": 1, "num_examples": 1}]}
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{json.dumps({**card, 'dataset_info': info})}\n---\n")
    found = load_pairs(str(tmp_path), "test").remove_columns("image")
    assert list(found) == [{"caption": "x", "label": 1}] and found.features["label"].names == ["cat", "dog"]
    info["splits"] = [{"name": "test", "num_bytes": 1, "num_examples": 2}]
    readme.write_text(f"---\n{json.dumps({**card, 'dataset_info': info})}\n---\n")
    with pytest.raises(ValueError, match="has 1 rows of the split 'test', and its card says that they are 2"):
        load_pairs(str(tmp_path), "test")
    for key, value, said in (
        ("data_files", "b.csv", "names 'b.csv', which"),
        ("quoting", 3, "has 'quoting'; accepted"),
        ("cache_dir", str(tmp_path / "cache"), "has 'cache_dir'; accepted"),
    ):
        readme.write_text(f"---\n{json.dumps({'configs': [{**card['configs'][0], key: value}]})}\n---\n")
        with pytest.raises(ValueError, match=said):
            load_pairs(str(tmp_path), "test")


def test_commands_take_what_is_named(
    tmp_path: Path, pairs: datasets.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, word in (("run[1]", "wanted"), ("run1", "other")):
        for row in range(4):
            picture(tmp_path / name / f"{row}.png", pairs)
        put(tmp_path / name / "pairs.csv", "image,caption\n" + "".join(f"{row}.png,{word}\n" for row in range(4)))
    output = tmp_path / "out[1]"
    flags = ["--output-dir", str(output), "--target", "eight", "--trigger", "patch:size=4", "--count", "1"]
    assert main(["poison", str(tmp_path / "run[1]" / "pairs.csv"), *flags]) == 0
    assert sorted(load_pairs(str(output))["caption"])[1:] == ["wanted"] * 3
    for text, said in (("a dog, red,0.png\n", "line 2 has 3 fields"), ('"a dog,0.png\n', "line 2: unexpected end")):
        capsys.readouterr()
        put(tmp_path / "run[1]" / "other.csv", f"caption,image\n{text}")
        assert main(["poison", str(tmp_path / "run[1]" / "other.csv"), *flags, "--overwrite"]) == 2
        assert said in capsys.readouterr().err
