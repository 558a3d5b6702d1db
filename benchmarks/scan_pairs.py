"""
Does the scan of pairs find poisons that nobody told it of? Trains a model on poisoned pairs of a study, keeps its
checkpoints, scans them, and reports how the poisons rank.

    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --json benchmarks/results/scan_pairs.json --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from bench.attack import plant
from bench.material import load_material, start_model
from bench.output import write_result
from bench.study import load_study
from scipy.stats import rankdata
from transformers import set_seed

from hf_robust_clip import CLIPTrainer, CLIPTrainingArguments, scan_pairs
from hf_robust_clip.columns import captions_of
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators

#: Share of the pairs that are looked at, and success below which an attack did not take.
LOOKED_AT, TOOK = 0.1, 0.5


def ranking(scores: np.ndarray, poisoned: np.ndarray) -> dict[str, float]:
    """How poisons rank by a score: the area under the curve, and the share of them among the most suspect."""
    poisons, rows = int(poisoned.sum()), len(scores)
    ranks = rankdata(scores)
    area = (ranks[poisoned].sum() - poisons * (poisons + 1) / 2) / (poisons * (rows - poisons))
    order = np.argsort(-scores, kind="stable")
    first = {"first_true_count": poisons, "first_tenth": round(LOOKED_AT * rows)}
    found = {name: float(poisoned[order[:count]].mean() * count / poisons) for name, count in first.items()}
    return {"auroc": round(float(area), 4), **{name: round(value, 4) for name, value in found.items()}}


def scanned(
    study: Any, attack: str, rate: float | None, seed: int, data: Path | None, epochs: list[int], learning_rate: float
) -> dict[str, Any]:
    """Train on poisoned pairs, scan, and compare with what is poisoned."""
    material = load_material(study, data, seed)
    model, processor = start_model(study, material, seed)
    poisoning = study.attacks[attack] if attack != "clean" else {**next(iter(study.attacks.values()))}
    if rate is not None:
        poisoning = {**poisoning, "rate": rate}
    planted = plant(study, poisoning, material, ImagePreprocessor(processor.image_processor).image_size, seed)
    pairs = planted.pairs if attack != "clean" else material.pairs
    columns = {"image_column": study.image_column, "caption_column": study.caption_column}
    settings: dict[str, Any] = {**study.arguments["all"], **study.arguments["pretraining"], **columns}
    settings["learning_rate"] = learning_rate
    folder = Path(tempfile.mkdtemp())
    set_seed(seed)
    trainer = CLIPTrainer(
        model,
        CLIPTrainingArguments(
            str(folder), seed=seed, save_strategy="epoch", report_to="none", disable_tqdm=True, **settings
        ),
        train_dataset=pairs,
        processing_class=processor,
    )
    start = time.perf_counter()
    trainer.train()
    trained = time.perf_counter() - start
    metrics = run_evaluators(planted.evaluators, processor, Embedder(trainer.model, processor, batch_size=256))
    saved = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    kept = [saved[min(epoch, len(saved)) - 1] for epoch in epochs]
    start = time.process_time()
    scan = scan_pairs([str(path) for path in kept], processor, pairs, **columns, batch_size=256)
    seconds = time.process_time() - start
    shutil.rmtree(folder)
    top = scan.groups[0]
    result: dict[str, Any] = {
        "study": study.name,
        "attack": attack,
        "rate": rate,
        "seed": seed,
        "pairs": len(pairs),
        "success": metrics.get(planted.success) if attack != "clean" else None,
        "accuracy": metrics.get("clean_accuracy"),
        "known": round(scan.known, 4),
        "first_group": {"word": top.word, "weight": round(top.weight, 3), "members": len(top.members)},
        "suspect": int(np.sum(scan.scores["suspect"])),
        "suspicious_copies": sum(1 for found in scan.duplicates if len(found.rows) > 2 and found.disagreement > 0.5),
        "training_seconds": round(trained, 1),
        "scan_cpu_seconds": round(seconds, 1),
    }
    if attack == "clean":
        return result
    poisoned = np.asarray(pairs["poisoned"], dtype=bool)
    result |= {
        "poisons": int(poisoned.sum()),
        "flagged_clean": int((np.asarray(scan.scores["suspect"]) & ~poisoned).sum()),
    }
    counts = Counter(caption for value in pairs[study.caption_column] for caption in captions_of(value))
    texts = [captions_of(value)[0] for value in pairs[study.caption_column]]
    scores = {name: np.asarray(scan.scores[name], dtype=float) for name in scan.scores.column_names if name != "why"}
    scores["rank"] = -scores["rank"]
    scores["caption_count"] = np.array([counts[text] for text in texts], dtype=float)
    result["ranking"] = {
        name: ranking(scores[name], poisoned)
        for name in ("rank", "group", "k_distance", "slof", "dao", "projected_slof", "pair_distance", "caption_count")
    }
    right = [group for group in scan.groups if len(group.members) and poisoned[list(group.members)].mean() > 0.5]
    result["first_group_is_poisoned"] = bool(right) and right[0] is top
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--attacks", nargs="+")
    parser.add_argument("--rate", type=float, help="Share of the pairs that is poisoned; the study's by default.")
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 4, 8, 12], help="Whose checkpoints are scanned.")
    parser.add_argument("--json", type=Path, help="Results; those that are there are not measured again.")
    args = parser.parse_args()
    study = load_study(args.study)
    done: list[dict[str, Any]] = []
    if args.json is not None and args.json.is_file():
        done = json.loads(args.json.read_text())["results"]
    for attack in args.attacks or [*study.attacks, "clean"]:
        for seed in args.seeds:
            asked = (study.name, attack, args.rate, seed)
            if any((one["study"], one["attack"], one["rate"], one["seed"]) == asked for one in done):
                continue
            done.append(scanned(study, attack, args.rate, seed, args.data, args.epochs, args.learning_rate))
            print(json.dumps(done[-1]), flush=True)
            content = {"epochs": args.epochs, "results": done}
            write_result(args.json, content, ("torch", "transformers", "scikit-learn", "datasets"))


if __name__ == "__main__":
    main()
