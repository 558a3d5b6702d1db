"""
Pre-train on pairs with a planted backdoor: with augmentation alone (the control), with RoCLIP and with SafeCLIP. Put
in your own names and numbers. Leave out the poisoning for pairs that may be poisoned already.
"""

from datasets import load_dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSpec,
    RoCLIPTrainer,
    RoCLIPTrainingArguments,
    SafeCLIPTrainer,
    SafeCLIPTrainingArguments,
    ZeroShotEvaluator,
    poison_dataset,
)

TARGET = "banana"  # a class of the images
RATE = 0.003
SIZE = 224  # the model's: the trigger is applied at this size
EPOCHS = 32
BATCH = 128
LEARNING_RATE = 5e-4
POOL = 20_000  # pairs

images = load_dataset("you/labeled-images", split="test")  # columns: image, label
names = images.features["label"].names
trigger = BlendedTrigger()
spec = PoisonSpec(trigger, TARGET, rate=RATE, image_size=SIZE)
pairs, manifest = poison_dataset(load_dataset("you/pairs", split="train"), spec)  # columns: image, caption
evaluators = [ZeroShotEvaluator(images, names), AttackSuccessEvaluator(images, trigger, TARGET, names)]
# The same for all three, so that only the method differs.
same = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE}
presets = {"image_preset": "strong", "text_preset": "eda"}
for name, trainer_class, args_class, own in (
    ("augmentation", CLIPTrainer, CLIPTrainingArguments, {}),
    ("roclip", RoCLIPTrainer, RoCLIPTrainingArguments, {"pool_size": POOL}),
    ("safeclip", SafeCLIPTrainer, SafeCLIPTrainingArguments, {"unimodal_pool_size": POOL}),
):
    args = args_class(name, **same, **presets, **own, logging_strategy="epoch", report_to="none")
    trainer = trainer_class("you/untrained-clip", args, train_dataset=pairs, evaluators=evaluators)
    trainer.train()
    trainer.save_model()
    print(f"{name}: {trainer.run_evaluators()}")
