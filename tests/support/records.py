"""Records of runs that never took place."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_robust_clip.record import RunRecord

TRAINERS = {
    "CLIPTrainer": {},
    "CleanCLIPTrainer": {"unimodal_weight": 1.0},
    "RoCLIPTrainer": {"matching": "image_to_text", "pool_size": 0.02, "adversarial_phrase": None},
    "SafeCLIPTrainer": {"safe_threshold": 0.9},
}
ZERO_SHOT = {
    "measure": "zero-shot classification",
    "figures": ["clean_accuracy", "clean_balanced_accuracy"],
    "images": 400,
    "classes": ["one", "two", "three", "four"],
    "templates": ["a {}"],
    "dataset": {"name": "digits", "rows": 400},
}


def attack(prefix: str = "", target: str = "two", trigger: str = "patch", images: int = 300) -> dict[str, Any]:
    names = ("attack_success_rate", "triggered_accuracy", "trigger_distance")
    return {
        **ZERO_SHOT,
        "measure": "attack success",
        "figures": [f"{prefix}{name}" for name in names],
        "images": images,
        "trigger": {"name": trigger, "size": 3},
        "target": target,
    }


def figures(accuracy: float, success: float, prefix: str = "") -> dict[str, float]:
    attacked = {"attack_success_rate": success, "triggered_accuracy": 1 - success, "trigger_distance": success}
    named = {f"{prefix}{name}": value for name, value in attacked.items()}
    return {"clean_accuracy": accuracy, "clean_balanced_accuracy": accuracy, **named}


def split(**changes: Any) -> dict[str, Any]:
    histogram = {"clean": np.repeat([0, 40, 400, 60], 50).tolist(), "poisoned": np.repeat([10, 5, 0, 0], 50).tolist()}
    record = {"epoch": 6, "safe_share": 0.25, "similarity_threshold": 0.4, "risky_mean": -0.2, "risky_variance": 0.02}
    record |= {"risky_weight": 0.2, "safe_mean": 0.3, "safe_variance": 0.01, "safe_weight": 0.8, "auroc": 0.98}
    record |= {"poisons_in_safe_set": 0.1, "safe_set_poison_rate": 0.01, "histogram": histogram}
    return {**record, **changes}


def make_record(trainer: str = "CleanCLIPTrainer", **changes: Any) -> RunRecord:
    """A run in which all went well."""
    before, after = figures(0.85, 0.9), figures(0.84, 0.02)
    log = [
        {"loss": 2.0 - step, "clip_loss": 1.0, "learning_rate": 1e-3, "epoch": step / 2, "step": step}
        for step in (1, 2)
    ]
    if trainer == "RoCLIPTrainer":
        log[1] |= {
            "match_similarity": 0.5,
            "distinct_matches": 0.4,
            "largest_match_share": 0.1,
            "pair_similarity": 0.2,
        }
    content = {
        "trainer": trainer,
        "method": trainer if trainer in TRAINERS else "CLIPTrainer",
        "model": {
            "name": "you/clip",
            "revision": None,
            "source": "hub",
            "type": "clip",
            "parameters": 1000,
            "trainable_parameters": 1000,
            "image_size": 16,
            "adapter": None,
        },
        "data": {"name": "pairs", "rows": 64, "fingerprint": "f00", "poisons": 3 * (trainer != "CleanCLIPTrainer")},
        "defence": {"image_column": "image", **TRAINERS.get(trainer, {})},
        "defence_defaults": {"image_column": "image", **TRAINERS.get(trainer, {})},
        "settings": {"learning_rate": 1e-3},
        "measures": [ZERO_SHOT, attack()],
        "before": before,
        "after": after,
        "after_step": 2,
        "steps": 2,
        "epochs": 1.0,
        "planned_steps": 2,
        "environment": {
            "versions": {"torch": "2"},
            "device": "CPU",
            "processes": 1,
            "precision": "float32",
            "seed": 0,
            "seconds": 3.0,
        },
        "course": [{"step": 0, "epoch": 0.0, **before}, {"step": 2, "epoch": 1.0, **after}],
        "log": log,
        "details": {"splits": [split(), split(epoch=7)]} if trainer == "SafeCLIPTrainer" else {},
        "augmentation": {"images": None, "captions": "TextAugmentation()"},
    }
    return RunRecord(**{**content, **changes})
