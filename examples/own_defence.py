"""
A defence of your own: the trimmed loss (Shen and Sanghavi, "Learning with bad training data via iterative trimmed loss
minimization", ICML 2019, arXiv 1810.11874), here for pairs and with two views.

The pairs that have fitted worst so far are left out of each batch. How well a pair fits is the average of its losses.
Later visits count more. This average is the defence's memory: a buffer, which checkpoints save and restore.

It shows what a defence consists of. Do not rely on it: a backdoor that is learned faster than the clean pairs soon
fits better than they do. The end of the file trains it on a planted backdoor, next to augmentation alone, its control.
Put in your own names and numbers.
"""

import math

import torch
from datasets import load_dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CLIPTrainer,
    CLIPTrainingArguments,
    Defence,
    PoisonSpec,
    ZeroShotEvaluator,
    poison_dataset,
)
from hf_robust_clip.losses import info_nce

TARGET = "banana"  # a class of the images
RATE = 0.003
SIZE = 224  # the model's: the trigger is applied at this size
EPOCHS = 32
BATCH = 128
LEARNING_RATE = 5e-4


class Trimmed(Defence):
    """CLIP across two views, on the pairs of a batch that have fitted best so far; for map-style datasets."""

    views = ("original", "augmented")

    def __init__(self, rows: int, trim: float = 0.1, start_epoch: int = 2) -> None:
        super().__init__()
        self.trim, self.start_epoch = trim, start_epoch
        self.register_buffer("fit", torch.full((rows,), math.nan))  # each pair's average loss; NaN: not seen yet

    def forward(self, views, scale, batch):
        (images, texts), (images_2, texts_2) = views["original"], views["augmented"]
        losses = 0.5 * (
            info_nce(images, texts_2, scale, self.gather, reduction="none")
            + info_nce(texts, images_2, scale, self.gather, reduction="none")
        )
        seen, found = batch.everywhere(batch.rows, losses.detach())  # of all processes
        self.fit[seen] = torch.where(self.fit[seen].isnan(), found, 0.5 * (self.fit[seen] + found))
        kept = len(losses) - int(self.trim * len(losses)) * (self.epoch >= self.start_epoch)
        return {"trimmed_loss": losses[self.fit[batch.rows].argsort(stable=True)[:kept]].mean()}


if __name__ == "__main__":
    images = load_dataset("you/labeled-images", split="test")  # columns: image, label
    names, trigger = images.features["label"].names, BlendedTrigger()
    spec = PoisonSpec(trigger, TARGET, rate=RATE, image_size=SIZE)
    pairs, _ = poison_dataset(load_dataset("you/pairs", split="train"), spec)  # columns: image, caption
    evaluators = [ZeroShotEvaluator(images, names), AttackSuccessEvaluator(images, trigger, TARGET, names)]
    settings = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE}
    for name, defence in (("augmentation", None), ("trimmed", Trimmed(len(pairs)))):
        args = CLIPTrainingArguments(name, **settings, image_preset="weak", text_preset="light", report_to="none")
        trainer = CLIPTrainer("you/untrained-clip", args, train_dataset=pairs, evaluators=evaluators, defence=defence)
        trainer.train()
        trainer.save_model()
        print(f"{name}: {trainer.run_evaluators()}")
