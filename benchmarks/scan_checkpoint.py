"""
Does the scan of checkpoints name the class that a backdoor aims at, and does it leave clean models alone?

    OMP_NUM_THREADS=1 python benchmarks/scan_checkpoint.py --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/scan_checkpoint.py --seeds 3 4 5 6 7 --attacks clean
    OMP_NUM_THREADS=1 python benchmarks/scan_checkpoint.py --seeds 0 1 2 --tuned --attacks blended patch sinusoid clean
    OMP_NUM_THREADS=1 python benchmarks/scan_checkpoint.py --seeds 0 --tuned --attacks several_targets

Models have one backdoor or none: the undefended ones of the table of defences and their twins, or with `--tuned` twins
that were fine-tuned on pairs with poisons, at the rate of plain fine-tuning. Those are scanned with their base, too.
Each result is saved as it comes in `benchmarks/results/scan_checkpoint.json`, and is not computed again; `--docs` puts
the table into docs/scanning-checkpoints.md. Settings and the threshold were chosen on models of the seed 11.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from bench.cell import Cell, with_learning_rate
from bench.grid import Results, result_of
from bench.marked import ROOT, markdown, put_between, table_marks
from bench.material import Material, load_material, start_model
from bench.study import Study, load_study
from bench.table import TOOK
from datasets import disable_progress_bars
from defence_table import RESULTS as DEFENCES
from defence_table import found_before
from scan_pairs import CLEAN, cell_of, folded
from transformers import CLIPConfig, CLIPModel

from hf_robust_clip import AttackSuccessEvaluator, scan_checkpoint
from hf_robust_clip.attacks.triggers import trigger_from_dict
from hf_robust_clip.cli.progress import quiet_libraries
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.scanning.inversion import FAMILIES, effort_of, invert
from hf_robust_clip.versions import versions

RESULTS = ROOT / "benchmarks" / "results" / "scan_checkpoint.json"
PAGE, MARKS = ROOT / "docs" / "scanning-checkpoints.md", table_marks("scans", "scan_checkpoint.py --docs")
#: The attacks that are reported by default. Warps are known to escape.
REPORTED = ("blended", "patch", "sinusoid", "stripes", "triangles")
#: More poisons than there are: all are left among the pairs.
ALL = 10**9


def suspect_of(study: Study, attack: str, seed: int, chosen: Mapping[str, float] | None) -> Cell:
    """The undefended model under an attack, or the twin; with chosen learning rates, a twin that was fine-tuned."""
    cell = cell_of(study, attack, None, seed)
    if chosen is None:
        return cell
    twin = cell_of(study, CLEAN, None, seed)
    left = 0 if cell.twin else ALL
    tuned = Cell(study, "plain", attack, cell.poisoning, seed, start=twin, twin=cell.twin, left_poisons=left)
    return with_learning_rate(tuned, chosen["plain"])


def success_of(cell: Cell, result: Mapping[str, Any], material: Material, work: Path) -> dict[str, float]:
    """The attack success of each of its triggers, by the class that it aims at."""
    if cell.twin:
        return {}
    study, folder = cell.study, work / cell.model_key
    if "parts" not in cell.poisoning:
        return {cell.poisoning.get("target", study.target): round(result["figures"]["attack_success_rate"], 4)}
    triggers = {
        part.get("target", study.target): trigger_from_dict(part["trigger"]).reseeded(cell.seed)
        for part in cell.poisoning["parts"]
    }
    given = {"image_column": study.image_column, "label_column": study.label_column, "templates": material.prompts}
    evaluators = [
        AttackSuccessEvaluator(material.labelled, trigger, target, material.names, **given, prefix=f"{target}_")
        for target, trigger in triggers.items()
    ]
    processor = load_processor(folder, None)
    figures = run_evaluators(evaluators, processor, Embedder(load_dual_encoder(folder), processor, 256))
    return {target: round(figures[f"{target}_attack_success_rate"], 4) for target in triggers}


def scanned(cell: Cell, with_base: bool, result: Mapping[str, Any], material: Material, work: Path) -> dict[str, Any]:
    """Scan a model on the study's test images, without their labels."""
    study = cell.study
    start = time.process_time()
    with quiet_libraries():
        scan = scan_checkpoint(
            work / cell.model_key,
            None,
            material.labelled.select_columns([study.image_column]),
            material.names,
            work / cell.starts[0].model_key if with_base else None,
            image_column=study.image_column,
            templates=material.prompts,
        )
        seconds = time.process_time() - start
        success = success_of(cell, result, material, work)
    return {
        "key": key_of(cell, with_base),
        "study": study.name,
        "attack": CLEAN if cell.twin else cell.attack,
        "seed": cell.seed,
        "tuned": cell.start is not None,
        "with_base": with_base,
        "accuracy": result["figures"]["clean_accuracy"],
        "success": success,
        "first": scan.findings[0].name,
        "score": round(scan.findings[0].score, 4),
        "next": round(scan.findings[1].score, 4),
        "order": [finding.name for finding in scan.findings],
        "stands_out": [finding.name for finding in scan.standing_out],
        "certainty": round(scan.certainty, 4),
        "scan_cpu_seconds": round(seconds, 1),
        "leads": {
            finding.name: {name: round(found.lead, 4) for name, found in finding.families.items()}
            for finding in scan.findings
        },
        "threshold": scan.threshold,
        "settings": scan.settings,
    }


