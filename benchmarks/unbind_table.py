"""
Unbind on the digits: what its adversary and each of its families are worth, against twins that were never poisoned.

    python benchmarks/unbind_table.py --search 0.001 0.002 0.004
    python benchmarks/unbind_table.py --arms plain random unbind

A model has all backdoors at once, each with a target of its own. Each is cleaned by each arm, and so is the twin,
which learned the same pairs without poisons. What is reported is the excess: the attack success of a cleaned model
less that of its cleaned twin under the same trigger. `--search` tries learning rates on a seed that is not reported;
those with the best accuracy less mean attack success are then used.

Each result is saved as it comes in `benchmarks/results/unbind/digits.json`, and is not computed again. The table goes
next to it, as Markdown, and with `--docs` into docs/unbind.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from bench.grid import Results
from bench.marked import put_between, table_marks
from bench.material import Material, load_material, start_model
from bench.study import digest, load_study
from datasets import disable_progress_bars
from transformers import PrinterCallback, set_seed

from hf_robust_clip import AttackSuccessEvaluator, ImageAugmentation, PoisonSpec, ZeroShotEvaluator, poison_dataset
from hf_robust_clip.attacks.triggers import trigger_from_dict
from hf_robust_clip.cli.progress import quiet_libraries, quiet_trainers
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.trainers.defended import TRAINERS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "unbind" / "digits.json"
PAGE = ROOT / "docs" / "unbind.md"
STUDY = load_study("digits")
#: Its share of the pairs, and of each attack its trigger and its target.
RATE = 0.01
ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    "blended": ({"name": "blended", "alpha": 0.2}, "six"),
    "patch": ({"name": "patch", "size": 3}, "three"),
    "sinusoid": ({"name": "sinusoid", "amplitude": 30, "frequency": 4}, "zero"),
    "warp": ({"name": "warp", "strength": 4}, "nine"),
    "stripes": ({"name": "patch", "size": 3, "pattern": "stripes", "place": "top_left"}, "one"),
    "triangles": ({"name": "blended", "alpha": 0.2, "pattern": "triangles"}, "four"),
    "text": ({"name": "blended", "alpha": 0.2, "pattern": "text"}, "seven"),
}
PRETRAINING_RATE = 0.001
SEARCH_SEED, SEEDS = 11, (2, 3, 4)


class Arm(NamedTuple):
    """A way to clean: what the table calls it, its trainer, its arguments, and the learning rates that are tried."""

    title: str
    trainer: str
    arguments: Mapping[str, Any] = {}
    augmentation: Mapping[str, Any] | None = None
    rates: Sequence[float] = (0.002,)


#: Plain fine-tuning's and CleanCLIP's rates were searched by `defence_table.py --study digits`.
_TRIED = (0.001, 0.002, 0.004)
ARMS: dict[str, Arm] = {
    "plain": Arm("plain fine-tuning", "clip"),
    "cleanclip": Arm("CleanCLIP", "cleanclip", STUDY.row_arguments("cleanclip"), STUDY.row_augmentation("cleanclip")),
    "random": Arm("Unbind, perturbations drawn at random", "unbind", {"adversary": "none"}, rates=_TRIED),
    "unbind": Arm("Unbind, perturbations that learn", "unbind", {"adversary": "universal"}, rates=_TRIED),
    "no_add": Arm("Unbind without additions", "unbind", {"adversary": "none", "families": "patch=3,warp=3"}),
    "no_patch": Arm("Unbind without patches", "unbind", {"adversary": "none", "families": "add=3,warp=3"}),
    "no_warp": Arm("Unbind without warps", "unbind", {"adversary": "none", "families": "add=3,patch=3"}),
}


class Model(NamedTuple):
    """A model: the attacks planted in it, and its seed; the arm that cleaned it, and at which rate."""

    planted: tuple[str, ...]
    seed: int
    arm: str | None = None
    rate: float = PRETRAINING_RATE

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides how it comes out."""
        row = "undefended" if self.arm is None else "plain"
        arguments = STUDY.row_arguments(row) | dict(ARMS[self.arm].arguments if self.arm else {})
        augmentation = ARMS[self.arm].augmentation if self.arm else None
        return {
            "planted": {name: ATTACKS[name] for name in self.planted},
            "poison_rate": RATE,
            "seed": self.seed,
            "arm": self.arm,
            "arguments": arguments | {"learning_rate": self.rate},
            "augmentation": dict(augmentation) if augmentation else None,
        }

    @property
    def key(self) -> str:
        return digest(self.settings)

    def result(self, results: Results) -> dict[str, Any]:
        return results.cells[self.key]


def run(model: Model, results: Results, work: Path) -> None:
    """Train and measure a model that has no result yet, after the one that it starts from."""
    before = Model(model.planted, model.seed) if model.arm else None
    if model.key in results.cells:
        return
    if before is not None and not (work / before.key).is_dir():
        results.cells.pop(before.key, None)  # its weights are gone
        run(before, results, work)
    material = load_material(STUDY, None, model.seed)
    with quiet_libraries(), quiet_trainers():
        start = time.process_time()
        trained = train(model, before, material, work)
        seconds = time.process_time() - start
        folder = work / model.key
        trained.save_pretrained(folder)
        processor = load_processor(work / before.key, None) if before else start_model(STUDY, material, 0)[1]
        processor.save_pretrained(folder)
        figures = run_evaluators(evaluators(material, model.seed), processor, Embedder(trained, processor, 256))
    found = {
        "key": model.key,
        **model._asdict(),
        "accuracy": figures["clean_accuracy"],
        "success": {name: figures[f"{name}_attack_success_rate"] for name in ATTACKS},
        "right": {name: figures[f"{name}_triggered_accuracy"] for name in ATTACKS},
        "cpu_seconds": round(seconds, 1),
        "settings": model.settings,
    }
    results.add(found)
    shown = mean(found["success"][name] for name in model.planted or ATTACKS)
    print(f"{model}: accuracy {found['accuracy']:.1%}, attack success {shown:.1%}, {seconds:.0f} s", flush=True)


