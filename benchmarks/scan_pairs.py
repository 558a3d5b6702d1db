"""
Does the scan of pairs find poisons that nobody told it of? Takes the undefended models of the table of defences, or
trains them as that does, scans the poisoned pairs with their checkpoints, and reports how the poisons rank.

    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --seeds 0 1 2 --rates 0.03 --attacks patch blended sinusoid
    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --seeds 1 --attacks patch --left 39 20 11 6
    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --seeds 0 1 2 --attacks warp --verify

Models and results that are there are not made again. Attacks are those of the study and those in
benchmarks/scan_attacks.yaml; `clean` is the data without poisons.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from bench.attack import Planted, plant
from bench.cell import Cell
from bench.filtering import EPOCHS, epoch_checkpoints
from bench.grid import Results, result_of
from bench.marked import ROOT, markdown, put_between, table_marks
from bench.material import load_material
from bench.output import write_result
from bench.study import TWIN, Study, load_study
from bench.table import TOOK
from defence_table import RESULTS as DEFENCES
from defence_table import found_before
from scipy.stats import rankdata
from transformers import set_seed

from hf_robust_clip import PairScan, scan_pairs
from hf_robust_clip.cli.progress import quiet_libraries, quiet_trainers
from hf_robust_clip.cli.rows import row_trainer
from hf_robust_clip.columns import POISONED, captions_of
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.scanning.found import PairGroup

RESULTS = ROOT / "benchmarks" / "results" / "scan_pairs.json"
PAGE, MARKS = ROOT / "docs" / "scanning.md", table_marks("scans", "scan_pairs.py --docs")
#: Share of the pairs that are looked at.
LOOKED_AT = 0.1
ATTACKS = Path(__file__).parent / "scan_attacks.yaml"
CLEAN = "clean"


def ranking(scores: np.ndarray, poisoned: np.ndarray) -> dict[str, float]:
    """How poisons rank by a score: the area under the curve, and the share of them among the most suspect."""
    poisons, rows = int(poisoned.sum()), len(scores)
    ranks = rankdata(scores)
    area = (ranks[poisoned].sum() - poisons * (poisons + 1) / 2) / (poisons * (rows - poisons))
    order = np.argsort(-scores, kind="stable")
    first = {"first_true_count": poisons, "first_tenth": round(LOOKED_AT * rows)}
    found = {name: float(poisoned[order[:count]].mean() * count / poisons) for name, count in first.items()}
    return {"auroc": round(float(area), 4), **{name: round(value, 4) for name, value in found.items()}}


def cell_of(study: Study, attack: str, rate: float | None, seed: int) -> Cell:
    """The undefended model under an attack, at the study's rate of poisons or another; or the twin without any."""
    if attack == CLEAN:
        name, poisoning = next(iter(study.attacks.items()))
        return Cell(study, TWIN, name, poisoning, seed, twin=True)
    poisoning = {**study.attacks, **yaml.safe_load(ATTACKS.read_text()).get(study.name, {})}[attack]
    return Cell(study, "undefended", attack, poisoning if rate is None else {**poisoning, "rate": rate}, seed)


class Scanned(NamedTuple):
    """The undefended model of a cell, the pairs that it learned, and what is needed to scan them."""

    cell: Cell
    result: dict[str, Any]
    planted: Planted
    processor: Any
    models: list[Any]

    @property
    def columns(self) -> dict[str, str]:
        """Of images and captions."""
        study = self.cell.study
        return {"image_column": study.image_column, "caption_column": study.caption_column}

    def scan(self, pairs: Any) -> PairScan:
        """The scan of its pairs, or of some of them."""
        return scan_pairs(self.models, self.processor, pairs, **self.columns, batch_size=256)


def learned(cell: Cell, table: Results, data: Path | None, work: Path, epochs: Sequence[int]) -> Scanned:
    """Train the cell's model, unless it is there, and load its checkpoints."""
    result = result_of(cell, table, data, work, threads=torch.get_num_threads())
    folder = work / cell.model_key
    material, processor = load_material(cell.study, data, cell.seed), load_processor(folder, None)
    size = ImagePreprocessor(processor.image_processor).image_size
    planted = plant(cell.study, cell.poisoning, material, size, cell.seed)
    if cell.twin:
        planted = replace(planted, pairs=material.pairs)
    models = [load_dual_encoder(path) for path in epoch_checkpoints(folder, epochs)]
    return Scanned(cell, result, planted, processor, models)


