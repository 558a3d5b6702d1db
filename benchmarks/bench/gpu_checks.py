"""What a GPU can decide: values against a CPU's, resuming, waiting, half precision, transfer, scans."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, PrinterCallback, Trainer

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CLIPTrainer,
    CLIPTrainingArguments,
    RoCLIPTrainer,
    SafeCLIPTrainer,
    ZeroShotEvaluator,
    scan_checkpoint,
    scan_pairs,
)
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_processor, load_digit_pairs
from hf_robust_clip.data.scratch import build_model
from hf_robust_clip.evaluation.running import evaluator_list, run_evaluators
from hf_robust_clip.losses import (
    cleanclip_loss,
    clip_loss,
    par_loss,
    roclip_loss,
    safeclip_unimodal_loss,
    sigmoid_loss,
)
from hf_robust_clip.pool import FeaturePool
from hf_robust_clip.trainers.defended import TRAINERS

from .machine import run_seconds

#: What makes both kinds of steps of a trainer come up at once, and the most steps that are looked at.
_GIVEN: dict[type[CLIPTrainer], dict[str, Any]] = {
    RoCLIPTrainer: {"pool_size": 32, "matching_start_epoch": 0},
    SafeCLIPTrainer: {"unimodal_pool_size": 32, "warmup_unimodal_epochs": 0, "warmup_cross_epochs": 0},
}
#: Rows, and those of a batch.
_SIZES = {"cuda": (160, 32), "cpu": (64, 16)}
#: On a CPU nothing is decided, and the smallest model does.
_SMALLEST = {"vision_width": 32, "vision_layers": 1, "text_width": 32, "text_layers": 1, "projection_dim": 16}


def checks(note: Callable[[str, Any], None], device: torch.device, left: Callable[[], float], images: Any) -> None:
    """Every check, the most decisive first; each that fails says so and leaves the others alone."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Small(device, Path(folder))
        note("losses_against_float64", lambda: losses(device))
        note("look_up_against_cpu", lambda: look_up(device))
        # The tests resume each of them on a CPU anyway.
        for name, cls in TRAINERS.items() if device.type == "cuda" else (("safeclip", SafeCLIPTrainer),):
            note(f"resumed_to_the_bit_{name}", lambda cls=cls: bench.resumed(cls))
        for name, cls in TRAINERS.items():
            note(f"waits_for_the_device_{name}", lambda cls=cls: bench.waits(cls))
        note("safeclip_scores_against_cpu", bench.scores)
        note("evaluation_against_cpu", bench.evaluation)
        for precision in ("bf16", "fp16") if device.type == "cuda" else ("bf16",):
            note(precision, lambda precision=precision: bench.half(precision))
        note("transfer", lambda: transfer(device))
        note("scan_pairs_against_cpu", bench.scan_of_pairs)
        note("scan_checkpoint_against_cpu", bench.scan_of_checkpoints)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    one, two = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((one - two).abs().max() / two.abs().max().clamp_min(1e-30))


