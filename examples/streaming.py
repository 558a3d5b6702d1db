"""
Pre-train with RoCLIP on a dataset that is read as a stream, and is never on disk as a whole. A backdoor is planted as
the stream is read. Leave that out for pairs that may be poisoned already. Put in your own names and numbers.
"""

from datasets import load_dataset

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    PoisonSpec,
    RoCLIPTrainer,
    RoCLIPTrainingArguments,
    poison_stream,
)

TARGET = "banana"  # a class of the images
RATE = 0.003
SIZE = 224  # the model's: the trigger is applied at this size
# A stream has no length, so training and a matching epoch take a number of steps, and a pool a number of pairs.
STEPS = 100_000
MATCHING_STEPS = 4_000
POOL = 20_000
BATCH = 128

images = load_dataset("you/labeled-images", split="test")  # columns: image, label
trigger = BlendedTrigger()
stream = load_dataset("you/pairs", split="train", streaming=True)  # columns: image, caption
# Streams of several files also need `key_column`, a column of numbers or strings that tells rows apart.
stream, manifest = poison_stream(stream, PoisonSpec(trigger, TARGET, rate=RATE, image_size=SIZE))
# Poisoned first, then shuffled: in a shuffled stream a row has another number in every epoch.
stream = stream.shuffle(seed=0, buffer_size=10_000)
args = RoCLIPTrainingArguments(
    "streamed",
    max_steps=STEPS,
    pool_size=POOL,
    steps_per_matching_epoch=MATCHING_STEPS,
    per_device_train_batch_size=BATCH,
    logging_steps=MATCHING_STEPS,
    report_to="none",
)
attack = AttackSuccessEvaluator(images, trigger, TARGET, images.features["label"].names)
trainer = RoCLIPTrainer("you/untrained-clip", args, train_dataset=stream, evaluators=attack)
trainer.train()
trainer.save_model()
print(f"roclip: {trainer.run_evaluators()}")
