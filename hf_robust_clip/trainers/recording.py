"""The record of a run, from the values of its trainer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from transformers import TrainerState

from ..arguments import CLIPTrainingArguments, own_fields
from ..defences import defence_named
from ..defences.base import Defence
from ..defences.clip import CLIP
from ..describing import describe_evaluator, thinned
from ..record import RunRecord, Skipped, checked, jsonable
from ..versions import versions

#: Metrics of an evaluation that do not come from an evaluator.
_TIMES = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
#: Arguments that do not change what a model becomes, by the beginning of their names.
_OUTCOME_FREE = (
    *("output_dir", "hub_", "push_to_hub", "logging_", "log_", "save_", "eval_", "report_to", "run_name", "do_"),
    *("disable_tqdm", "project", "trackio_", "resume_from_checkpoint", "include_", "per_device_eval_"),
    *("dataloader_num_", "dataloader_p", "dataloader_in_order", "dataloader_multi", "restore_"),
    *("accelerator_config", "enable_jit_checkpoint", "activation_checkpointing", "gradient_checkpointing", "debug"),
    *("prediction_loss_only", "remove_unused_columns", "ddp_timeout", "skip_memory_metrics", "use_cpu", "batch_eval_"),
)


def record_of(
    trainer: type[Any],
    model: Any,
    args: CLIPTrainingArguments,
    state: TrainerState,
    *,
    data: dict[str, Any] | None,
    evaluators: Sequence[Any],
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
    defence: Defence,
    image_size: int,
    augmentations: tuple[Any, Any],
    skipped: Skipped | None,
    seconds: float,
    sigmoid: bool,
) -> RunRecord:
    """
    The run as far as it has come.

    Args:
        trainer (class): The trainer's.
        model: Without wrappers.
        args, state: The trainer's.
        data: Of [`~describing.describe_dataset`]; `None` without any.
        evaluators: Whose metrics `before`, `after` and the log of `state` hold.
        before, after: Metrics of evaluations outside of training, where there were any.
        defence: Its notes are in the record.
        image_size: Pixels of a side.
        augmentations: Of images, and of captions.
        skipped: The rows that were passed over.
        seconds: Time spent in training.
        sigmoid: Whether images and captions were contrasted with the sigmoid loss, whoever decided it.
    """
    defaults = {item.name: _default(item) for item in dataclasses.fields(args) if item.init}
    own = [item.name for item in own_fields(type(args)) if not item.name.startswith(_OUTCOME_FREE)]
    values = {name: jsonable(getattr(args, name)) for name in defaults}
    if sigmoid:
        values["loss_type"] = "sigmoid"
    settings = {
        name: value
        for name, value in values.items()
        if name not in own and value != defaults[name] and not name.startswith(_OUTCOME_FREE)
    }
    course = evaluations(state.log_history)
    if course and course[0]["step"] == 0:
        before = _figures(course[0])
    saved = _saved_weights(args, state, course) if after is None else {"step": state.global_step, **after}
    content = {
        "trainer": trainer.__name__,
        "model": _describe_model(model, image_size),
        "data": data,
        "defence": {name: values[name] for name in own},
        "defence_defaults": {name: defaults[name] for name in own},
        "settings": settings,
        "measures": [describe_evaluator(evaluator) for evaluator in evaluators],
        "before": before,
        "after": None if saved is None else _figures(saved),
        "after_step": None if saved is None else saved["step"],
        "steps": state.global_step,
        "epochs": float(state.epoch or 0),
        "planned_steps": state.max_steps,
        "course": course,
        "log": thinned([_numbers(entry) for entry in state.log_history if "loss" in entry]),
        "details": defence.notes(),
        "method": _method(type(defence)),
        "augmentation": {
            "images": _describe_augmentation(augmentations[0]),
            "captions": _describe_augmentation(augmentations[1]),
        },
        "skipped": skipped,
        "environment": {
            "versions": versions(),
            "device": _device_name(args.device),
            "processes": args.world_size,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
            "seed": args.seed,
            "seconds": round(seconds, 1),
        },
    }
    return checked(RunRecord, content, "the record of this run")


def evaluations(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluators' metrics of each evaluation, with its `step` and `epoch`."""
    found = []
    for entry in log_history:
        figures = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        figures = _numbers({name: value for name, value in figures.items() if not name.endswith(_TIMES)})
        if figures:
            found.append({"step": entry["step"], "epoch": entry.get("epoch") or 0.0, **figures})
    return found


def _saved_weights(
    args: CLIPTrainingArguments, state: TrainerState, course: Sequence[Mapping[str, float]]
) -> Mapping[str, float] | None:
    """The evaluation during training of the weights that are kept: the best, or the last."""
    best = state.best_global_step if args.load_best_model_at_end else None
    taken = [entry for entry in course if entry["step"] > 0 and best in (None, entry["step"])]
    return taken[-1] if taken else None


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """What of a log can be drawn: a callback may log anything."""
    return {
        name: float(value) for name, value in entry.items() if isinstance(value, Real) and not isinstance(value, bool)
    }


def _figures(entry: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in entry.items() if name not in ("step", "epoch")}


def _describe_model(model: Any, image_size: int) -> dict[str, Any]:
    adapter = getattr(model, "peft_config", None)
    name = str(getattr(model.config, "_name_or_path", "") or "")
    source = "memory" if not name else "folder" if os.path.exists(name) else "hub"
    count = dict.fromkeys((True, False), 0)
    for parameter in model.parameters():
        count[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return {
        # A folder's name says nothing to others, and something of the machine.
        "name": name if source == "hub" else None,
        "revision": getattr(model.config, "_commit_hash", None) if source == "hub" else None,
        "source": source,
        "type": str(model.config.model_type),
        "parameters": sum(count.values()),
        "trainable_parameters": count[True],
        "image_size": image_size,
        "adapter": _describe_adapter(next(iter(adapter.values()))) if adapter else None,
    }


def _describe_augmentation(augmentation: Any) -> str | None:
    """One of ours with its settings, any other by its name."""
    if augmentation is None:
        return None
    if type(augmentation).__module__.startswith("hf_robust_clip."):
        return repr(augmentation)
    return getattr(augmentation, "__name__", type(augmentation).__name__)


def _method(defence: type[Defence]) -> str:
    """The trainer of a defence that ships, or of one that derives from it; of another, the name of its class."""
    ours = [cls.__name__ for cls in defence.__mro__ if defence_named(cls.__name__) is cls]
    # What derives from CLIP has a loss of its own.
    return f"{ours[0]}Trainer" if ours and (defence is CLIP or ours[0] != "CLIP") else defence.__name__


def _describe_adapter(config: Any) -> dict[str, Any]:
    settings = {name: jsonable(value) for name, value in config.to_dict().items()}
    names = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
    return {name: settings[name] for name in names if settings.get(name)}


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return jsonable(item.default_factory())
    return jsonable(item.default)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