def key_of(cell: Cell, with_base: bool) -> str:
    """Of the result of a scan."""
    return f"{cell.model_key}{'-base' if with_base else ''}"


def took(one: Mapping[str, Any]) -> bool:
    """Whether a model has the backdoors that were planted in it."""
    return bool(one["success"]) and min(one["success"].values()) >= TOOK


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of scans of one kind with one target each, without warps and those whose attack did not take."""
    clean = [one["score"] for one in found if one["attack"] == CLEAN]
    poisoned = [one for one in found if took(one) and len(one["success"]) == 1 and one["attack"] != "warp"]
    above = [(one["score"] > other) + 0.5 * (one["score"] == other) for one in poisoned for other in clean]
    return {
        "poisoned": len(poisoned),
        "clean": len(clean),
        "auroc": round(mean(above), 4) if above else None,
        "right_class_first": sum(one["first"] in one["success"] for one in poisoned),
        "above_threshold": sum(any(name in one["success"] for name in one["stands_out"]) for one in poisoned),
        "false_alarms": sum(bool(one["stands_out"]) for one in found if one["attack"] == CLEAN),
        "cpu_seconds": max(one["scan_cpu_seconds"] for one in found),
    }


def kinds(results: Results) -> dict[tuple[str, bool, bool], list[dict[str, Any]]]:
    """The scans by study, by whether a clean model was fine-tuned, and by whether that is the base."""
    found: dict[tuple[str, bool, bool], list[dict[str, Any]]] = {}
    for one in results.cells.values():
        found.setdefault((one["study"], one["tuned"], one["with_base"]), []).append(one)
    return dict(sorted(found.items()))


def tables(results: Results) -> str:
    """What comes of each kind of scan, and a line for each model."""
    lines, totals = [], []
    for (study, tuned, with_base), found in kinds(results).items():
        kind = f"{study}{', fine-tuned from a clean one' if tuned else ''}{', with that as base' if with_base else ''}"
        one = summary(found)
        area = "" if one["auroc"] is None else f"{one['auroc']:.2f}"
        totals.append(
            (
                kind,
                f"{one['right_class_first']} of {one['poisoned']}",
                f"{one['above_threshold']} of {one['poisoned']}",
                f"{one['false_alarms']} of {one['clean']}",
                area,
                f"{one['cpu_seconds']:.0f}",
            )
        )
        for scan in sorted(found, key=lambda one: (one["attack"] == CLEAN, one["attack"], one["seed"])):
            of = ", ".join(f"{value:.1%}" for value in scan["success"].values())
            place = ", ".join(str(1 + scan["order"].index(target)) for target in scan["success"])
            said = (scan["first"], f"{scan['score']:.2f}", f"{scan['next']:.2f}", str(len(scan["stands_out"])))
            lines.append((kind, scan["attack"], str(scan["seed"]), of, place, *said))
    heads = ("models", "target first", "target above the threshold", "false alarms of clean models", "AUROC")
    each = ("models", "planted", "seed", "attack success", "place of the target", "first", "its score", "next score")
    details = folded("Each model", markdown((*each, "above the threshold"), lines))
    return markdown((*heads, "CPU seconds, most"), totals) + "\n" + details


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
    parser.add_argument("--attacks", nargs="+", help="of the study or benchmarks/scan_attacks.yaml, or clean")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuned", action="store_true", help="fine-tuned from the seed's clean model, its base")
    parser.add_argument("--memory", action="store_true", help="count what a step keeps in memory, and do no more")
    parser.add_argument("--docs", action="store_true", help="run nothing: the table of what there is into docs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no scan after so many")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-output", help="folder for the models")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    disable_progress_bars()
    results, until = Results(RESULTS), time.monotonic() + 60 * options.minutes
    if options.docs:
        put_between(PAGE, MARKS, tables(results))
        return
    if options.memory:
        results.save(memory=memory())
        return
    study = load_study(options.study)
    table = Results(DEFENCES / f"{study.name}.json")
    chosen = found_before(study, table) if options.tuned else None
    cells = [
        suspect_of(study, attack, seed, chosen)
        for seed in options.seeds
        for attack in options.attacks or [*REPORTED, CLEAN]
    ]
    for cell in cells:
        result: dict[str, Any] = {}
        for with_base in (True, False) if options.tuned else (False,):
            if key_of(cell, with_base) in results.cells or time.monotonic() > until:
                continue
            result = result or result_of(cell, table, options.data, options.work, torch.get_num_threads())
            material = load_material(study, options.data, cell.seed)
            found = scanned(cell, with_base, result, material, options.work)
            results.add(found)
            print(*(found[name] for name in ("attack", "seed", "success", "first", "score", "next")), flush=True)
    results.save(versions=versions(("torch", "transformers")))
    print(json.dumps([{"kind": kind, **summary(found)} for kind, found in kinds(results).items()], indent=1))


if __name__ == "__main__":
    main()
