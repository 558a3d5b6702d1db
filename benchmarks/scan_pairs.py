"""
Does the scan of pairs find poisons that nobody told it of? Trains a model on poisoned pairs of a study, keeps its
checkpoints, scans them, and reports how the poisons rank.

    OMP_NUM_THREADS=1 python benchmarks/scan_pairs.py --json benchmarks/results/scan_pairs.json --work models \
        --rates 0.01 0.03 --seeds 0 1 2

Models and results that are there are not made again. The attacks are in benchmarks/scan_attacks.yaml; `clean` is the
data without poisons.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench.attack import Planted, plant
from bench.filtering import EPOCHS, epoch_checkpoints
from bench.material import Material, load_material, start_model
from bench.output import write_result
from bench.study import Study, load_study
from datasets import Dataset
from scipy.stats import rankdata
from transformers import set_seed

from hf_robust_clip import CLIPTrainer, CLIPTrainingArguments, scan_pairs
from hf_robust_clip.cli.progress import quiet_libraries
from hf_robust_clip.columns import POISONED, captions_of
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.models import load_dual_encoder

#: Share of the pairs that are looked at, and success below which an attack did not take.
LOOKED_AT, TOOK = 0.1, 0.5
ATTACKS = Path(__file__).parent / "scan_attacks.yaml"
CLEAN, TRAINING = "clean", "training.json"
#: Captions of each photo of a targeted attack at least.
CAPTIONS = 16


def ranking(scores: np.ndarray, poisoned: np.ndarray) -> dict[str, float]:
    """How poisons rank by a score: the area under the curve, and the share of them among the most suspect."""
    poisons, rows = int(poisoned.sum()), len(scores)
    ranks = rankdata(scores)
    area = (ranks[poisoned].sum() - poisons * (poisons + 1) / 2) / (poisons * (rows - poisons))
    order = np.argsort(-scores, kind="stable")
    first = {"first_true_count": poisons, "first_tenth": round(LOOKED_AT * rows)}
    found = {name: float(poisoned[order[:count]].mean() * count / poisons) for name, count in first.items()}
    return {"auroc": round(float(area), 4), **{name: round(value, 4) for name, value in found.items()}}


def planted_in(study: Study, attack: Mapping[str, Any], rate: float, material: Material, size: int, seed: int) -> Any:
    """The attack of the description, at a rate."""
    if "parts" in attack:
        pairs, first = material.pairs, None
        for part in attack["parts"]:
            settings = {name: value for name, value in part.items() if name != "share"}
            poisoning = {**settings, "rate": rate * part["share"]}
            planted = plant(study, poisoning, replace(material, pairs=pairs), size, seed)
            pairs, first = planted.pairs, first or planted
        assert first is not None
        return Planted(pairs, first.evaluators, first.counts, first.success)
    settings = dict(attack)
    if settings.get("mode") == "targeted":
        count = max(CAPTIONS, round(rate * len(material.pairs) / settings["images"]))
        return plant(study, {**settings, "captions": count}, material, size, seed)
    if settings.pop("own_captions", False):
        settings["templates"] = own_captions(material.pairs[study.caption_column], study.target)
    return plant(study, {**settings, "rate": rate}, material, size, seed)


def own_captions(captions: Any, target: str) -> list[str]:
    """Those of the data that name the target once, with a gap in its place."""
    texts = sorted({text for entry in captions for text in captions_of(entry) if "{" not in text and "}" not in text})
    word = re.compile(rf"\b{re.escape(target)}\b")
    return [word.sub("{}", text) for text in texts if len(word.findall(text)) == 1]


def trained(
    study: Study, attack: str, rate: float, seed: int, data: Path | None, work: Path, learning_rate: float
) -> tuple[Dataset, Any, Path]:
    """The pairs with the poisons, the processor, and the folder with a checkpoint of each epoch; trained once."""
    material = load_material(study, data, seed)
    model, processor = start_model(study, material, seed)
    described = yaml.safe_load(ATTACKS.read_text())[study.name]
    poisoning = next(iter(described.values())) if attack == CLEAN else described[attack]
    size = ImagePreprocessor(processor.image_processor).image_size
    planted = planted_in(study, poisoning, rate, material, size, seed)
    pairs = material.pairs if attack == CLEAN else planted.pairs
    rate_name = "" if attack == CLEAN else f"-{rate:g}"
    folder = work / f"{study.name}-{attack}{rate_name}-{seed}-{learning_rate:g}"
    if (folder / TRAINING).is_file():
        return pairs, processor, folder
    settings = {**study.arguments["all"], **study.arguments["pretraining"], "learning_rate": learning_rate}
    set_seed(seed)
    trainer = CLIPTrainer(
        model,
        CLIPTrainingArguments(
            str(folder),
            seed=seed,
            save_strategy="epoch",
            save_only_model=True,
            report_to="none",
            disable_tqdm=True,
            image_column=study.image_column,
            caption_column=study.caption_column,
            **settings,
        ),
        train_dataset=pairs,
        processing_class=processor,
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    metrics = run_evaluators(planted.evaluators, processor, Embedder(trainer.model, processor, batch_size=256))
    success = None if attack == CLEAN else metrics[planted.success]
    about = {"success": success, "accuracy": metrics["clean_accuracy"], "training_cpu_seconds": round(seconds, 1)}
    (folder / TRAINING).write_text(json.dumps(about))
    return pairs, processor, folder


def scanned(
    study: Study,
    attack: str,
    rate: float,
    seed: int,
    data: Path | None,
    work: Path,
    epochs: list[int],
    learning_rate: float,
) -> dict[str, Any]:
    """Train on poisoned pairs, scan, and compare with what is poisoned."""
    pairs, processor, folder = trained(study, attack, rate, seed, data, work, learning_rate)
    models = [load_dual_encoder(str(path)) for path in epoch_checkpoints(folder, epochs)]
    start = time.process_time()
    scan = scan_pairs(models, processor, pairs, study.image_column, study.caption_column, batch_size=256)
    seconds = time.process_time() - start
    top = scan.groups[0]
    result: dict[str, Any] = {
        "study": study.name,
        "attack": attack,
        "rate": rate,
        "seed": seed,
        "pairs": len(pairs),
        **json.loads((folder / TRAINING).read_text()),
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
    }
    if attack == CLEAN:
        return result
    poisoned = np.asarray(pairs[POISONED], dtype=bool)
    flagged = np.asarray(scan.scores["suspect"]) & ~poisoned
    result |= {"poisons": int(poisoned.sum()), "flagged_clean": int(flagged.sum())}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--attacks", nargs="+", help="Those of the study and `clean` by default.")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.01], help="Shares of the pairs that are poisoned."
    )
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="Checkpoints that are scanned.")
    parser.add_argument("--work", type=Path, default=Path("scan_models"), help="Where models are kept.")
    parser.add_argument("--json", type=Path, help="Results; those that are there are not measured again.")
    args = parser.parse_args()
    study = load_study(args.study)
    done: list[dict[str, Any]] = []
    if args.json is not None and args.json.is_file():
        done = json.loads(args.json.read_text())["results"]
    for seed in args.seeds:
        for rate in args.rates:
            for attack in args.attacks or [*yaml.safe_load(ATTACKS.read_text())[study.name], CLEAN]:
                asked = (study.name, attack, rate, seed)
                if any((one["study"], one["attack"], one["rate"], one["seed"]) == asked for one in done):
                    continue
                if attack == CLEAN and rate != args.rates[0]:
                    continue
                with quiet_libraries():
                    one = scanned(study, attack, rate, seed, args.data, args.work, args.epochs, args.learning_rate)
                done.append(one)
                print(json.dumps(one), flush=True)
                content = {"epochs": args.epochs, "learning_rate": args.learning_rate, "results": done}
                write_result(args.json, content, ("torch", "transformers", "scikit-learn", "datasets"))


if __name__ == "__main__":
    main()
