"""A defence that ships is a file in `defences/` and a line in their registry: all else follows from these."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from support.training import assert_same_bits, digits, make_trainer, small_model, training_log

import hf_robust_clip
from hf_robust_clip import CLIPTrainer, defences
from hf_robust_clip.cli.main import main
from hf_robust_clip.data.digits import digit_processor
from hf_robust_clip.telling import render_card
from hf_robust_clip.trainers import defended

DUMMY = '''
"""A defence that scales the loss of CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..arguments import CLIPTrainingArguments
from ..losses import clip_loss
from ..methods import ANYTHING, Line, Method, Panel, Series, Statement
from .base import Defence


@dataclass
class DummyTrainingArguments(CLIPTrainingArguments):
    """Arguments of a dummy."""

    dummy_weight: float = field(default=0.5, metadata={"help": "Weight of the dummy's loss."})


class Dummy(Defence):
    """It scales the loss of CLIP."""

    arguments = DummyTrainingArguments
    method = Method("Dummy", "It scales the loss.", "pre-training", ("It stops nothing that moves.", ANYTHING))
    series = Series("What Dummy did", "Steps so far.", (Panel("Steps", (Line("steps_seen", "seen steps"),)),))

    def __init__(self, dummy_weight: float = 1.0) -> None:
        super().__init__()
        self.dummy_weight = dummy_weight
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, views, scale, batch):
        (pairs,) = views.values()
        self.seen += 1
        self.note({"steps_seen": self.seen.clone()})
        return {"dummy_loss": self.dummy_weight * clip_loss(*pairs, scale, gather=self.gather)}

    @classmethod
    def findings(cls, record) -> Iterator[Statement]:
        yield Statement("result", "Dummy", f" logged {len(record.log)} times.")
'''


@pytest.fixture
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its trainer and its arguments, as they are imported."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "dummy.py").write_text(DUMMY)
    monkeypatch.setattr(defences, "__path__", [*defences.__path__, str(tmp_path / "package")])
    monkeypatch.setitem(defences.LINES, "dummy", ("Dummy", "scale the loss (Dummy)"))
    # As the package has it when it is imported with such a line.
    monkeypatch.setitem(hf_robust_clip._PUBLIC, "DummyTrainer", "trainers.defended")
    monkeypatch.setitem(hf_robust_clip._PUBLIC, "DummyTrainingArguments", "defences.dummy")
    yield hf_robust_clip.DummyTrainer, hf_robust_clip.DummyTrainingArguments
    for place, name in (
        *((hf_robust_clip, f"Dummy{kind}") for kind in ("Trainer", "TrainingArguments")),
        (defended, "DummyTrainer"),
        (defences, "dummy"),
    ):
        vars(place).pop(name, None)
    sys.modules.pop("hf_robust_clip.defences.dummy")


def make(dummy: Any, folder: Path, **options: Any) -> CLIPTrainer:
    trainer, arguments = dummy
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "max_steps": 4}
    args = arguments(str(folder), per_device_train_batch_size=8, save_strategy="steps", save_steps=2, **settings)
    pairs = digits().select(range(32))
    return trainer(small_model(), args, train_dataset=pairs, processing_class=digit_processor(), **options)


def test_its_trainer_is_made_trained_saved_and_resumed(dummy: Any, tmp_path: Path) -> None:
    cls, arguments = dummy
    assert issubclass(cls, CLIPTrainer) and cls.__name__ == "DummyTrainer" and cls.__doc__ == cls.defence_class.__doc__
    assert pickle.loads(pickle.dumps(cls)) is cls and cls.args_class is arguments
    assert defended.TRAINERS["dummy"] is cls and defences.DEFENCES["dummy"] is cls.defence_class
    whole = make(dummy, tmp_path / "whole")
    assert whole.defence.dummy_weight == 0.5
    whole.train()
    assert [entry["steps_seen"] for entry in training_log(whole)] == [1, 2, 3, 4]
    resumed = make(dummy, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_bits(whole, resumed)
    record = whole.record()
    assert record.method == "DummyTrainer" and record.defence["dummy_weight"] == 0.5
    card = render_card(record)
    whole.save_report(tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text()
    for text in (card, report):
        assert "It scales the loss." in text and "It stops nothing that moves." in text
        assert "logged 4 times" in text and "dummy" in text
    assert "What Dummy did" in report and "seen steps" in report and "Steps so far." in report


def test_the_command_line_knows_it(dummy: Any, capsys: Any) -> None:
    for command, expected in ((["train", "dummy"], "--dummy_weight"), (["train"], "scale the loss (Dummy)")):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0 and expected in capsys.readouterr().out


def test_a_defence_that_is_passed_is_the_method_of_the_run(tmp_path: Path) -> None:
    class Own(defences.DEFENCES["clip"]):  # type: ignore[misc]
        """A defence that does not ship."""

    def told(defence: Any) -> str:
        return render_card(make_trainer(CLIPTrainer, tmp_path, defence=defence).record())

    assert "Fine-tuned with CleanCLIP" in told(defences.DEFENCES["cleanclip"]())
    assert "# CLIP, Own" in told(Own()) and "No defence was used" not in told(Own())
    assert "No defence was used" in told(None)


def test_what_no_line_names_is_refused() -> None:
    with pytest.raises(KeyError):
        defences.DEFENCES["magic"]
    with pytest.raises(AttributeError, match="MagicTrainer"):
        defended.MagicTrainer  # noqa: B018
    assert set(defended.TRAINERS) == set(defences.LINES)
