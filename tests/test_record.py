"""A run's record survives its file, and holds neither rows nor secrets."""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.records import make_record

from hf_robust_clip.attacks.triggers import PatchTrigger
from hf_robust_clip.describing import describe_dataset, describe_trigger, thinned
from hf_robust_clip.record import RUN_FILE, RunRecord, jsonable
from hf_robust_clip.trainers.recording import evaluations


def test_file_reads_back(tmp_path: Path) -> None:
    written = make_record(course=[{"step": 4, "epoch": 1.0, "clean_accuracy": 0.7}])
    written.save(tmp_path)
    assert RunRecord.load(tmp_path) == written


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "was not saved by a trainer of hf_robust_clip"),
        ("{", "is not JSON"),
        ("[]", "accepted is a mapping"),
        ('{"trainer": "x"}', "model is missing"),
    ],
)
def test_what_is_no_record_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize(
    "entry, value, message",
    [
        ("model", {}, r"model\['name'\] is missing"),
        ("model", [], r"model is \[\]; accepted is a mapping"),
        ("measures", [{}], r"measures\[0\]\['measure'\] is missing"),
        (
            "measures",
            [{"measure": "x", "figures": [1]}],
            r"measures\[0\]\['figures'\]\[0\] is 1; accepted is a ",
        ),
        ("environment", {}, r"environment\['versions'\] is missing"),
        ("course", [{}], r"course\[0\]\['epoch'\] is missing"),
        ("skipped", {"count": 3}, r"skipped\['rows'\] is missing"),
        ("epochs", None, "epochs is None; accepted is a valid number"),
        ("before", {"clean_accuracy": "high"}, r"before\['clean_accuracy'\] is 'high'; accepted is a valid number"),
        ("after", {"clean_accuracy": 10**400}, "after.* is 10*.*; accepted is a valid number"),
        ("log", [{"loss": 1.0}], r"log\[0\]\['epoch'\] is missing"),
        ("details", {"splits": [{}]}, r"details\['splits'\]\[0\]\['epoch'\] is missing"),
        ("augmentation", {"images": None}, r"augmentation\['captions'\] is missing"),
    ],
)
def test_entries_that_no_record_has_are_refused(entry: str, value: Any, message: str) -> None:
    content = {**json.loads(make_record().to_json()), entry: value}
    with pytest.raises(ValueError, match=f"^FILE: {message}"):
        RunRecord.from_json(json.dumps(content), "FILE")


def test_a_record_nested_too_deeply_is_refused() -> None:
    content = {**json.loads(make_record().to_json()), "settings": {}}
    text = json.dumps(content).replace('"settings": {}', f'"settings": {"[" * 5000}{"]" * 5000}')
    with pytest.raises(ValueError, match="nested too deeply"):
        RunRecord.from_json(text)


def test_half_a_pair_of_surrogates_does_not_lose_the_record(tmp_path: Path) -> None:
    odd = "caf\udce9"
    environment = {**dict(make_record().environment), "device": odd}
    measure = {"measure": "x", "figures": [], "classes": [odd], "trigger": {"name": "word", odd: odd}}
    make_record(environment=environment, measures=[measure]).save(tmp_path)
    read = RunRecord.load(tmp_path)
    assert read.environment.device == r"caf\udce9"
    assert read.measures[0].classes == [r"caf\udce9"]
    # From a file, too, which can spell one out.
    text = make_record().to_json().replace('"CPU"', r'"caf\udce9"')
    assert RunRecord.from_json(text).environment.device == r"caf\udce9"


def test_a_record_is_not_written_through_a_link(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "model"
    other.write_text("mine")
    folder.mkdir()
    (folder / RUN_FILE).symlink_to(other)
    make_record().save(folder)
    assert other.read_text() == "mine" and RunRecord.load(folder) == make_record()


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    make_record().save(tmp_path)
    path = tmp_path / RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "other": 1}))
    with pytest.raises(ValueError, match=r"'other' is not known; accepted are 'trainer'"):
        RunRecord.load(tmp_path)


def test_numbers_that_json_lacks_become_none() -> None:
    class Colour(str, Enum):
        RED = "red"

    value = {"a": math.nan, "b": [np.float32(1.5), math.inf], 3: (True, None), "c": Colour.RED, "d": {2, 1}}
    assert jsonable(value) == {"a": None, "b": [1.5, None], "3": [True, None], "c": "red", "d": [1, 2]}
    assert type(jsonable(Colour.RED)) is str


@given(st.integers(0, 2000), st.integers(2, 50))
def test_thinned_keeps_both_ends_and_the_order(length: int, most: int) -> None:
    log = [{"step": number} for number in range(length)]
    kept = thinned(log, most)
    assert len(kept) == min(length, most)
    assert [entry["step"] for entry in kept] == sorted({entry["step"] for entry in kept})
    if length:
        assert kept[0] == log[0] and kept[-1] == log[-1]


def test_dataset_is_described_without_its_rows() -> None:
    dataset = datasets.Dataset.from_dict({"caption": ["secret"] * 5, "poisoned": [True, False, True, False, False]})
    described = describe_dataset(dataset)
    assert described["rows"] == 5 and described["poisons"] == 2
    assert described["fingerprint"] == dataset._fingerprint
    assert "secret" not in json.dumps(described)
    assert "poisons" not in describe_dataset(dataset.remove_columns("poisoned"))
    # A transform that leaves the column out says nothing of the rows that are stored, and is not run to count them.
    assert describe_dataset(dataset.with_transform(lambda rows: 1 / 0))["poisons"] == 2
    assert describe_dataset([{"caption": "secret"}]) == {"name": None, "rows": 1}
    assert describe_dataset(dataset.to_iterable_dataset())["rows"] is None


def test_a_file_without_a_name_is_not_called_by_its_format(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_dict({"caption": ["a"]}).to_parquet(path)
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert describe_dataset(loaded)["name"] is None
    loaded.info.dataset_name = "pairs"
    assert describe_dataset(loaded)["name"] == "pairs"


def test_dataset_from_the_hub_is_named_with_its_revision() -> None:
    dataset = datasets.Dataset.from_dict({"caption": ["a"]})
    files = ("train-0.parquet", "train-1.parquet")
    dataset.info.download_checksums = {f"hf://datasets/you/pairs@{'0a' * 20}/{name}": {} for name in files}
    described = describe_dataset(dataset)
    assert (described["hub_id"], described["revision"]) == ("you/pairs", "0a" * 20)
    dataset.info.download_checksums |= {f"hf://datasets/they/others@{'0b' * 20}/x.parquet": {}}
    assert "hub_id" not in describe_dataset(dataset)


def test_triggers_are_described() -> None:
    assert describe_trigger(PatchTrigger(size=3)) == PatchTrigger(size=3).to_dict()
    assert describe_trigger(lambda image: image) == {"name": "<lambda>"}


def test_evaluations_are_the_evaluators_figures() -> None:
    log = [
        {"eval_loss": 1.0, "eval_clean_accuracy": 0.1, "eval_runtime": 2.0, "step": 0, "epoch": 0},
        {"loss": 1.0, "step": 5, "epoch": 0.5},
        {"eval_loss": 1.0, "step": 5, "epoch": 0.5},
        {"eval_patch_attack_success_rate": 0.9, "eval_steps_per_second": 1.0, "step": 8, "epoch": 1.0},
    ]
    assert evaluations(log) == [
        {"step": 0, "epoch": 0.0, "clean_accuracy": 0.1},
        {"step": 8, "epoch": 1.0, "patch_attack_success_rate": 0.9},
    ]
