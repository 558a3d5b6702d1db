"""Tables are read as they are written: text stays text, and a row that does not fit is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_robust_clip.data import tables
from hf_robust_clip.data.loading import load_pairs, stream_pairs
from hf_robust_clip.data.tables import read_csv, read_json
from hf_robust_clip.evaluation.labels import read_labels

WORDS = ["None", "null", "NA", "n/a", "nan", "NULL", "007", "1.0", "true", "2020-01-01", "2020-01-01 10:00:00", "1e3"]


def written(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def undecoded(source: str) -> list[dict[str, Any]]:
    """The rows of a stream, whose images are not there."""
    return list(stream_pairs(source).cast_column("image", datasets.Image(decode=False)))


def rows(path: str, **options: Any) -> list[dict[str, Any]]:
    read = read_json if ".json" in path else read_csv
    return [row for table in read(path, **options) for row in table.to_pylist()]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
@pytest.mark.parametrize("form", ["file", "folder", "metadata"])
def test_text_stays_text_wherever_it_stands(form: str, suffix: str, tmp_path: Path, pairs: datasets.Dataset) -> None:
    names = [f"{i}.png" for i in range(len(WORDS))] if form == "metadata" else WORDS
    key = "file_name" if form == "metadata" else "image"
    found = [{key: name, "caption": word} for name, word in zip(names, WORDS, strict=True)]
    if suffix in (".csv", ".tsv"):
        delimiter = "," if suffix == ".csv" else "\t"
        text = "".join(delimiter.join(row) + "\n" for row in ((key, "caption"), *(row.values() for row in found)))
    else:
        text = json.dumps(found) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in found)
    if form == "metadata":
        for name in names:
            pairs[0]["image"].save(tmp_path / name)
    file = written(tmp_path / f"{'metadata' if form == 'metadata' else 'pairs'}{suffix}", text)
    source = file if form == "file" else str(tmp_path)
    loaded = load_pairs(source)
    assert loaded["caption"][:] == WORDS
    if form != "file":  # which is streamed from what was loaded
        assert [row["caption"] for row in undecoded(source)] == WORDS
    paths = loaded.cast_column("image", datasets.Image(decode=False))["image"]
    assert [image["path"] for image in paths] == [str(tmp_path / name) for name in names]


def test_what_people_and_spreadsheets_write(tmp_path: Path) -> None:
    text = '\ufeffimage,caption\r\na.png,"red, ""old""\ndog"\r\nb.png,\r\n,c\r\n\r\n,\r\n'
    expected = [("a.png", 'red, "old"\ndog'), ("b.png", None), (None, "c")]
    assert [tuple(row.values()) for row in rows(written(tmp_path / "a.csv", text))] == expected
    # The number of the row in front, as pandas writes it, and a comma too many in every line.
    text = ",image,caption,\n0,a.png,dog,\n1,b.png,cat,\n"
    found = rows(written(tmp_path / "a.csv", text))
    assert [(row["Unnamed: 0"], row["image"], row["caption"]) for row in found] == [
        ("0", "a.png", "dog"),
        ("1", "b.png", "cat"),
    ]
    assert rows(written(tmp_path / "a.csv", "image,caption\n")) == []
    long = "dog " * 100_000
    assert rows(written(tmp_path / "a.csv", f"image,caption\na,{long}\n"))[0]["caption"] == long


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_the_header_shows_what_parts_the_fields(delimiter: str, tmp_path: Path) -> None:
    text = f"image{delimiter}caption\na.png{delimiter}red dog, near a lake\n"
    assert rows(written(tmp_path / "a.csv", text)) == [{"image": "a.png", "caption": "red dog, near a lake"}]


@pytest.mark.parametrize(
    "text, said",
    [
        ("caption,image\na red dog, near a lake,a.png\n", "line 2 has 3 fields where the header has 2"),
        ('image,caption\na,"b\nc"\nd,e\nf,g,\n', "line 5 has 3 fields"),
        ("image,caption\na,b\nc\n", "line 3 has 1 fields where the header has 2"),
        ('image,caption\na,b\nc,"d\ne,f\n', "line 3: unexpected end of data"),
        ('image,caption\na,"red" dog\n', "line 2: .*expected after"),
        ("image,caption,caption\n", "'caption' more than once"),
        ("image\tx,caption\n", "call it .tsv"),
        ("", "header"),
        ("image,caption,poisoned\na,b,TRUE\nc,d,yes\n", "line 3: 'poisoned' is 'yes'; accepted are true, false, 1"),
    ],
)
def test_a_row_that_does_not_fit_is_named(text: str, said: str, tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", text)
    for read in (rows, load_pairs, lambda source: undecoded(str(tmp_path))):
        with pytest.raises(ValueError, match=f"a.csv.*{said}"):
            read(source)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_other_encodings_are_told(name: str, encoding: str, tmp_path: Path) -> None:
    text = "image,caption\na,caf\xe9\n" if name == "a.csv" else '{"image": "a", "caption": "caf\xe9"}\n'
    with pytest.raises(ValueError, match=rf"{name}.*(UTF-8|JSON)"):
        load_pairs(written(tmp_path / name, text, encoding))


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "image,caption\n"), ("a.tsv", "image\tcaption\n\n"), ("a.json", "[]")]
)
def test_a_table_without_rows_is_named(name: str, text: str, tmp_path: Path, pairs: datasets.Dataset) -> None:
    source = written(tmp_path / name, text)
    other = tmp_path / ".other"
    other.mkdir()
    pairs.select([]).to_parquet(other / "b.parquet")
    for path in (source, str(tmp_path), str(other), str(other / "b.parquet")):
        with pytest.raises(ValueError, match=rf"there are no rows in '.*({name}|b\.parquet)'"):
            load_pairs(path)
    with pytest.raises(ValueError, match=rf"there are no rows in '.*{name}'"):
        stream_pairs(str(tmp_path))


def test_poisons_are_told_by_words(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", "image,poisoned\na,True\nb,0\nc,\nd,1\n")
    assert load_pairs(source)["poisoned"][:] == [True, False, None, True]


def test_numbers_of_classes_in_a_table(tmp_path: Path) -> None:
    dataset = load_pairs(written(tmp_path / "a.csv", "image,label\na,1\nb,0\nc,cat\n"))
    assert read_labels(dataset, ["cat", "dog"], "image", "label").tolist() == [1, 0, 0]
    assert read_labels(dataset, ["1", "cat", "0"], "image", "label").tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match="row 0, column 'label': '1'"):
        read_labels(dataset, ["cat"], "image", "label")


def test_json_keeps_types(tmp_path: Path) -> None:
    found = [
        {"image": "a", "caption": ["a", "b"], "n": 1, "x": {"k": 1}, "late": None},
        {"image": "b", "caption": "2020-01-01", "n": 1.5, "x": {"k": "v"}, "late": None},
        {"image": "c", "n": None, "x": None, "late": [1]},
    ]
    source = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, found)) + "\n\n")
    loaded = load_pairs(source).remove_columns("image")
    assert list(loaded) == [{"caption": None, **{k: v for k, v in row.items() if k != "image"}} for row in found]
    columns = {"image": ["a", "b"], "caption": ["x", "y"]}
    assert load_pairs(written(tmp_path / "a.json", json.dumps(columns, indent=1)))["caption"][:] == ["x", "y"]
    for text, said in (('{"image": "a"}\n{"image":\n', "line 2"), ("[1]", "accepted are objects"), ("", "JSON")):
        with pytest.raises(ValueError, match=f"a.json.*{said}"):
            load_pairs(written(tmp_path / "a.json", text))


def test_later_rows_are_what_the_first_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 2)
    lines = [json.dumps({"image": "a", "n": 1})] * 4
    assert len(rows(written(tmp_path / "a.jsonl", "\n".join(lines)))) == 4
    for value, said in (({"n": "x"}, "rows 4 to 4, column 'n'"), ({"m": 1}, "rows 4 to 4 have 'm'")):
        with pytest.raises(ValueError, match=f"a.jsonl, {said}"):
            rows(written(tmp_path / "a.jsonl", "\n".join([*lines, json.dumps(value)])))
    assert len(rows(written(tmp_path / "a.csv", "image\n" + "a\n" * 5))) == 5


def test_tables_of_a_folder_have_the_same_columns(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", "image,caption\na,b\n")
    with gzip.open(tmp_path / "b.csv.gz", "wt") as file:
        file.write("caption,image\nd,c\n")
    assert load_pairs(str(tmp_path))["caption"][:] == ["b", "d"]
    assert [row["caption"] for row in undecoded(str(tmp_path))] == ["b", "d"]
    written(tmp_path / "c.csv", "image,title\na,b\n")
    with pytest.raises(ValueError, match=r"c.csv has the columns 'image', 'title', and the first table has"):
        load_pairs(str(tmp_path))


def test_a_field_that_comes_late_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_robust_clip.data.tables.BATCH_ROWS", 2)
    for late in ({"y": 2}, {"x": 1, "z": {"a": 1}}):
        lines = [{"image": "a", "s": {"x": 1}}] * 2 + [{"image": "a", "s": late}]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError, match=r"rows 2 to 2, column 's': its objects have fields that .* lack"):
            list(read_json(str(tmp_path / "t.jsonl")))


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_of_lists_is_of_columns(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"image": ["a", "b"], "caption": ["c", "d"]}, indent=indent))
    (table,) = read_json(str(tmp_path / "t.json"))
    assert table.to_pylist() == [{"image": "a", "caption": "c"}, {"image": "b", "caption": "d"}]
