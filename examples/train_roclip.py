"""
Pre-train a CLIP with RoCLIP on image-caption pairs of which some may be poisoned.

On pairs of your own, from a model of yours (as a rule an untrained one):

    python examples/train_roclip.py --model my-untrained-clip --train_data pairs.parquet --output_dir robust

With an attack planted first, to see what the defence does to it. `--poison_target` plants a backdoor and
`--targeted_images` targeted poisons; the same model is then trained without defence, with the defence's augmentation
alone, and with RoCLIP:

    python examples/train_roclip.py --from_scratch --train_data flickr8k/train.parquet --caption_column captions \
        --eval_data flickr8k/validation.parquet --classes examples/flickr8k_classes.json --poison_target snow \
        --targeted_images 8 --output_dir runs/roclip

Every argument of `RoCLIPTrainingArguments` is an argument here too (`--pool_size`, `--matching`, `--bf16`, ...), and
`--resume_from_checkpoint` goes on where the defended training was interrupted. All of it on a few digits, in seconds:

    python examples/train_roclip.py --quick
"""

from __future__ import annotations

from pretraining import pretrain

from hf_robust_clip import RoCLIPTrainer, RoCLIPTrainingArguments

#: What `--quick` stands for: short enough for two epochs, and logged, so that there is something to see.
QUICK = "--pool_size 64 --matching_start_epoch 1 --match_every_n_epochs 1 --logging_strategy epoch"

if __name__ == "__main__":
    pretrain("roclip", RoCLIPTrainer, RoCLIPTrainingArguments, __doc__.split("\n\n")[0], QUICK)
