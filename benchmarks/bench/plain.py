"""What one writes without a package for it: rows, a collator, a bare loop, the stock `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

CAPTIONS = ["a dog runs over the wet snow", "two children play on a beach", "a man climbs a steep rock face"]


def make_rows(count: int, size: int) -> datasets.Dataset:
    """Images of random texture, stored as JPEG, with short captions."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        buffer = BytesIO()
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, format="JPEG")
        images.append(buffer.getvalue())
    return dataset_of(images)


def dataset_of(files: list[bytes]) -> datasets.Dataset:
    """Pairs of these files and a caption each."""
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(len(files))]
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": file, "path": None} for file in files], "caption": captions},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )


def stock_collator(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What one writes for the stock Trainer: the processor on images and captions, and `return_loss`."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = processor(
            images=[row["image"] for row in rows],
            text=[row["caption"] for row in rows],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return {**batch, "return_loss": True}

    return collate


def bare_loop(model: Any, processor: Any, rows: Any, batch: int, workers: int = 0) -> Callable[[], None]:
    """The least that trains: loader, forward, backward, clipping, AdamW."""
    collate = stock_collator(processor)
    loader = DataLoader(rows, batch, shuffle=True, drop_last=True, collate_fn=collate, num_workers=workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        model.train()
        for inputs in loader:
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def quiet_arguments(output: str, batch: int, workers: int = 0) -> dict[str, Any]:
    """Training arguments of one epoch that saves and tells nothing."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10_000,
        "dataloader_num_workers": workers,
    }


def stock_trainer(model: Any, processor: Any, rows: Any, arguments: dict[str, Any]) -> Any:
    """The stock `Trainer` on rows, with these training arguments."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**arguments, dataloader_drop_last=True, remove_unused_columns=False)
    return Trainer(model, args, data_collator=stock_collator(processor), train_dataset=rows)