def train(model: Model, before: Model | None, material: Material, work: Path) -> Any:
    """The trained model."""
    settings = model.settings
    if before is None:
        start, processor = start_model(STUDY, material, model.seed)
        specs = [
            PoisonSpec(
                trigger_from_dict(trigger).reseeded(model.seed),
                target,
                rate=RATE,
                seed=model.seed,
                image_size=16,
                templates=material.templates,
            )
            for trigger, target in settings["planted"].values()
        ]
        pairs = poison_dataset(material.pairs, specs, label_column="label")[0] if specs else material.pairs
    else:
        start, processor = load_dual_encoder(work / before.key), load_processor(work / before.key, None)
        pairs = material.clean
    trainer_class = TRAINERS[ARMS[model.arm].trainer if model.arm else "clip"]
    augmentation = settings["augmentation"]
    set_seed(model.seed)
    trainer = trainer_class(
        start,
        trainer_class.args_class(
            str(work / "training"),
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            seed=model.seed,
            **settings["arguments"],
        ),
        train_dataset=pairs,
        processing_class=processor,
        image_augmentation=ImageAugmentation(**augmentation) if augmentation else "identity",
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def evaluators(material: Material, seed: int) -> list[Any]:
    """Of accuracy and of every attack."""
    named: dict[str, Any] = {"class_names": material.names, "templates": material.prompts}
    return [
        ZeroShotEvaluator(material.labelled, **named),
        *(
            AttackSuccessEvaluator(
                material.labelled, trigger_from_dict(trigger).reseeded(seed), target, **named, prefix=f"{name}_"
            )
            for name, (trigger, target) in ATTACKS.items()
        ),
    ]


def chosen_rate(arm: str, results: Results) -> float:
    """Of the rates tried on the seed of the search, that with the best accuracy less mean attack success."""
    tried = [Model(tuple(ATTACKS), SEARCH_SEED, arm, rate) for rate in ARMS[arm].rates]
    there = [model for model in tried if model.key in results.cells]

    def score(model: Model) -> float:
        result = model.result(results)
        return float(result["accuracy"] - mean(result["success"].values()))

    # The arms without a family have the rate of the whole.
    return max(there, key=score).rate if there else chosen_rate("random", results) if arm.startswith("no_") else 0.002


def table(results: Results) -> str:
    """What each arm leaves, over all seeds that it was run on with its twin."""
    headings = "learning rate | seeds | accuracy | excess, mean | excess, worst | right under the patch"
    lines = [f"| | {headings} |", f"|{'---|' * 7}"]
    for name, arm in ARMS.items():
        rate = chosen_rate(name, results)
        pairs = [(Model(tuple(ATTACKS), seed, name, rate), Model((), seed, name, rate)) for seed in SEEDS]
        pairs = [pair for pair in pairs if all(model.key in results.cells for model in pair)]
        if pairs:
            lines.append(f"| {arm.title} | {rate:g} | {' | '.join(figures(pairs, results))} |")
    return "\n".join([*lines, ""])


def figures(pairs: Sequence[tuple[Model, Model]], results: Results) -> list[str]:
    """A row of the table, from models and their twins."""
    excess, accuracy, right = [], [], []
    for model, twin in pairs:
        found, free = model.result(results), twin.result(results)
        excess += [found["success"][name] - free["success"][name] for name in model.planted]
        accuracy.append(found["accuracy"])
        right += [found["right"][name] for name in model.planted if name == "patch"]
    seeds = ", ".join(map(str, sorted({model.seed for model, _ in pairs})))
    return [
        seeds,
        f"{mean(accuracy):.1%}",
        f"{100 * mean(excess):+.1f}",
        f"{100 * max(excess):+.1f}",
        f"{mean(right):.1%}" if right else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=[], choices=[*ARMS], help="which are run, one after the other")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="(default: all)")
    parser.add_argument("--search", type=float, nargs="+", choices=_TRIED, help="learning rates to try first")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/unbind.md")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-output" / "unbind", help="folder for the models")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    disable_progress_bars()
    results = Results(RESULTS)
    if options.search:
        for rate in options.search:
            for arm in [name for name, arm in ARMS.items() if len(arm.rates) > 1]:
                run(Model(tuple(ATTACKS), SEARCH_SEED, arm, rate), results, options.work)
    for seed in options.seeds:
        for plan in (tuple(ATTACKS), ()):
            for arm in options.arms:
                run(Model(plan, seed, arm, chosen_rate(arm, results)), results, options.work)
    text = table(results)
    results.save(versions={"torch": torch.__version__})
    RESULTS.with_suffix(".md").write_text(text)
    if options.docs:
        put_between(PAGE, table_marks("unbind", "unbind_table.py --docs"), "\n" + text)
    print(text)


if __name__ == "__main__":
    main()