def losses(device: torch.device) -> dict[str, float]:
    """Each loss and its gradient in float32 on the device, against float64 on the CPU: relative differences."""
    generator = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(256, 64, generator=generator, dtype=torch.float64), dim=1) for _ in range(4)]
    pools = [F.normalize(torch.randn(500, 64, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]
    found: dict[str, float] = {}
    of_each = {
        "clip": lambda e, s, p: {"loss": clip_loss(*e[:2], s)},
        "sigmoid": lambda e, s, p: {"loss": sigmoid_loss(*e[:2], s, s.new_tensor(-10.0))},
        "cleanclip": lambda e, s, p: cleanclip_loss(*e, s),
        "par": lambda e, s, p: par_loss(*e, s),
        "roclip": lambda e, s, p: roclip_loss(*e[:2], s, *p, matching="cross"),
        "safeclip": lambda e, s, p: safeclip_unimodal_loss(*e, s, *p),
    }
    for name, loss in of_each.items():
        values = []
        for place, dtype in (("cpu", torch.float64), (device, torch.float32)):
            moved = [side.to(place, dtype, copy=True).requires_grad_() for side in sides]
            scale = torch.tensor(20.0, device=place, dtype=dtype)
            total = torch.stack(list(loss(moved, scale, [pool.to(place, dtype) for pool in pools]).values())).sum()
            total.backward()
            values.append((total, torch.cat([side.grad for side in moved if side.grad is not None])))
        (expected, gradient), (value, found_gradient) = values
        found[name] = relative(value, expected)
        found[f"{name}_gradient"] = relative(found_gradient, gradient)
    return found


def look_up(device: torch.device) -> dict[str, float]:
    """The share of queries for which another entry is found than on the CPU, and by how little that is nearer."""
    generator = torch.Generator().manual_seed(0)
    features, queries = (F.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (5000, 512))
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        slots = []
        for place in ("cpu", device):
            pool = FeaturePool(len(features), 64, dtype).to(place)
            pool.enqueue(features.to(place))
            slots.append(pool.nearest_slots(queries.to(place)).cpu())
        kept = features.to(dtype).double()
        lost = ((kept[slots[0]] - kept[slots[1]]) * queries.double()).sum(dim=1)
        name = str(dtype).removeprefix("torch.")
        found |= {f"{name}_others": float((slots[0] != slots[1]).double().mean()), f"{name}_lost": float(lost.max())}
    return found


def transfer(device: torch.device) -> dict[str, float]:
    """GB a second of a batch of bytes to the device, from pinned memory and from other."""
    batch = torch.zeros(256 if device.type == "cuda" else 8, 3, 224, 224, dtype=torch.uint8)
    sources = {"pageable": batch, **({"pinned": batch.pin_memory()} if device.type == "cuda" else {})}
    found = {}
    for name, source in sources.items():
        times = [run_seconds(lambda s=source: s.to(device, non_blocking=True, copy=True), device) for _ in range(6)]
        found[name] = source.nbytes / min(times) / 1e9
    return found


class Small:
    """Trainings of a small model on a few digits."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.folder, self.processor = device, folder, digit_processor()
        self.rows, self.batch = _SIZES[device.type]
        self.pairs, self.test = load_digit_pairs(renderings=1).select(range(self.rows)), load_digit_pairs("test")

    def model(self, seed: int = 0) -> CLIPModel:
        return build_model(self.processor, **(_SMALLEST if self.device.type == "cpu" else {}), seed=seed)

    def trainer(self, cls: type[CLIPTrainer], name: str, use_cpu: bool = False, **given: Any) -> CLIPTrainer:
        arguments: CLIPTrainingArguments = cls.args_class(
            str(self.folder / name),
            **{
                "per_device_train_batch_size": self.batch,
                "num_train_epochs": 2,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": use_cpu or self.device.type == "cpu",
                **_GIVEN.get(cls, {}),
                **given,
            },
        )
        trainer = cls(self.model(), arguments, train_dataset=self.pairs, processing_class=self.processor)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def resumed(self, cls: type[CLIPTrainer]) -> bool:
        """Whether a training that was interrupted in its first epoch ends in the same bits."""
        whole = self.trainer(cls, "whole", save_strategy="steps", save_steps=2)
        whole.train()
        again = self.trainer(cls, "again")
        again.train(resume_from_checkpoint=str(self.folder / "whole" / "checkpoint-2"))
        one, two = ({**t.model.state_dict(), **t.training_state()} for t in (whole, again))
        return all(torch.equal(value.nan_to_num(), two[name].nan_to_num()) for name, value in one.items())

    def waits(self, cls: type[CLIPTrainer]) -> dict[str, int]:
        """How often a step made Python wait for the device, by the place in the code; empty on a CPU."""
        found: dict[str, int] = {}
        original = Trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if self.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    return original(*args, **kwargs)
                finally:
                    if self.device.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
                    for warning in caught:
                        if "synchronizing" in str(warning.message):
                            place = f"{Path(warning.filename).name}:{warning.lineno}"
                            found[place] = found.get(place, 0) + 1

        trainer = self.trainer(cls, "waits", logging_steps=1000, max_steps=4)
        Trainer.training_step = watched  # type: ignore[method-assign] # for this training alone
        try:
            trainer.train()
        finally:
            Trainer.training_step = original  # type: ignore[method-assign]
        return found

    def half(self, precision: str) -> dict[str, float]:
        """The mean loss of a training in half precision, and of the same in float32."""
        found = {}
        for name, given in ((precision, {precision: True}), ("float32", {})):
            trainer = self.trainer(CLIPTrainer, name, **given)
            found[name] = float(trainer.train().metrics["train_loss"])
        return found

    def scores(self) -> float:
        """SafeCLIP's scores of all pairs, against those on the CPU: the largest difference."""
        found = [
            self.trainer(SafeCLIPTrainer, "scores", use_cpu=cpu).score_pairs(epoch=0, augmented=False)
            for cpu in (False, True)
        ]
        assert found[0] is not None and found[1] is not None  # this is the first rank
        return float(abs(found[0].similarities - found[1].similarities).max())

    def evaluation(self) -> float:
        """The figures of an evaluation, with and without a trigger, against the CPU's: the largest difference."""
        options: dict[str, Any] = {"class_names": CLASS_NAMES, "templates": CAPTION_TEMPLATES}
        test = self.test.select(range(self.rows))
        evaluators = evaluator_list(
            [ZeroShotEvaluator(test, **options), AttackSuccessEvaluator(test, BlendedTrigger(), "eight", **options)]
        )
        found = []
        for cpu in (False, True):
            trainer = self.trainer(CLIPTrainer, "evaluated", use_cpu=cpu)
            found.append(run_evaluators(evaluators, self.processor, trainer.make_embedder()))
        return max(abs(value - found[1][name]) for name, value in found[0].items() if not name.endswith("_time"))

    def trained(self) -> CLIPModel:
        """One that knows the digits a little."""
        trainer = self.trainer(CLIPTrainer, "trained", num_train_epochs=4)
        trainer.train()
        model: CLIPModel = trainer.unwrapped_model
        return model

    def scan_of_pairs(self) -> dict[str, float]:
        """The scores that the scan gives pairs, against those on the CPU: the largest difference of each kind."""
        model = self.trained()
        places = [copy.deepcopy(model).to(place) for place in (self.device, "cpu")]
        scans = [scan_pairs(model, self.processor, self.pairs) for model in places]
        one, two = (scan.scores.with_format("numpy") for scan in scans)
        floats = [name for name in one.column_names if one.features[name].dtype.startswith("float")]
        return {name: float(np.nanmax(abs(one[name][:] - two[name][:]))) for name in floats}

    def scan_of_checkpoints(self) -> Any:
        """The scores that the scan gives candidates, against those on the CPU: the largest difference."""
        model, images = self.trained(), self.test.select(range(40))
        found = [
            scan_checkpoint(copy.deepcopy(model).to(place), self.processor, images, CLASS_NAMES, steps=5)
            for place in (self.device, "cpu")
        ]
        one, two = ({finding.name: finding.score for finding in each.findings} for each in found)
        return max(abs(one[name] - two[name]) for name in one)
