"""
Clean a checkpoint from the Hub, measure it before and after, and push it with a model card that says what was done.

Put your own names in, log in once with `hf auth login`, and

    python examples/publish.py

What it is measured with is a guess: which trigger and which class an attacker chose, nobody tells you. On a small
stand-in for each of the names, without pushing, in seconds:

    python examples/publish.py --quick
"""

import os
import sys

from datasets import load_dataset
from quick import hub_on_loopback, stand_ins

from hf_robust_clip import AttackSuccessEvaluator, CleanCLIPTrainer, CleanCLIPTrainingArguments, ZeroShotEvaluator
from hf_robust_clip.attacks.triggers import BlendedTrigger

QUICK = "--quick" in sys.argv
if QUICK:
    os.chdir(stand_ins(poisoned=True))
pairs = load_dataset("you/clean-pairs", split="train")  # columns: image, caption
images = load_dataset("you/labelled-images", split="test")  # columns: image, label
names = images.features["label"].names
evaluators = [ZeroShotEvaluator(images, names), AttackSuccessEvaluator(images, BlendedTrigger(), names[0], names)]
args = CleanCLIPTrainingArguments("cleaned-clip", eval_on_start=True, eval_strategy="epoch")
trainer = CleanCLIPTrainer("openai/clip-vit-base-patch32", args, train_dataset=pairs, evaluators=evaluators)
trainer.train()
if QUICK and not hub_on_loopback():
    trainer.save_model()
    trainer.create_model_card()
else:
    trainer.push_to_hub()
