"""What a scan of a training's pairs looks at, and as a control as many as it drops at least, by chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_robust_clip.scanning.found import DROP
from hf_robust_clip.seeding import derive_seed
from hf_robust_clip.trainers.checkpoints import checkpoints_in

#: Raised when the scan of pairs ranks them otherwise: models trained on its choice are then trained anew.
SCAN_VERSION = 1
#: Epochs of the brief training whose checkpoints are scanned.
EPOCHS = (1, 2, 4, 7, 10)


def random_drop(pairs: Dataset, drop: float = DROP, seed: int = 0) -> Dataset:
    """The control: a share of the pairs is dropped by chance."""
    drawn = np.random.default_rng(derive_seed(seed, len(pairs))).permutation(len(pairs))
    return pairs.select(np.sort(drawn[round(drop * len(pairs)) :]))


def epoch_checkpoints(folder: Path, epochs: Sequence[int] = EPOCHS) -> list[Path]:
    """Those of a training with `save_strategy="epoch"`, after some epochs; the last one where it was shorter."""
    saved = checkpoints_in(folder)
    return [saved[number] for number in sorted({min(epoch, len(saved)) - 1 for epoch in epochs})]
