"""From a trainer to the record of its run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from ..describing import describe_evaluator, thinned
from ..record import RunRecord, checked, jsonable
from ..versions import versions
from .arguments import own_fields

if TYPE_CHECKING:
    from .base import CLIPTrainer

#: Metrics of an evaluation that are no figures of an evaluator.
_TIMES = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
#: Arguments that do not change what a model becomes, by the beginning of their names.
_OUTCOME_FREE = (
    *("output_dir", "hub_", "push_to_hub", "logging_", "log_", "save_", "eval_", "report_to", "run_name", "do_"),
    *("disable_tqdm", "project", "trackio_", "resume_from_checkpoint", "dataloader_", "include_", "per_device_eval_"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "enable_jit_checkpoint", "restore_"),
    *("accelerator_config", "activation_checkpointing", "gradient_checkpointing", "debug"),
    *("prediction_loss_only", "remove_unused_columns", "ddp_timeout", "skip_memory_metrics", "use_cpu", "batch_eval_"),
)


def record_of(trainer: CLIPTrainer) -> RunRecord:
    """The run of a trainer as far as it has come."""
    args, state = trainer.args, trainer.state
    defaults = {item.name: _default(item) for item in dataclasses.fields(args) if item.init}
    own = [item.name for item in own_fields(type(args)) if not item.name.startswith(_OUTCOME_FREE)]
    values = {name: jsonable(getattr(args, name)) for name in defaults}
    settings = {
        name: value
        for name, value in values.items()
        if name not in own and value != defaults[name] and not name.startswith(_OUTCOME_FREE)
    }
    course = evaluations(state.log_history)
    before = course[0] if course and course[0]["step"] == 0 else None
    after = _saved_weights(trainer, course)
    content = {
        "trainer": type(trainer).__name__,
        "model": _describe_model(trainer),
        "data": trainer.describe_data(),
        "defence": {name: values[name] for name in own},
        "defence_defaults": {name: defaults[name] for name in own},
        "settings": settings,
        "measures": [describe_evaluator(evaluator) for evaluator in trainer.evaluators],
        "before": _figures(before) if before is not None else trainer.figures_before,
        "after": None if after is None else _figures(after),
        "after_step": None if after is None else after["step"],
        "steps": state.global_step,
        "epochs": float(state.epoch or 0),
        "planned_steps": state.max_steps,
        "course": course,
        "log": thinned([_numbers(entry) for entry in state.log_history if "loss" in entry]),
        "details": trainer.defence.notes(),
        "method": next(cls.__name__ for cls in type(trainer).__mro__ if _is_ours(cls)),
        "augmentation": {
            "images": _describe_augmentation(trainer.image_augmentation),
            "captions": _describe_augmentation(trainer.data_collator.text_augmentation),
        },
        "skipped": trainer.skipped,
        "environment": {
            "versions": versions(),
            "device": _device_name(args.device),
            "processes": args.world_size,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
            "seed": args.seed,
            "seconds": round(trainer.training_seconds, 1),
        },
    }
    return checked(RunRecord, content, "the record of this run")


def evaluations(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluators' figures of each evaluation, with its `step` and `epoch`."""
    found = []
    for entry in log_history:
        figures = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        figures = _numbers({name: value for name, value in figures.items() if not name.endswith(_TIMES)})
        if figures:
            found.append({"step": entry["step"], "epoch": entry.get("epoch") or 0.0, **figures})
    return found


def _saved_weights(trainer: CLIPTrainer, course: Sequence[Mapping[str, float]]) -> Mapping[str, float | None] | None:
    """The evaluation of the weights as they are: of all after training, of the best, or the last."""
    if trainer.figures_after is not None:
        return {"step": trainer.state.global_step, **trainer.figures_after}
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    taken = [entry for entry in course if entry["step"] > 0 and best in (None, entry["step"])]
    return taken[-1] if taken else None


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """What of a log can be drawn: a callback may log anything."""
    numbers = {name: value for name, value in entry.items() if isinstance(value, Real) and not isinstance(value, bool)}
    return {name: float(value) for name, value in numbers.items()}


def _figures(entry: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in entry.items() if name not in ("step", "epoch")}


def _describe_model(trainer: CLIPTrainer) -> dict[str, Any]:
    model = trainer.unwrapped_model
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
        "image_size": trainer.data_collator.preprocess.image_size,
        "adapter": _describe_adapter(next(iter(adapter.values()))) if adapter else None,
    }


def _describe_augmentation(augmentation: Any) -> str | None:
    """One of ours with its settings, any other by its name."""
    if augmentation is None:
        return None
    if _is_ours(type(augmentation)):
        return repr(augmentation)
    return getattr(augmentation, "__name__", type(augmentation).__name__)


def _is_ours(cls: type[Any]) -> bool:
    return cls.__module__.partition(".")[0] == __package__.partition(".")[0]


def _describe_adapter(config: Any) -> dict[str, Any]:
    given = {name: jsonable(value) for name, value in config.to_dict().items()}
    names = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
    return {name: given[name] for name in names if given.get(name)}


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return jsonable(item.default_factory())
    return jsonable(item.default)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
