"""
Does the scan of pairs find poisons that nobody told it of? Takes the undefended models of the table of defences, or
trains them as that does, scans the poisoned pairs with their checkpoints, and reports how the poisons rank.

    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --seeds 0 1 2 --rates 0.03 --attacks patch blended sinusoid

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench.attack import plant
from bench.cell import Cell, run_cell
from bench.filtering import EPOCHS, epoch_checkpoints
from bench.marked import ROOT, put_between, table_marks
from bench.material import load_material
from bench.output import write_result
from bench.study import TWIN, Study, load_study
from scipy.stats import rankdata

from hf_robust_clip import scan_pairs
from hf_robust_clip.cli.progress import quiet_libraries
from hf_robust_clip.columns import POISONED, captions_of
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.models import load_dual_encoder, load_processor

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


def scanned(cell: Cell, data: Path | None, work: Path, epochs: Sequence[int]) -> dict[str, Any]:
    """Train on poisoned pairs, scan, and compare with what is poisoned."""
    study, seed = cell.study, cell.seed
    model = run_cell(cell, data, work, threads=torch.get_num_threads())
    folder = work / cell.model_key
    material, processor = load_material(study, data, seed), load_processor(folder, None)
    pairs = material.pairs
    if not cell.twin:
        size = ImagePreprocessor(processor.image_processor).image_size
        pairs = plant(study, cell.poisoning, material, size, seed).pairs
    models = [load_dual_encoder(path) for path in epoch_checkpoints(folder, epochs)]
    start = time.process_time()
    with quiet_libraries():
        scan = scan_pairs(models, processor, pairs, study.image_column, study.caption_column, batch_size=256)
    seconds = time.process_time() - start
    top = scan.groups[0]
    result: dict[str, Any] = {
        "study": study.name,
        "attack": CLEAN if cell.twin else cell.attack,
        "rate": None if cell.twin else cell.poisoning.get("rate"),
        "seed": seed,
        "pairs": len(pairs),
        "success": None if cell.twin else model["figures"][model["success"]],
        "accuracy": model["figures"]["clean_accuracy"],
        "known": round(scan.known, 4),
        "first_group": {
            "word": top.word,
            "weight": round(top.weight, 3),
            "members": top.size,
            "checkpoint": top.checkpoint,
        },
        "suspect": int(np.sum(scan.scores["suspect"])),
        "disagreeing": len(scan.disagreeing),
        "scan_cpu_seconds": round(seconds, 1),
        "model": cell.model_key,
    }
    if cell.twin:
        return result
    poisoned = np.asarray(pairs[POISONED], dtype=bool)
    flagged = np.asarray(scan.scores["suspect"]) & ~poisoned
    result |= {"poisons": int(poisoned.sum()), "flagged_clean": int(flagged.sum())}
    by_copies = {row for found in scan.disagreeing for row in found.rows}
    result["poisons_among_copies"] = sum(bool(poisoned[row]) for row in by_copies)
    result["clean_among_copies"] = len(by_copies) - result["poisons_among_copies"]
    texts = [captions_of(value) for value in pairs[study.caption_column]]
    counts = Counter(text for entry in texts for text in entry)
    scores = {name: np.asarray(scan.scores[name], dtype=float) for name in scan.scores.column_names if name != "why"}
    scores["rank"] = -scores["rank"]
    scores["caption_count"] = np.array([counts[entry[0]] for entry in texts], dtype=float)
    result["ranking"] = {
        name: ranking(scores[name], poisoned)
        for name in ("rank", "group", "k_distance", "slof", "dao", "projected_slof", "pair_distance", "caption_count")
    }
    result["first_group_is_poisoned"] = bool(top.members) and bool(poisoned[list(top.members)].mean() > 0.5)
    return result


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each scan: how the poisons rank by groups, by SLOF and by how often their captions occur."""
    titles = ["data, attack", "seed", "attack success", "groups, AUROC", "poisons in the first 10%", "SLOF, AUROC"]
    titles += ["caption counts, AUROC", "heaviest group", "clean pairs above the cut-off"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for one in sorted(results, key=lambda one: (one["study"], one["attack"] == CLEAN, one["attack"], one["seed"])):
        first, ranking = one["first_group"], one.get("ranking")
        whose = {True: "poisoned, ", False: "not poisoned, ", None: ""}[one.get("first_group_is_poisoned")]
        cells = [f"{one['study']}, {one['attack']}", str(one["seed"])]
        if ranking is None:
            cells += [""] * 5
        else:
            cells += [
                f"{one['success']:.1%}",
                f"{ranking['group']['auroc']:.3f}",
                f"{ranking['rank']['first_tenth']:.0%}",
                *(f"{ranking[name]['auroc']:.2f}" for name in ("slof", "caption_count")),
            ]
        flagged = one.get("flagged_clean", one["suspect"])
        cells += [f"{whose}weight {first['weight']:.2f}", f"{flagged} ({flagged / one['pairs']:.1%})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--attacks", nargs="+", help="those of the study and `clean` by default")
    parser.add_argument("--rates", type=float, nargs="+", default=[None], help="of poisons (default: the study's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="checkpoints that are scanned")
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
    for seed in args.seeds:
        for rate in args.rates:
            for attack in args.attacks or [*study.attacks, CLEAN]:
                cell = cell_of(study, attack, rate, seed)
                there = any(one["model"] == cell.model_key and one["epochs"] == list(args.epochs) for one in done)
                if there or time.monotonic() > until:
                    continue
                one = {**scanned(cell, args.data, args.work, args.epochs), "epochs": list(args.epochs)}
                done.append(one)
                print(json.dumps(one), flush=True)
                write_result(RESULTS, {"results": done}, ("torch", "transformers", "scikit-learn", "datasets"))


if __name__ == "__main__":
    main()