def scanned(suspect: Scanned, left: int | None) -> dict[str, Any]:
    """Scan the pairs, or those in which so many poisons are left, and compare with what is poisoned."""
    cell, pairs = suspect.cell, suspect.planted.pairs
    if left is not None:
        poisons = np.flatnonzero(pairs[POISONED])
        pairs = pairs.select(np.setdiff1d(np.arange(len(pairs)), poisons[left:]))
    start = time.process_time()
    with quiet_libraries():
        scan = suspect.scan(pairs)
    seconds = time.process_time() - start
    top = scan.groups[0]
    result = described(suspect) | {
        "pairs": len(pairs),
        "known": round(scan.known, 4),
        "first_group": {
            "word": top.word,
            "weight": round(top.weight, 3),
            "members": top.size,
            "checkpoint": top.checkpoint,
        },
        "suspect": scan.suspects,
        "disagreeing": len(scan.disagreeing),
        "scan_cpu_seconds": round(seconds, 1),
    }
    if cell.twin:
        return result
    poisoned = np.asarray(pairs[POISONED], dtype=bool)
    flagged = np.asarray(scan.scores["suspect"]) & ~poisoned
    result |= {"poisons": int(poisoned.sum()), "flagged_clean": int(flagged.sum())}
    by_copies = {row for found in scan.disagreeing for row in found.rows}
    result["poisons_among_copies"] = sum(bool(poisoned[row]) for row in by_copies)
    result["clean_among_copies"] = len(by_copies) - result["poisons_among_copies"]
    texts = [captions_of(value) for value in pairs[cell.study.caption_column]]
    counts = Counter(text for entry in texts for text in entry)
    scores = {name: np.asarray(scan.scores[name], dtype=float) for name in scan.scores.column_names if name != "why"}
    scores["rank"] = -scores["rank"]
    scores["caption_count"] = np.array([counts[entry[0]] for entry in texts], dtype=float)
    result["ranking"] = {
        name: ranking(scores[name], poisoned)
        for name in ("rank", "group", "k_distance", "slof", "dao", "projected_slof", "pair_distance", "caption_count")
    }
    result["first_group_is_poisoned"] = of_poisons(top, poisoned)
    return result


def verified(suspect: Scanned, folder: Path, learning_rate: float) -> dict[str, Any]:
    """What the last model says of the pairs after CleanCLIP on those that the scan trusts."""
    cell, pairs, study = suspect.cell, suspect.planted.pairs, suspect.cell.study
    poisoned = np.asarray(pairs[POISONED], dtype=bool)
    trusted: list[Any] = []

    def clean(half: Any) -> Any:
        trusted.append(half)
        set_seed(cell.seed)
        trainer = row_trainer(
            "cleanclip",
            folder,
            cell.seed,
            {**suspect.columns, **study.row_arguments("cleanclip"), "learning_rate": learning_rate},
            study.row_augmentation("cleanclip"),
            model=suspect.models[-1],
            train_dataset=half,
            processing_class=suspect.processor,
        )
        trainer.train()
        return trainer.unwrapped_model

    start = time.process_time()
    with quiet_libraries(), quiet_trainers():
        scan = suspect.scan(pairs).verify(pairs, clean, suspect.processor, **suspect.columns, batch_size=256)
        seconds = time.process_time() - start
        cleaned = Embedder(suspect.models[-1], suspect.processor, 256)
        figures = run_evaluators(suspect.planted.evaluators, suspect.processor, cleaned)
    groups = [group for group in scan.groups if group.cleaned_rank is not None]
    distance = np.asarray(scan.scores["cleaned_distance"])
    return described(suspect) | {
        "pairs": len(pairs),
        "poisons": int(poisoned.sum()),
        "poisons_trusted": int(sum(trusted[0][POISONED])),
        "distance": ranking(distance, poisoned),
        "slof": ranking(np.asarray(scan.scores["slof"]), poisoned),
        "poisoned_groups": [round(group.cleaned_rank, 3) for group in groups if of_poisons(group, poisoned)],
        "natural_groups": [round(group.cleaned_rank, 3) for group in groups if not of_poisons(group, poisoned)],
        "cleaned_success": figures[suspect.planted.success],
        "cleaned_accuracy": figures["clean_accuracy"],
        "learning_rate": learning_rate,
        "cpu_seconds": round(seconds, 1),
    }


