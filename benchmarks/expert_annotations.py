"""
How well the similarities of a model, and a mixture fitted to them as SafeCLIP does, tell captions that fit an image
from captions that do not, by the judgement of people: Flickr8k's expert annotations (Hodosh, Young and Hockenmaier,
JAIR 47, 2013), pairs of an image and a caption rated 1 (unrelated) to 4 (describes the image) by three experts.

    python benchmarks/expert_annotations.py MODEL --annotations expert_annotations.csv --images validation.parquet

`MODEL` is a folder or a Hub id. The CSV has the columns image_id, caption, expert1, expert2, expert3; the Parquet file
image_id and image.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from sklearn.metrics import roc_auc_score

import hf_robust_clip
from hf_robust_clip.data.loading import load_pairs
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.mixture import SimilarityMixture
from hf_robust_clip.models import load_dual_encoder, load_processor

UNRELATED, FITTING = 1, 4


def similarities(model: str, rows: list[dict[str, str]], images: datasets.Dataset) -> np.ndarray:
    """The cosine similarity of each rated pair, `(N,)`."""
    embedder = Embedder(load_dual_encoder(model).eval(), load_processor(model, None))
    number = {image_id: i for i, image_id in enumerate(images["image_id"])}
    wanted = sorted({number[row["image_id"]] for row in rows})
    place = {i: position for position, i in enumerate(wanted)}
    image_embeds = embedder.embed_images(images.select(wanted))
    text_embeds = embedder.embed_texts([row["caption"] for row in rows])
    of_pairs = image_embeds[[place[number[row["image_id"]]] for row in rows]]
    return (of_pairs * text_embeds).sum(dim=1).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub id of a dual encoder")
    parser.add_argument("--annotations", type=Path, required=True, help="CSV file of rated pairs")
    parser.add_argument("--images", type=Path, required=True, help="Parquet file with their images")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    with options.annotations.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ratings = np.array([statistics.median(int(row[f"expert{i}"]) for i in (1, 2, 3)) for row in rows])
    scores = similarities(options.model, rows, load_pairs(str(options.images)))
    mixture = SimilarityMixture.fit(scores)
    probabilities = mixture.probability(scores)
    judged = (ratings == UNRELATED) | (ratings == FITTING)
    fitting = ratings[judged] == FITTING
    safe = probabilities >= 0.9
    result: dict[str, Any] = {
        "auroc_similarity": float(roc_auc_score(fitting, scores[judged])),
        "auroc_probability": float(roc_auc_score(fitting, probabilities[judged])),
        "pairs": len(rows),
        "median_rating_1": int((ratings == UNRELATED).sum()),
        "median_rating_4": int((ratings == FITTING).sum()),
        "safe_share_at_0.9": float(safe.mean()),
        "unrelated_among_safe": float((ratings[safe] == UNRELATED).mean()) if safe.any() else None,
        "mean_similarity_by_rating": {
            str(int(rating)): float(scores[ratings == rating].mean()) for rating in np.unique(ratings)
        },
        "mixture": {name: getattr(mixture, name).tolist() for name in ("means", "variances", "weights")},
        "version": hf_robust_clip.__version__,
        "command": " ".join(["python", "benchmarks/expert_annotations.py", *sys.argv[1:]]),
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
