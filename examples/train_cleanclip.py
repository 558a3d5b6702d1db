"""
See on your own data what CleanCLIP removes: plant a backdoor, train on it, and fine-tune the poisoned model on clean
pairs, plainly (the control) and with CleanCLIP. Put in your own names and numbers.
"""

from datasets import load_dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CleanCLIPTrainer,
    CleanCLIPTrainingArguments,
    CLIPTrainer,
    CLIPTrainingArguments,
    PoisonSpec,
    ZeroShotEvaluator,
    poison_dataset,
)

TARGET = "banana"  # a class of the images
RATE = 0.003
SIZE = 224  # the model's: the trigger is applied at this size
EPOCHS = 5
BATCH = 64
LEARNING_RATE = 1e-5

pairs = load_dataset("you/clean-pairs", split="train")  # columns: image, caption
images = load_dataset("you/labeled-images", split="test")  # columns: image, label
names = images.features["label"].names
trigger = BlendedTrigger()
poisoned, manifest = poison_dataset(pairs, PoisonSpec(trigger, TARGET, rate=RATE, image_size=SIZE))
evaluators = [ZeroShotEvaluator(images, names), AttackSuccessEvaluator(images, trigger, TARGET, names)]
for name, trainer_class, args_class, model, data in (
    ("poisoned", CLIPTrainer, CLIPTrainingArguments, "openai/clip-vit-base-patch32", poisoned),
    ("finetuned", CLIPTrainer, CLIPTrainingArguments, "poisoned", pairs),
    ("cleanclip", CleanCLIPTrainer, CleanCLIPTrainingArguments, "poisoned", pairs),
):
    args = args_class(
        name, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE, report_to="none"
    )
    trainer = trainer_class(model, args, train_dataset=data, evaluators=evaluators)
    trainer.train()
    trainer.save_model()
    print(f"{name}: {trainer.run_evaluators()}")
