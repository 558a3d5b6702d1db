"""The pairs that a scan leaves or trusts, and as a control those that chance leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_robust_clip import PairScan, scan_pairs
from hf_robust_clip.seeding import derive_seed
from hf_robust_clip.trainers.checkpoints import checkpoints_in

#: Share of the pairs that both rows drop.
DROP = 0.1
#: Epochs of the brief training whose checkpoints are scanned.
EPOCHS = (1, 2, 4, 7, 10)


def scanned(
    pairs: Dataset,
    checkpoints: Sequence[str | Path],
    processor: Any,
    image_column: str = "image",
    caption_column: str = "caption",
    seed: int = 0,
) -> PairScan:
    """
    The scan of some pairs.

    Args:
        pairs (`Dataset`): Poisoned ones. A column `poisoned` is not looked at.
        checkpoints (sequence of folders): Of a training on these pairs, in order.
        processor: Of the checkpoints.
        image_column, caption_column (`str`): Of the pairs.
        seed (`int`): Of the scan.
    """
    models = [str(path) for path in checkpoints]
    return scan_pairs(models, processor, pairs, image_column, caption_column, batch_size=256, seed=seed)


def random_drop(pairs: Dataset, drop: float = DROP, seed: int = 0) -> Dataset:
    """The control: as many pairs are dropped, by chance."""
    drawn = np.random.default_rng(derive_seed(seed, len(pairs))).permutation(len(pairs))
    return pairs.select(np.sort(drawn[round(drop * len(pairs)) :]))


def epoch_checkpoints(folder: Path, epochs: Sequence[int] = EPOCHS) -> list[Path]:
    """Those of a training with `save_strategy="epoch"`, after some epochs; the last one where it was shorter."""
    saved = checkpoints_in(folder)
    return [saved[number] for number in sorted({min(epoch, len(saved)) - 1 for epoch in epochs})]
