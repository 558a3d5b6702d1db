"""What a scan left out of a dataset, noted in its description, which is saved and loaded with it."""

from __future__ import annotations

import re
from typing import Any

_NOTE = "hf_robust_clip: {} left out {} of {} pairs."
_NOTED = re.compile(_NOTE.replace(".", r"\.").format(r"(\w+)", r"(\d+)", r"(\d+)"))


def note_filtered(dataset: Any, scan: str, dropped: int, pairs: int) -> None:
    """
    Note that a dataset is what a scan left.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The pairs that stayed.
        scan (`str`): The function that found the others.
        dropped, pairs (`int`): How many were left out, and of how many.
    """
    before = dataset.info.description
    dataset.info.description = f"{before or ''}\n\n{_NOTE.format(scan, dropped, pairs)}".strip()


def filtered_of(dataset: Any) -> dict[str, Any] | None:
    """What [`note_filtered`] noted last: `scan`, `dropped` and `pairs`; `None` where it noted nothing."""
    description = getattr(getattr(dataset, "info", None), "description", None) or ""
    found = _NOTED.findall(description)
    if not found:
        return None
    scan, dropped, pairs = found[-1]
    return {"scan": scan, "dropped": int(dropped), "pairs": int(pairs)}
