"""
Does the scan of checkpoints name the class that a backdoor aims at, and does it leave clean models alone?

    OMP_NUM_THREADS=1 python benchmarks/scan_checkpoint.py --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/scan_checkpoint.py --seeds 3 4 5 6 7 --models clean
    OMP_NUM_THREADS=1 python benchmarks/scan_checkpoint.py --seeds 0 1 2 --tuned

Models have one backdoor or none. Settings and the threshold were chosen on the seed 11, which no summary counts. Each
result is saved as it comes in `benchmarks/results/scan_checkpoint.json`, and is not computed again; `--seeds` without
a number sums up what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench.grid import Results
from bench.material import Material, load_material, start_model
from bench.study import TWIN, Study, digest, load_study
from datasets import disable_progress_bars
from transformers import CLIPConfig, CLIPModel, set_seed
from unbind_table import ATTACKS, RATE

from hf_robust_clip import AttackSuccessEvaluator, PoisonSpec, ZeroShotEvaluator, poison_dataset, scan_checkpoint
from hf_robust_clip.attacks.triggers import trigger_from_dict
from hf_robust_clip.cli.progress import quiet_libraries, quiet_trainers
from hf_robust_clip.cli.rows import row_trainer
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.scanning.inversion import FAMILIES, effort_of, invert
from hf_robust_clip.versions import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scan_checkpoint.json"
#: The attacks that are reported. Warps are known to escape.
REPORTED = ("blended", "patch", "sinusoid", "stripes", "triangles")
#: Settings and the threshold were chosen on models of the first, and are reported on the others.
SEARCH_SEED, SEEDS = 11, (0, 1, 2)
LEARNING_RATE = 0.001
#: Success below which an attack did not take.
TOOK = 0.5
ABOUT = "about.json"


class Suspect(NamedTuple):
    """A model: its study, what is planted in it, its seed, and whether it was fine-tuned from the seed's clean one."""

    study: str
    planted: tuple[str, ...]
    seed: int
    tuned: bool = False

    @property
    def key(self) -> str:
        """Of its folder and its results."""
        return f"{self.study}-{'+'.join(self.planted) or 'clean'}-{self.seed}{'-tuned' if self.tuned else ''}"

    def key_of(self, with_base: bool) -> str:
        """Of the result of its scan."""
        return f"{self.key}{'-base' if with_base else ''}"

    @property
    def base(self) -> Suspect | None:
        """The clean model that it was fine-tuned from."""
        return Suspect(self.study, (), self.seed) if self.tuned else None


def attack_of(study: Study, name: str) -> tuple[dict[str, Any], str, float]:
    """An attack's trigger, its target, and its share of the pairs."""
    if study.name == "digits":
        trigger, target = ATTACKS[name]
        return trigger, target, RATE
    attack = study.attacks[name]
    return attack["trigger"], attack.get("target", study.target), attack["rate"]


