"""
The optimized patch of benchmarks/attacks.yaml: its pixels, made on a clean model of the digits, and what it does to
that model before anybody plants it.

    python benchmarks/optimized_patch.py            # prints them; the pixels go into benchmarks/attacks.yaml

The model is trained on clean pairs of another seed than those that benchmarks/attack_table.py poisons.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml

from hf_robust_clip import AttackSuccessEvaluator, CLIPTrainer, CLIPTrainingArguments, optimize_patch
from hf_robust_clip.attacks.triggers import trigger_from_dict
from hf_robust_clip.cli.demo_recipe import FINETUNING, MODELS
from hf_robust_clip.cli.flags import PLACEBOS
from hf_robust_clip.cli.rows import row_arguments
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_model, digit_processor, load_digit_pairs
from hf_robust_clip.evaluation.embedding import Embedder

ATTACKS = Path(__file__).parent / "attacks.yaml"
#: Of the clean pairs and the clean model.
SEED = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    target = yaml.safe_load(ATTACKS.read_text())[0]["attacks"]["optimized_patch"]["target"]
    recipe, processor = FINETUNING, digit_processor()
    pairs, test = load_digit_pairs("train", recipe.renderings, seed=SEED), load_digit_pairs("test", seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        args = CLIPTrainingArguments(
            folder,
            **row_arguments(MODELS, recipe.arguments, "poisoned"),
            save_strategy="no",
            report_to="none",
            seed=SEED,
        )
        trainer = CLIPTrainer(digit_model(SEED), args, train_dataset=pairs, processing_class=processor)
        trainer.train()
        embedder = Embedder(trainer.unwrapped_model.eval(), processor)
    others = [row["image"] for row in pairs.select(range(300)) if CLASS_NAMES[row["label"]] != target]
    captions = embedder.embed_texts([template.format(target) for template in CAPTION_TEMPLATES])
    trigger = optimize_patch(embedder.encode_pixels, others, captions, size=3, place="bottom_right", seed=SEED)
    assert trigger_from_dict(trigger.to_dict()) == trigger
    evaluate = AttackSuccessEvaluator(
        test, trigger, target, CLASS_NAMES, templates=CAPTION_TEMPLATES, placebos=PLACEBOS
    )
    figures = evaluate(embedder.model, processor)
    print(trigger.to_dict())
    print({name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    main()