def described(suspect: Scanned) -> dict[str, Any]:
    """Which model it is, and how far the attack got."""
    cell, twin = suspect.cell, suspect.cell.twin
    return {
        "study": cell.study.name,
        "attack": CLEAN if twin else cell.attack,
        "rate": None if twin else cell.poisoning.get("rate"),
        "seed": cell.seed,
        "success": None if twin else suspect.result["figures"][suspect.result["success"]],
        "accuracy": suspect.result["figures"]["clean_accuracy"],
        "model": cell.model_key,
    }


def of_poisons(group: PairGroup, poisoned: np.ndarray) -> bool:
    """Whether most of a group's members are poisons."""
    return bool(group.members) and bool(poisoned[list(group.members)].mean() > 0.5)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """
    In short what came of each attack, then the scans, those in which most poisons were left out, and second opinions.
    """
    by_name = sorted(results, key=lambda one: (one["study"], one["attack"] == CLEAN, one["attack"], *order(one)))
    verified = [one for one in by_name if one.get("verified")]
    scans = [one for one in by_name if not one.get("verified")]
    few, whole = ([one for one in scans if (one.get("left") is not None) == left] for left in (True, False))
    parts = [markdown(*short_table(whole)), folded("Each scan", markdown(*scan_table(whole)))]
    if few:
        parts.append("With so many of the poisons left in the pairs that are scanned:\n\n" + markdown(*few_table(few)))
    if verified:
        parts.append("After CleanCLIP on the trusted half:\n\n" + markdown(*verified_table(verified)))
    return "\n".join(parts)


def folded(title: str, text: str) -> str:
    """A part of a page that opens at a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def short_table(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each attack and share of poisons: the worst of its seeds, those left out on which it did not take."""
    attacks: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for one in results:
        attacks.setdefault((one["study"], one["attack"], one["rate"] or 0), []).append(one)
    lines = []
    for (study, attack, rate), every in attacks.items():
        found = [one for one in every if attack == CLEAN or (one["success"] or 0) >= TOOK]
        name = (f"{study}, {attack}", f"{rate:.1%}" if rate else "", f"{len(found)} of {len(every)}")
        if not found:
            lines.append((*name, *[""] * 5))
            continue
        flagged = sorted(one.get("flagged_clean", one["suspect"]) / one["pairs"] for one in found)
        last = " to ".join(dict.fromkeys(f"{share:.1%}" for share in (flagged[0], flagged[-1])))
        if attack == CLEAN:
            weights = ", ".join(f"{one['first_group']['word']} {one['first_group']['weight']:.2f}" for one in found)
            lines.append((*name, "", "", "", f"none: {weights}", last))
            continue
        areas = [[one["ranking"][part]["auroc"] for one in found] for part in ("group", "slof")]
        tenth = [one["ranking"]["rank"]["first_tenth"] for one in found]
        right = sum(one["first_group_is_poisoned"] for one in found)
        least = (f"{min(areas[0]):.3f}", f"{min(areas[1]):.2f}", f"{min(tenth):.0%}")
        lines.append((*name, *least, f"{right} of {len(found)}", last))
    heads = ("groups, AUROC", "SLOF, AUROC", "poisons in the first 10%", "heaviest group is the poisoned one")
    return ("data, attack", "poisons", "seeds that took", *heads, "clean pairs above the cut-off"), lines


def order(one: Mapping[str, Any]) -> tuple[float, int, int]:
    """By the share of poisons, the seed, and how many were left in, the most first."""
    return one["rate"] or 0, one["seed"], -(one.get("left") or 0)


def named(one: Mapping[str, Any]) -> tuple[str, ...]:
    """The first columns of each table: the model."""
    rate, success = one["rate"], one["success"]
    return (
        f"{one['study']}, {one['attack']}",
        "" if rate is None else f"{rate:.1%}",
        str(one["seed"]),
        "" if success is None else f"{success:.1%}",
    )


NAMED = ("data, attack", "poisons", "seed", "attack success")


