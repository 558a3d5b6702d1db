"""
Clean a checkpoint, measure it before and after, and push it with a model card that says what was done.

Put in your own names, log in once with `hf auth login`, and run the file. The trigger and the target are guesses:
nobody tells you what an attacker chose.
"""

from datasets import load_dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CleanCLIPTrainer,
    CleanCLIPTrainingArguments,
    ZeroShotEvaluator,
)

TARGET = "banana"  # a class of the images

pairs = load_dataset("you/clean-pairs", split="train")  # columns: image, caption
images = load_dataset("you/labeled-images", split="test")  # columns: image, label
names = images.features["label"].names
evaluators = [ZeroShotEvaluator(images, names), AttackSuccessEvaluator(images, BlendedTrigger(), TARGET, names)]
args = CleanCLIPTrainingArguments("cleaned-clip", eval_on_start=True, eval_strategy="epoch")
trainer = CleanCLIPTrainer("openai/clip-vit-base-patch32", args, train_dataset=pairs, evaluators=evaluators)
trainer.train()
trainer.push_to_hub()
