"""What the tests run in a process that takes a stand-in for the Hub: trainers that push, and what is then loaded."""

from __future__ import annotations

import gc
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from peft import LoraConfig
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_robust_clip import CLIPTrainer, SafeCLIPTrainer, ZeroShotEvaluator
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_processor
from support.stand_in import BAD_TOKEN, READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN
from support.training import ARGUMENTS, assert_same_bits, digits, make_trainer

#: Four steps an epoch, or five, of three epochs; SafeCLIP splits before the last.
RUN: dict[type[CLIPTrainer], dict[str, Any]] = {cls: {"rows": 32} for cls in ARGUMENTS}
RUN[SafeCLIPTrainer] = {"rows": 40, "safe_threshold": 0.5}
#: Where the run that is resumed stopped: in the second epoch.
STOP = 6


class Stop(TrainerCallback):
    """As if the machine had gone, after the checkpoint of step `STOP`."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = state.global_step == STOP


def trainer_of(cls: type[CLIPTrainer], output: Path, name: str, **overrides: Any) -> CLIPTrainer:
    """One whose repository is called `name`, and that may push with what it is given alone."""
    overrides = {"hub_model_id": f"tester/{name}", "hub_token": WRITE_TOKEN, **overrides}
    evaluator = ZeroShotEvaluator(digits("test").select(range(40)), CLASS_NAMES, templates=CAPTION_TEMPLATES)
    return make_trainer(cls, output / name, evaluators=[evaluator], **{**RUN[cls], **overrides})


def assert_loads_as_it_was(trainer: CLIPTrainer, token: str | None = None) -> None:
    """From the Hub come its weights to the bit, and its processor; they measure what the trainer measures."""
    # transformers 5.19 and 5.20 do not pass a model's `token` on to its configuration.
    source = trainer.hub_model_id if token is None else snapshot_download(str(trainer.hub_model_id), token=token)
    model = CLIPModel.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    weights = trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    figures = {f"eval_{name}": value for name, value in trainer.evaluators[0](model, processor).items()}
    assert figures and figures.items() <= trainer.evaluate().items()


#: What a strategy pushes is the same for all trainers, but what a checkpoint holds is not.
STRATEGIES = {cls: ("end", "every_save", "all_checkpoints") if cls is CLIPTrainer else () for cls in ARGUMENTS}


def pushes(output: Path) -> None:
    """Each trainer by hand and by each strategy, and goes on from what one of them pushed."""
    for cls in ARGUMENTS:
        whole = trainer_of(cls, output, f"{cls.__name__}-by-hand", hub_private_repo=True)
        whole.train()
        whole.push_to_hub()
        assert_loads_as_it_was(whole, token=WRITE_TOKEN)

        # A push that has not ended would otherwise stand in for the next.
        pushing = {"push_to_hub": True, "hub_always_push": True, "save_strategy": "steps"}
        for strategy in STRATEGIES[cls]:
            trainer = trainer_of(
                cls, output, f"{cls.__name__}-{strategy}", hub_strategy=strategy, max_steps=2, save_steps=1, **pushing
            )
            trainer.train()
            if strategy == "end":
                trainer.save_model()
            assert_loads_as_it_was(trainer)

        stopped = trainer_of(
            cls,
            output,
            f"{cls.__name__}-checkpoint",
            hub_strategy="checkpoint",
            save_steps=STOP // 2,
            callbacks=[Stop()],
            **pushing,
        )
        stopped.train()
        assert stopped.state.global_step == STOP < whole.state.global_step
        assert_loads_as_it_was(stopped)
        folder = Path(snapshot_download(str(stopped.hub_model_id), allow_patterns="last-checkpoint/*"))
        resumed = trainer_of(cls, output, f"{cls.__name__}-resumed")
        resumed.train(resume_from_checkpoint=str(folder / "last-checkpoint"))
        assert_same_bits(whole, resumed)


def adapters(output: Path) -> None:
    """Adapters alone, which bring their base and `logit_scale` along, and merged; never both in one repository."""
    base = trainer_of(CLIPTrainer, output, "base")
    base.push_to_hub()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["visual_projection"])
    for name, merge in (("adapters", False), ("merged", True)):
        trainer = trainer_of(
            CLIPTrainer, output, name, model="tester/base", peft_config=lora, merge_adapters=merge, max_steps=4
        )
        trainer.train()
        trainer.push_to_hub()
        loaded, trained = AutoModel.from_pretrained(f"tester/{name}").eval(), trainer.unwrapped_model.eval()
        assert torch.equal(loaded.logit_scale, trained.logit_scale)
        assert not torch.equal(loaded.logit_scale, base.model.logit_scale)
        image = digits("test")[0]["image"]
        inputs = trainer.processing_class(text=list(CLASS_NAMES), images=image, return_tensors="pt", padding=True)
        for part in ("text_embeds", "image_embeds"):
            torch.testing.assert_close(loaded(**inputs)[part], trained(**inputs)[part], rtol=0, atol=1e-6)
    trainer.hub_model_id = "tester/adapters"
    with pytest.raises(ValueError, match="tester/adapters has adapters"):
        trainer.push_to_hub()


def interruptions(output: Path) -> None:
    """Uploads that break off or are refused, and pushes that fail while training goes on."""
    broken = trainer_of(CLIPTrainer, output, "broken")
    broken.push_to_hub()
    assert_loads_as_it_was(broken)

    refused = trainer_of(CLIPTrainer, output, "refused")
    with pytest.raises(RuntimeError, match="Error while uploading"):
        refused.push_to_hub()
    assert HfApi().list_repo_files("tester/refused") == [".gitattributes"]
    refused.push_to_hub()
    assert_loads_as_it_was(refused)

    for name in ("first-fails", "last-fails"):
        trainer = trainer_of(
            CLIPTrainer,
            output,
            name,
            push_to_hub=True,
            hub_always_push=True,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train()
        assert trainer.state.global_step == 2
        if name == "last-fails":
            trainer.push_to_hub()
        assert_loads_as_it_was(trainer)


def refusals(output: Path) -> None:
    """Tokens that nobody has, or that may not write: errors that say so."""
    for token, status in ((BAD_TOKEN, "401"), (READ_TOKEN, "403"), (STRANGER_TOKEN, "403")):
        with pytest.raises(HfHubHTTPError, match=status) as refusal:
            trainer_of(CLIPTrainer, output, "new", push_to_hub=True, hub_token=token)
        show(refusal.value, token)
        trainer = trainer_of(CLIPTrainer, output, "existing", hub_token=token)
        with pytest.raises(HfHubHTTPError, match=status) as refusal:
            trainer.push_to_hub()
        show(refusal.value, token)

    # The repository is there, so that the first refusal comes in the background.
    trainer = trainer_of(
        CLIPTrainer, output, "existing", hub_token=READ_TOKEN, push_to_hub=True, max_steps=1, save_strategy="steps"
    )
    trainer.train()
    assert trainer.state.global_step == 1

    for name, error in (("missing", RepositoryNotFoundError), ("gated", GatedRepoError)):
        for load in (CLIPModel.from_pretrained, AutoProcessor.from_pretrained, load_into_trainer):
            with pytest.raises(OSError, match=f"tester/{name}") as failure:
                load(f"tester/{name}")
            causes = [failure.value, failure.value.__cause__, getattr(failure.value.__cause__, "__cause__", None)]
            assert any(isinstance(cause, error) for cause in causes)


def load_into_trainer(model: str) -> CLIPTrainer:
    return CLIPTrainer(model, ARGUMENTS[CLIPTrainer]("unused"), processing_class=digit_processor())


def show(error: BaseException, token: str) -> None:
    assert token not in str(error) and token not in repr(error)
    print("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    # The Trainer collects garbage before each run, and would look through all that is imported each time.
    gc.freeze()
    scenarios = {"pushes": pushes, "adapters": adapters, "interruptions": interruptions, "refusals": refusals}
    for scenario in sys.argv[2:]:
        scenarios[scenario](Path(sys.argv[1]))
