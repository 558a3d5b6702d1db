"""
CleanCLIP by LoRA against CleanCLIP of all weights, on the demo's poisoned model: what is left of the backdoor, what it
costs in accuracy, and how much has to be trained and remembered.

    python benchmarks/lora.py [--json FILE] [--seeds 0]

Each way takes its own learning rate: of four, the one with the largest clean accuracy less attack success on another
seed than those reported, with the blended trigger for both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from hf_robust_clip.cli.demo_recipe import FINETUNING
from hf_robust_clip.cli.demo_steps import digit_evaluators, make_trainer, make_trigger, poison_digits
from hf_robust_clip.cli.progress import quiet_libraries
from hf_robust_clip.cli.rows import CLEAN_SEED_OFFSET
from hf_robust_clip.data.digits import digit_model, digit_processor, load_digit_pairs
from hf_robust_clip.versions import versions

SEARCH_SEED = 11
PROJECTIONS = ["visual_projection", "text_projection"]
LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
#: Ways of fine-tuning: what PEFT is told, and the learning rates that are tried.
WAYS: dict[str, tuple[dict[str, Any] | None, tuple[float, ...]]] = {
    "all weights": (None, (1e-3, 2e-3, 4e-3, 8e-3)),
    "LoRA, rank 4": ({"r": 4}, (2e-3, 5e-3, 1e-2, 2e-2)),
    "LoRA, rank 16": ({"r": 16}, (2e-3, 5e-3, 1e-2, 2e-2)),
}
FIGURES = ("clean_accuracy", "attack_success_rate")


class Setting:
    """The demo's data and poisoned model of one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder, self.recipe = seed, folder, FINETUNING
        trigger, recipe = make_trigger("blended", seed), self.recipe
        pairs = load_digit_pairs("train", recipe.renderings, seed=seed)
        test = load_digit_pairs("test", seed=seed)
        self.clean = load_digit_pairs("train", recipe.renderings, seed=seed + CLEAN_SEED_OFFSET)
        self.shared = {
            "processing_class": digit_processor(),
            "evaluators": digit_evaluators(test, trigger, recipe.target),
        }
        poisoned, _ = poison_digits(pairs, trigger, recipe, seed)
        self.start = str(folder / f"poisoned-{seed}")
        trainer = make_trainer(
            "poisoned", recipe, folder, seed, model=digit_model(seed), train_dataset=poisoned, **self.shared
        )
        self.before = trained_figures(trainer)
        trainer.save_model(self.start)

    def clean_by(self, way: str, learning_rate: float) -> dict[str, Any]:
        """Fine-tune the poisoned model with CleanCLIP in one of the ways."""
        settings = WAYS[way][0]
        adapters = None
        if settings is not None:
            rank = settings["r"]
            adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR, modules_to_save=PROJECTIONS)
        trainer = make_trainer(
            "cleanclip",
            self.recipe.with_arguments(finetuning={"learning_rate": learning_rate}),
            self.folder,
            self.seed,
            model=self.start,
            train_dataset=self.clean,
            peft_config=adapters,
            **self.shared,
        )
        start = time.perf_counter()
        figures = trained_figures(trainer)
        trained = [value for value in trainer.model.parameters() if value.requires_grad]
        moments = [
            value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        return {
            **figures,
            "learning_rate": learning_rate,
            "trained_parameters": sum(value.numel() for value in trained),
            "parameters": sum(value.numel() for value in trainer.model.parameters()),
            # Of the gradients and of the optimizer's moments; activations are much the same.
            "training_bytes": sum(value.numel() * value.element_size() for value in [*trained, *moments]),
            "seconds": time.perf_counter() - start,
        }


def trained_figures(trainer: Any) -> dict[str, float]:
    """Train without the demo's evaluations, and measure."""
    trainer.args.eval_strategy, trainer.args.eval_on_start = "no", False
    trainer.train()
    figures = trainer.run_evaluators()
    return {name: figures[name] for name in FIGURES}


def measure(seeds: list[int]) -> dict[str, Any]:
    """The search, and the figures of each way and seed."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(SEARCH_SEED, Path(folder))
        searched: dict[str, list[dict[str, Any]]] = {}
        for way, (_, rates) in WAYS.items():
            searched[way] = [setting.clean_by(way, rate) for rate in rates]
            for found in searched[way]:
                print(f"  search, {way}, {found['learning_rate']:g}: {line(found)}", flush=True)
        chosen = {
            way: max(found, key=lambda one: one["clean_accuracy"] - one["attack_success_rate"])["learning_rate"]
            for way, found in searched.items()
        }
        runs = []
        for seed in seeds:
            setting = Setting(seed, Path(folder))
            print(f"  seed {seed}, poisoned: {line(setting.before)}", flush=True)
            cleaned = {way: setting.clean_by(way, chosen[way]) for way in WAYS}
            runs.append({"seed": seed, "poisoned": setting.before, **cleaned})
            for way, found in cleaned.items():
                print(f"  seed {seed}, {way}: {line(found)}", flush=True)
    return {"search": searched, "learning_rates": chosen, "runs": runs}


def line(figures: dict[str, float]) -> str:
    """The two figures as text."""
    return f"accuracy {figures['clean_accuracy']:.1%}, attack {figures['attack_success_rate']:.1%}"


def table(results: dict[str, Any]) -> str:
    """As Markdown: a row for each way and seed."""
    heads = ("seed", "trained", "learning rate", "clean accuracy", "attack success", "parameters trained")
    rows = [(*heads, "gradients and optimizer", "seconds"), ("---",) * 8]
    for run in results["runs"]:
        before = run["poisoned"]
        shares = f"{before['clean_accuracy']:.1%}", f"{before['attack_success_rate']:.1%}"
        rows.append((str(run["seed"]), "nothing: the poisoned model", "", *shares, "", "", ""))
        for way in WAYS:
            found = run[way]
            share = found["trained_parameters"] / found["parameters"]
            rows.append(
                (
                    *(str(run["seed"]), way, f"{found['learning_rate']:g}"),
                    *(f"{found['clean_accuracy']:.1%}", f"{found['attack_success_rate']:.1%}"),
                    f"{found['trained_parameters']:,} ({share:.0%})",
                    *(f"{found['training_bytes'] / 1e6:.1f} MB", f"{found['seconds']:.0f}"),
                )
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds reported (default: 0)")
    args = parser.parse_args()
    with quiet_libraries():
        results = measure(args.seeds)
    results["versions"] = versions()
    results["device"] = f"CPU, {torch.get_num_threads()} thread(s)"
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