def scan_table(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each scan: how the poisons rank by groups, by SLOF and by how often their captions occur."""
    heads = ("groups, AUROC", "poisons in the first 10%", "SLOF, AUROC", "caption counts, AUROC")
    lines = []
    for one in results:
        first, ranking = one["first_group"], one.get("ranking")
        whose = {True: "poisoned, ", False: "not poisoned, ", None: ""}[one.get("first_group_is_poisoned")]
        flagged = one.get("flagged_clean", one["suspect"])
        figures, copies = [""] * 4, ""
        if ranking is not None:
            figures = [f"{ranking['group']['auroc']:.3f}", f"{ranking['rank']['first_tenth']:.0%}"]
            figures += [f"{ranking[name]['auroc']:.2f}" for name in ("slof", "caption_count")]
            copies = f"{one['poisons_among_copies']} of {one['poisons']}"
        last = (f"{whose}{first['word']}, {first['weight']:.2f}", copies, f"{flagged} ({flagged / one['pairs']:.1%})")
        lines.append((*named(one), *figures, *last))
    heads += ("heaviest group: word, weight", "poisons among copies", "clean pairs above the cut-off")
    return (*NAMED, *heads), lines


def few_table(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each model and number of poisons: whether groups find them."""
    return (*NAMED, "left in", "groups, AUROC", "poisons in the first 10%", "heaviest group"), [
        (
            *named(one),
            f"{one['poisons']} ({one['poisons'] / one['pairs']:.2%})",
            f"{one['ranking']['group']['auroc']:.3f}",
            f"{one['ranking']['rank']['first_tenth']:.0%}",
            "poisoned" if one["first_group_is_poisoned"] else "not poisoned",
        )
        for one in results
    ]


def verified_table(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each second opinion: how the poisons rank by it, what it says of groups, and the cleaned model."""
    heads = (
        "poisons in the trusted half",
        "distance, AUROC",
        "poisons in the first 10%",
        "mean rank of poisoned groups",
    )
    return (*NAMED, *heads, "of natural groups", "after cleaning: success, accuracy"), [
        (
            *named(one),
            f"{one['poisons_trusted']} of {one['poisons']}",
            f"{one['distance']['auroc']:.3f}",
            f"{one['distance']['first_tenth']:.0%}",
            *(between(one[name]) for name in ("poisoned_groups", "natural_groups")),
            f"{one['cleaned_success']:.1%}, {one['cleaned_accuracy']:.1%}",
        )
        for one in results
    ]


def between(values: Sequence[float]) -> str:
    """The least and the most of some values."""
    return f"{min(values):.2f} to {max(values):.2f} ({len(values)})" if values else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--attacks", nargs="+", help="those of the study and `clean` by default")
    parser.add_argument("--rates", type=float, nargs="+", default=[None], help="of poisons (default: the study's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="checkpoints that are scanned")
    parser.add_argument(
        "--left", type=int, nargs="+", default=[None], help="poisons that are left in the pairs (default: all)"
    )
    parser.add_argument("--verify", action="store_true", help="clean on the trusted half, and ask that model")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-output", help="folder for the models")
    parser.add_argument("--docs", action="store_true", help="run nothing: the table of what there is into docs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no scan after so many")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    until = time.monotonic() + 60 * args.minutes
    study = load_study(args.study)
    done = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    if args.docs:
        put_between(PAGE, MARKS, table(done))
        return
    results = Results(DEFENCES / f"{study.name}.json")
    lefts = [None] if args.verify else args.left
    # What is counted of poisons that are left, or of a second opinion, clean data does not have.
    attacks = args.attacks or [*study.attacks, *([] if args.verify or lefts != [None] else [CLEAN])]
    cells = [cell_of(study, attack, rate, seed) for seed in args.seeds for rate in args.rates for attack in attacks]
    for cell in cells:
        suspect = None
        for left in lefts:
            kind: dict[str, Any] = {
                "model": cell.model_key,
                "epochs": list(args.epochs),
                "left": left,
                "verified": args.verify or None,
            }
            there = any(all(one.get(name) == value for name, value in kind.items()) for one in done)
            if there or time.monotonic() > until:
                continue
            suspect = suspect or learned(cell, results, args.data, args.work, args.epochs)
            if args.verify:
                rate = found_before(study, results)["cleanclip"]
                done.append(verified(suspect, args.work / "verified", rate) | kind)
            else:
                done.append(scanned(suspect, left) | kind)
            print(json.dumps(done[-1]), flush=True)
            write_result(RESULTS, {"results": done}, ("torch", "transformers", "scikit-learn", "datasets"))


if __name__ == "__main__":
    main()
