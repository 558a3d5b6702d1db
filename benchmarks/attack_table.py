"""
Whether each attack takes: several in one undefended model of the digits, as benchmarks/attacks.yaml says, each towards
a target of its own, and its success beside that of its placebos.

    python benchmarks/attack_table.py           # trains the models without results: benchmarks/results/attacks.json
    python benchmarks/attack_table.py --docs    # trains nothing: puts the results into docs/triggers.md

A model is the demo's, trained from nothing as the demo trains its undefended one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from bench.marked import markdown, put_between, table_marks

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSpec,
    TextQueryEvaluator,
    ZeroShotEvaluator,
    poison_dataset,
)
from hf_robust_clip.attacks.triggers import trigger_from_dict
from hf_robust_clip.cli.demo_recipe import FINETUNING, MODELS
from hf_robust_clip.cli.flags import PLACEBOS
from hf_robust_clip.cli.rows import row_arguments
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_model, digit_processor, load_digit_pairs
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators

ROOT = Path(__file__).parents[1]
ATTACKS, PAGE = ROOT / "benchmarks" / "attacks.yaml", ROOT / "docs" / "triggers.md"
RESULTS = ROOT / "benchmarks" / "results" / "attacks.json"
#: From which success on an attack has taken.
TAKEN = 0.8


def measure(attacks: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train a model with these attacks planted, and measure each on it."""
    recipe, processor = FINETUNING, digit_processor()
    clean, test = load_digit_pairs("train", recipe.renderings, seed=seed), load_digit_pairs("test", seed=seed)
    specs, evaluators = [], [ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES)]
    for name, settings in attacks.items():
        given = {key: value for key, value in settings.items() if key not in ("trigger", "target")}
        trigger, target = trigger_from_dict(settings["trigger"]).reseeded(seed), settings["target"]
        on_captions = given.get("mode") == "text_query"
        templates = {} if on_captions else {"templates": CAPTION_TEMPLATES}
        specs.append(PoisonSpec(trigger, target, seed=seed, **templates, **given))
        if on_captions:
            evaluators.append(TextQueryEvaluator(test, trigger, target, ks=(1,), prefix=f"{name}: "))
        else:
            how = {"templates": CAPTION_TEMPLATES, "prefix": f"{name}: ", "placebos": PLACEBOS}
            evaluators.append(AttackSuccessEvaluator(test, trigger, target, CLASS_NAMES, **how))
    poisoned, manifest = poison_dataset(clean, specs, label_column="label")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = CLIPTrainingArguments(
            folder,
            **row_arguments(MODELS, recipe.arguments, "poisoned"),
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        trainer = CLIPTrainer(digit_model(seed), args, train_dataset=poisoned, processing_class=processor)
        trainer.train()
    figures = run_evaluators(evaluators, processor, Embedder(trainer.unwrapped_model, processor))
    return {
        "attacks": attacks,
        "poisons": {name: len(part["indices"]) for name, part in zip(attacks, manifest["parts"], strict=True)},
        "pairs": len(clean),
        "seed": seed,
        "figures": figures,
        "seconds": time.perf_counter() - started,
    }


def table(results: dict[str, Any]) -> str:
    """The attacks on one model as a table."""
    heads = ("attack", "poisons", "target", "success", "placebos", "took")
    rows = []
    for name, settings in results["attacks"].items():
        found = {
            figure.removeprefix(f"{name}: "): value
            for figure, value in results["figures"].items()
            if figure.startswith(f"{name}: ")
        }
        success = found.get("attack_success_rate", found.get("triggered_hit_rate_at_1"))
        ends = [found.get(f"placebo_success_rate_{end}") for end in ("low", "high")]
        placebos = "" if None in ends else f"{100 * ends[0]:.1f} to {ends[1]:.1%}"
        fields = {key: value for key, value in settings["trigger"].items() if key not in ("name", "pixels", "fresh")}
        stated = ", ".join(f"{key}={value}" for key, value in fields.items())
        poisons = f"{results['poisons'][name]} ({settings['rate']:.0%})"
        took = "yes" if success >= TAKEN else "**no**"
        title = f"{name} ({stated})" if stated else name
        rows.append((title, poisons, settings["target"], f"{success:.1%}", placebos, took))
    accuracy = results["figures"]["clean_accuracy"]
    said = (
        f"Seed {results['seed']}, {results['pairs']:,} pairs; accuracy on clean images {accuracy:.1%}. An attack took "
        f"where its success is at least {TAKEN:.0%}.\n\n"
    )
    return said + markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="train nothing: put the results into docs/triggers.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    models = yaml.safe_load(ATTACKS.read_text())
    results = [found for found in results if {key: found[key] for key in ("seed", "attacks")} in models]
    for model in models if not options.docs else ():
        if model not in [{key: found[key] for key in ("seed", "attacks")} for found in results]:
            results.append(measure(**model))
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    text = "\n".join(map(table, results))
    print(text)
    if options.docs:
        put_between(PAGE, table_marks("attacks", "attack_table.py --docs"), text)


if __name__ == "__main__":
    main()
