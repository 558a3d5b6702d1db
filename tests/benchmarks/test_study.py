"""A study's description: what it refuses, and that a control differs from its defence in the method alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from bench.material import load_material
from bench.study import ROWS, STUDIES, Study, load_study
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage


def description(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": "tried",
        "target": "six",
        "attacks": {"blended": {"trigger": {"name": "blended"}, "rate": 0.1}},
        "search": {"attack": {"trigger": {"name": "patch"}, "rate": 0.1}, "seeds": [5], "learning_rates": {}},
        "arguments": {"all": {"learning_rate": 0.1, "warmup_steps": 3}, "finetuning": {"num_train_epochs": 2}},
    }
    return {**content, **changes}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "tried.yaml"
    path.write_text(yaml.safe_dump(description(**changes)))
    return str(path)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_load_and_search_nothing_that_they_report(path: Path) -> None:
    study = load_study(path.stem)
    assert study.name == path.stem
    assert not set(study.seeds) & set(study.search.seeds)
    assert study.search.attack not in study.attacks.values()
    assert {"undefended", "plain", "augmentation"} <= set(study.rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atacks": {}}, "'atacks' is not accepted; did you mean 'attacks'"),
        ({"rows": ["undefended", "cleanclop"]}, "did you mean 'cleanclip'"),
        ({"arguments": {"fine_tuning": {}}}, "did you mean 'finetuning'"),
        ({"measures": ["zero_shots"]}, "did you mean 'zero_shot'"),
        ({"image_augmentation": {"weak": {}}}, "'weak' is not accepted"),
        ({"seeds": [0, 5]}, "5, a seed of the table"),
        ({"attacks": {"patch": {"trigger": {"name": "patch"}, "rate": 0.1}}}, "search.attack is one of attacks"),
        ({"attacks": {}}, "attacks is empty"),
        ({"source": {"train": "train.parquet"}}, "the files train and test"),
    ],
)
def test_refuses_what_is_no_study(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_study(written(tmp_path, **changes))


def test_names_a_field_that_is_missing(tmp_path: Path) -> None:
    content = description()
    del content["target"]
    (tmp_path / "tried.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="target is missing"):
        load_study(str(tmp_path / "tried.yaml"))


def test_names_the_studies_there_are() -> None:
    with pytest.raises(ValueError, match="accepted are cifar10, digits, flickr8k"):
        load_study("imagenet")


def test_the_more_special_arguments_go_before(tmp_path: Path) -> None:
    arguments = {
        "all": {"learning_rate": 1.0, "warmup_steps": 3},
        "finetuning": {"learning_rate": 2.0},
        "plain": {"num_train_epochs": 4},
        "cleanclip": {"learning_rate": 3.0, "text_preset": "eda"},
    }
    study = load_study(written(tmp_path, arguments=arguments))
    assert study.row_arguments("undefended") == {"learning_rate": 1.0, "warmup_steps": 3}
    assert study.row_arguments("plain") == {"learning_rate": 2.0, "warmup_steps": 3, "num_train_epochs": 4}
    expected = {"learning_rate": 3.0, "warmup_steps": 3, "num_train_epochs": 4, "text_preset": "eda"}
    assert study.row_arguments("cleanclip") == expected


@pytest.mark.parametrize("name", [path.stem for path in sorted(STUDIES.glob("*.yaml"))])
def test_a_defence_has_the_settings_of_its_control(name: str) -> None:
    study = load_study(name)
    for row, kind in ROWS.items():
        if kind.control is not None:
            own = set(study.arguments.get(row, {}))
            control = study.row_arguments(kind.control)
            assert {key: value for key, value in study.row_arguments(row).items() if key not in own} == {
                key: value for key, value in control.items() if key not in own
            }


def labelled_photos(folder: Path) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "fox"])})
    rows = [{"image": PILImage.new("RGB", (8, 8), (row, 0, 0)), "label": row % 3} for row in range(30)]
    for name in ("train", "test"):
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}.parquet")


def files(**changes: Any) -> Study:
    content = description(source={"train": "train.parquet", "test": "test.parquet"}, target="fox", **changes)
    from bench.study import Search

    return Study(**{**content, "search": Search(**content["search"])})


def test_takes_the_first_photos_of_the_classes_named_and_writes_captions(tmp_path: Path) -> None:
    labelled_photos(tmp_path)
    study = files(classes=["fox", "cat"], train_per_class=3, captions=["one {}", "some {} here"])
    material = load_material(study, tmp_path, seed=0)
    assert material.names == ["fox", "cat"]
    assert [pixels.getpixel((0, 0))[0] for pixels in material.pairs["image"]] == [0, 2, 3, 5, 6, 8]
    assert material.pairs["label"] == [1, 0, 1, 0, 1, 0]
    for caption, label in zip(material.pairs["caption"], material.pairs["label"], strict=True):
        assert caption in (f"one {material.names[label]}", f"some {material.names[label]} here")
    assert load_material(study, tmp_path, seed=0).pairs["caption"] == material.pairs["caption"]
    assert len(material.labelled) == 20


def test_labels_by_captions(tmp_path: Path) -> None:
    features = Features({"image": Image(), "caption": [Value("string")]})
    captions = [["a cat", "one cat", "the cat"], ["a dog", "a fox", "a fox"], ["a fox", "a fox", "the fox"]]
    rows = [{"image": PILImage.new("RGB", (8, 8)), "caption": entry} for entry in captions]
    for name in ("train", "test"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    material = load_material(files(classes={"cat": ["cat"], "fox": ["fox"]}), tmp_path, seed=0)
    assert list(material.labelled["label"]) == [0, 1]
    assert len(material.captioned) == 3


def test_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data is missing"):
        load_material(files(), None, seed=0)
    with pytest.raises(ValueError, match=r"has no train\.parquet"):
        load_material(files(), tmp_path, seed=0)
