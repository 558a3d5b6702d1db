"""`card` writes the card of a recorded run, with figures that were measured later, and spares what a person wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.records import make_record

from hf_robust_clip.cli.main import main
from hf_robust_clip.record import RUN_FILE

ACCURACY = {"measure": "zero-shot accuracy", "figures": ["clean_accuracy"], "images": 10, "classes": ["cat", "dog"]}
RESULTS = {"measures": [{**ACCURACY, "images": 20}], "figures": {"clean_accuracy": 0.875}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = make_record(
        model={**dict(make_record().model), "name": "openai/clip-vit-base-patch32"},
        data={"rows": 64, "name": "pairs"},
        measures=[ACCURACY],
        before={"clean_accuracy": 0.5},
        after={"clean_accuracy": 0.625},
        course=[],
        log=[],
    )
    record.save(tmp_path)
    return tmp_path


def test_the_card_has_what_was_measured_then_and_later(folder: Path, capsys: Any) -> None:
    (folder / "results.json").write_text(json.dumps({**RESULTS, "model": "tester/model"}))
    flags = ["--results", str(folder / "results.json"), "--license", "mit", "--repo-id", "tester/model"]
    assert main(["card", str(folder), *flags]) == 0
    assert "README.md" in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.base_model == "openai/clip-vit-base-patch32"
    assert {result.metric_value for result in card.data.eval_results} >= {0.5, 0.625, 0.875}
    assert "tester/model" in card.text
    # It is written anew as often as asked for.
    assert main(["card", str(folder)]) == 0
    assert "87.5%" not in (folder / "README.md").read_text()


def test_figures_of_another_model_are_not_credited_to_this_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def card(model: str, **control: str) -> int:
        (folder / "results.json").write_text(json.dumps({**RESULTS, "model": model, **control}))
        (folder / "README.md").unlink(missing_ok=True)
        return main(["card", ".", "--results", "results.json"])

    # As `evaluate FOLDER` calls it, from wherever it was measured; and a control is another model by what it is.
    monkeypatch.chdir(folder)
    assert card(folder.resolve().name) == 0
    assert card("plain", control="plain fine-tuning") == 0
    assert "plain fine-tuning" in (folder / "README.md").read_text()
    for other in ("openai/clip-vit-base-patch32", "tester/model", "checkpoint-2"):
        assert card(other) == 2 and not (folder / "README.md").exists()
        error = capsys.readouterr().err
        assert repr(other) in error and repr(folder.resolve().name) in error and "--repo-id" in error


def test_a_card_by_a_person_stays(folder: Path, capsys: Any) -> None:
    (folder / "README.md").write_text("# Mine\n")
    assert main(["card", str(folder)]) == 1
    assert (folder / "README.md").read_text() == "# Mine\n"
    error = capsys.readouterr().err
    assert "move or delete it" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"measures": {}, "figures": {}}', '{"measures": [{}], "figures": {}}', None]
)
def test_results_that_are_none(text: str | None, folder: Path, capsys: Any) -> None:
    if text is not None:
        (folder / "results.json").write_text(text)
    assert main(["card", str(folder), "--results", str(folder / "results.json")]) == 2
    assert "--results" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_wrong_usage(folder: Path, tmp_path_factory: Any, capsys: Any) -> None:
    assert main(["card", str(tmp_path_factory.mktemp("empty"))]) == 2
    assert main(["card", str(folder), "--repo-id", "no/such/id"]) == 2
    whole = (folder / RUN_FILE).read_text()
    (folder / RUN_FILE).write_text("{}")
    assert main(["card", str(folder)]) == 2
    (folder / RUN_FILE).write_text(json.dumps({**json.loads(whole), "measures": [{}]}))
    assert main(["card", str(folder)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and RUN_FILE in errors[0] and "repo_id" in errors[1]
    assert f"{RUN_FILE}: measures[0]['measure'] is missing" in errors[3]