def made(suspect: Suspect, work: Path, data: Path | None) -> dict[str, Any]:
    """Train and measure a model that is not there yet; its attack success and accuracy."""
    folder = work / suspect.key
    if (folder / ABOUT).is_file():
        return dict(json.loads((folder / ABOUT).read_text()))
    study = load_study(suspect.study)
    if suspect.base is not None:
        made(suspect.base, work, data)
    material = load_material(study, data, suspect.seed)
    model, processor = start_model(study, material, suspect.seed)
    pairs, phase = material.pairs, "undefended"
    if suspect.base is not None:
        model, processor = load_dual_encoder(work / suspect.base.key), load_processor(work / suspect.base.key, None)
        pairs, phase = material.clean or material.pairs, "plain"
    size = int(model.config.vision_config.image_size)
    triggers = {name: trigger_from_dict(attack_of(study, name)[0]).reseeded(suspect.seed) for name in suspect.planted}
    if triggers:
        specs = [
            PoisonSpec(
                trigger,
                attack_of(study, name)[1],
                rate=attack_of(study, name)[2],
                seed=suspect.seed,
                image_size=size,
                templates=material.templates,
            )
            for name, trigger in triggers.items()
        ]
        pairs = poison_dataset(pairs, specs, label_column="label")[0]
    set_seed(suspect.seed)
    arguments = {**study.row_arguments(phase), "learning_rate": LEARNING_RATE}
    start = time.process_time()
    with quiet_libraries(), quiet_trainers():
        trainer = row_trainer(
            "clip",
            work / "training",
            suspect.seed,
            arguments,
            None,
            model=model,
            train_dataset=pairs,
            processing_class=processor,
        )
        trainer.train()
        seconds = time.process_time() - start
        figures = run_evaluators(
            evaluators(study, material, triggers), processor, Embedder(trainer.model, processor, 256)
        )
    trainer.model.save_pretrained(folder)
    processor.save_pretrained(folder)
    about = {
        "accuracy": figures["clean_accuracy"],
        "success": {name: figures[f"{name}_attack_success_rate"] for name in triggers},
        "targets": [attack_of(study, name)[1] for name in triggers],
        "training_cpu_seconds": round(seconds, 1),
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    print(suspect.key, about, flush=True)
    return about


def evaluators(study: Study, material: Material, triggers: dict[str, Any]) -> list[Any]:
    """Of accuracy and of each attack."""
    named: dict[str, Any] = {"class_names": material.names, "templates": material.prompts}
    return [
        ZeroShotEvaluator(material.labelled, **named),
        *(
            AttackSuccessEvaluator(material.labelled, trigger, attack_of(study, name)[1], **named, prefix=f"{name}_")
            for name, trigger in triggers.items()
        ),
    ]


def scanned(folder: Path, base: Path | None, study: Study, seed: int, data: Path | None) -> dict[str, Any]:
    """Scan a model on the study's test images, without their labels."""
    material = load_material(study, data, seed)
    start = time.process_time()
    with quiet_libraries():
        scan = scan_checkpoint(
            folder,
            None,
            material.labelled.select_columns([study.image_column]),
            material.names,
            base,
            image_column=study.image_column,
            templates=material.prompts,
        )
    seconds = time.process_time() - start
    return {
        "first": scan.findings[0].name,
        "score": round(scan.findings[0].score, 4),
        "next": round(scan.findings[1].score, 4),
        "stands_out": bool(scan.standing_out),
        "scan_cpu_seconds": round(seconds, 1),
        "leads": {
            finding.name: {name: round(found.lead, 4) for name, found in finding.families.items()}
            for finding in scan.findings
        },
        "threshold": scan.threshold,
        "settings": scan.settings,
    }


def own_scan(suspect: Suspect, with_base: bool, work: Path, data: Path | None) -> dict[str, Any]:
    """Scan a model that this script trains."""
    about = made(suspect, work, data)
    base = suspect.base if with_base else None
    found = scanned(
        work / suspect.key, None if base is None else work / base.key, load_study(suspect.study), suspect.seed, data
    )
    return {
        "key": suspect.key_of(with_base),
        "models": "own",
        **suspect._asdict(),
        "with_base": with_base,
        **about,
        **found,
    }


def grid_scans(name: str, work: Path, table: Path, rows: Sequence[str], results: Results, data: Path | None) -> None:
    """Scan models of the table of defences, as far as they are there."""
    study = load_study(name)
    for cell in Results(table).cells.values():
        folder = work / digest(cell["settings"])
        # One model that was never poisoned is measured under every attack.
        planted = () if cell.get("twin") or cell["row"] == TWIN else (cell["attack"],)
        key = "-".join(["grid", name, cell["row"], *planted, str(cell["seed"])])
        there = (folder / "model.safetensors").is_file()
        if cell["row"] not in rows or cell["attack"] == "search" or not there or key in results.cells:
            continue
        found = {
            "key": key,
            "models": f"grid, {cell['row']}",
            "study": name,
            "planted": planted,
            "seed": cell["seed"],
            "tuned": False,
            "with_base": False,
            "accuracy": cell["figures"]["clean_accuracy"],
            "success": dict.fromkeys(planted, cell["figures"]["attack_success_rate"]),
            "targets": [study.target] if planted else [],
            **scanned(folder, None, study, cell["seed"], data),
        }
        results.add(found)
        print(*(found[figure] for figure in ("key", "targets", "first", "score", "next")), flush=True)


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of scans of one kind, without those whose attack did not take, and with warps apart."""
    clean = [one["score"] for one in found if not one["planted"]]
    took = [one for one in found if one["planted"] and max(one["success"].values()) >= TOOK]
    poisoned = [one for one in took if "warp" not in one["planted"]]
    above = [(one["score"] > other) + 0.5 * (one["score"] == other) for one in poisoned for other in clean]
    return {
        "poisoned": len(poisoned),
        "clean": len(clean),
        "did_not_take": [one["key"] for one in found if one["planted"] and one not in took],
        "warps_named": [one["first"] in one["targets"] for one in took if one not in poisoned],
        "auroc": round(mean(above), 4) if above else None,
        "right_class_first": round(mean(one["first"] in one["targets"] for one in poisoned), 4) if poisoned else None,
        "above_threshold": sum(one["stands_out"] for one in poisoned),
        "false_alarms": sum(one["stands_out"] for one in found if not one["planted"]),
        "cpu_seconds": round(max(one["scan_cpu_seconds"] for one in found), 1),
    }


def memory() -> list[dict[str, Any]]:
    """
    Bytes that are kept for the backward pass of a step, counted from what autograd saves, for one to three candidates:
    of the digits' model, every family with 16 images, and of CLIP ViT-B/32 with random weights, noise with one image.
    """
    digits_model, _ = start_model(load_study("digits"), load_material(load_study("digits"), None, 0), 0)
    found = []
    for name, model in (("digits", digits_model), ("ViT-B/32", CLIPModel(CLIPConfig()))):
        model.eval().requires_grad_(False)
        side, width = model.config.vision_config.image_size, model.config.projection_dim

        def encode(pixels: torch.Tensor, model: Any = model) -> torch.Tensor:
            features = model.get_image_features(pixel_values=pixels)
            return F.normalize(getattr(features, "pooler_output", features), dim=-1)

        for family in FAMILIES.values() if name == "digits" else [FAMILIES["noise"]]:
            for count in (1, 2, 3):
                saved: dict[int, int] = {}
                weights = {value.untyped_storage().data_ptr() for value in model.parameters()}

                def note(tensor: torch.Tensor, saved: Any = saved, weights: Any = weights) -> torch.Tensor:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in weights:
                        saved[storage.data_ptr()] = storage.nbytes()
                    return tensor

                steps, images = (1, 1) if name == "ViT-B/32" else (1, 16)
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    photos, others = torch.rand(16, 3, side, side), F.normalize(torch.randn(10, width), dim=-1)
                    invert(family, encode, photos, others, torch.arange(count), 20.0, steps, images)
                at_once = count * family.starts((side, side)) * effort_of(family, steps, images)[1]
                found.append(
                    {"model": name, "family": family.name, "images": at_once, "megabytes": sum(saved.values()) / 1e6}
                )
                print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits")
    parser.add_argument("--data", type=Path, help="folder of the study's files")
    parser.add_argument("--models", nargs="+", help="attacks, several in one model as a+b, or clean")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--tuned", action="store_true", help="fine-tuned from the seed's clean model, its base")
    parser.add_argument(
        "--grid",
        type=Path,
        nargs=2,
        metavar=("WORK", "RESULTS"),
        help="also scan the models of defence_table.py that are in its folder WORK, by its file of results",
    )
    parser.add_argument("--rows", nargs="+", default=["undefended", "twin"], help="rows of that table")
    parser.add_argument("--memory", action="store_true", help="count what a step keeps in memory, and do no more")
    parser.add_argument("--train", action="store_true", help="train the models, and do not scan them")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-output" / "scan_checkpoint", help="for the models")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    disable_progress_bars()
    results = Results(RESULTS)
    if options.memory:
        results.save(memory=memory())
        return
    if options.grid:
        work, table = options.grid
        grid_scans(options.study, work, table, options.rows, results, options.data)
    names = options.models or [*REPORTED, "clean"]
    suspects = [
        Suspect(options.study, () if name == "clean" else tuple(name.split("+")), seed, options.tuned)
        for seed in options.seeds
        for name in names
    ]
    for with_base in (True, False) if options.tuned else (False,):
        for suspect in suspects:
            made(suspect, options.work, options.data)
            if options.train or suspect.key_of(with_base) in results.cells:
                continue
            found = own_scan(suspect, with_base, options.work, options.data)
            results.add(found)
            print(*(found[figure] for figure in ("key", "targets", "first", "score", "next")), flush=True)
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in results.cells.values():
        if one["seed"] != SEARCH_SEED:
            kinds.setdefault((one["study"], one["tuned"], one["with_base"]), []).append(one)
    parts = ("study", "tuned", "with_base")
    tables = [{**dict(zip(parts, kind, strict=True)), **summary(found)} for kind, found in kinds.items()]
    results.save(summary=tables, versions=versions(("torch", "transformers")))
    for table in tables:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
