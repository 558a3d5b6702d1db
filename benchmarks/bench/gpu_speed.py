"""How fast steps are on a device: of each trainer against a bare loop, in large batches, compiled."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPModel, PrinterCallback, TrainerCallback

from hf_robust_clip import CLIPDataCollator, CLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer
from hf_robust_clip.augment.images import ImageAugmentation, to_float
from hf_robust_clip.columns import ROW_INDEX
from hf_robust_clip.data.scratch import build_processor
from hf_robust_clip.losses import clip_loss
from hf_robust_clip.trainers.defended import TRAINERS

from .flops import pair_flops
from .machine import bf16_rate, run_seconds, synchronize
from .phases import CAPTIONS, FillPools, full_pools

#: Patches of the vision tower: 32 is ViT-B/32, 16 is ViT-B/16.
PATCHES = (32, 16)
#: Batches, and the rows of a chunk of those that are too large to be held.
BATCHES = {"cuda": ((256, None), (1024, None), (8192, 512)), "cpu": ((4, None), (8, 4))}
#: What makes each step of a trainer the same kind of step.
_GIVEN: dict[type[CLIPTrainer], dict[str, Any]] = {
    RoCLIPTrainer: {"matching_start_epoch": 0, "match_every_n_epochs": 1},
    SafeCLIPTrainer: {"warmup_unimodal_epochs": 1000},
}
_WARM_UP = 2


class Ready(Dataset[dict[str, Any]]):
    """The same pair again and again: nothing is measured of data that is read."""

    def __init__(self, rows: int, side: int) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
        self.rows, self.pair = rows, {"image": Image.fromarray(noise), "caption": CAPTIONS[0]}

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.pair


class ReadyBatches(CLIPDataCollator):
    """Hands out a batch that was made before, so that a step is all that is measured."""

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        made = self.__dict__.setdefault("made", {})
        key = len(rows), self.views
        if key not in made:
            made[key] = random_batch(self, *key)
        return {**made[key], ROW_INDEX: torch.arange(len(rows))}


def random_batch(collator: CLIPDataCollator, rows: int, views: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Bytes `(B, 3, H, W)` and tokens `(V*B, 77)` of nothing in particular."""
    generator = torch.Generator().manual_seed(0)
    side, length = collator.preprocess.image_size, collator.tokenizer.model_max_length
    ids = torch.randint(2, len(collator.tokenizer), (rows * len(views), length), generator=generator)
    ids[:, -1] = collator.tokenizer.eos_token_id
    pixels = torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Clock(TrainerCallback):
    """Seconds a step, from the end of the warm-up to the last step, waiting for the device at both."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start, self.seconds = device, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (_WARM_UP, state.max_steps):
            synchronize(self.device)
            now = time.perf_counter()
            self.start, self.seconds = now, (now - self.start) / max(state.max_steps - _WARM_UP, 1)


class Bench:
    """A model of one size, and what trains it."""

    def __init__(self, device: torch.device, patch: int, folder: str) -> None:
        self.device, self.folder, self.small = device, folder, device.type == "cpu"
        side, length = (32, 16) if self.small else (224, 77)
        self.processor = build_processor(CAPTIONS, image_size=side, max_length=length)
        self.collator = ReadyBatches(self.processor)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        text: dict[str, Any] = {**(sizes if self.small else {}), "max_position_embeddings": length}
        tokenizer = self.processor.tokenizer
        text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        text |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": max(len(tokenizer), 0 if self.small else 49408)}
        vision = {**(sizes if self.small else {}), "image_size": side, "patch_size": patch}
        self.config = CLIPConfig(text_config=text, vision_config=vision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = CLIPModel(self.config)
        self.flops = pair_flops(self.config, length).training
        self.steps = 2 if self.small else 8

    def trainer_seconds(self, cls: type[CLIPTrainer], batch: int, **given: Any) -> float:
        """Seconds a step of a trainer."""
        steps = _WARM_UP + self.steps
        pools = {RoCLIPTrainer: "pool_size", SafeCLIPTrainer: "unimodal_pool_size"}
        size = max(batch, 64 if self.small else 21_845)
        arguments = cls.args_class(
            self.folder,
            **{
                **{"per_device_train_batch_size": batch, "max_steps": steps, "save_strategy": "no"},
                **{"report_to": "none", "disable_tqdm": True, "logging_steps": 1000, "bf16": True},
                **{"learning_rate": 1e-5, "use_cpu": self.small, **_GIVEN.get(cls, {}), **given},
                **({pools[cls]: size} if cls in pools else {}),
            },
        )
        rows = Ready(batch * (steps + 2), self.config.vision_config.image_size)
        trainer = cls(
            copy.deepcopy(self.model),
            arguments,
            train_dataset=rows,
            processing_class=self.processor,
            text_augmentation="identity",
        )
        trainer.data_collator = self.collator.with_views(trainer.data_collator.views)
        clock = Clock(self.device)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        if cls in pools:
            trainer.add_callback(FillPools(trainer, full_pools(size, self.config.projection_dim)))
        trainer.train()
        return clock.seconds

    def bare_seconds(self, batch: int) -> float:
        """Seconds a step of the least that trains: transfer, normalisation, forward, backward, clipping, AdamW."""
        model = copy.deepcopy(self.model).to(self.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        mean, std = (torch.tensor(value, device=self.device).view(1, 3, 1, 1) for value in _statistics(self.collator))
        loader: DataLoader[Any] = DataLoader(
            Ready(batch * (_WARM_UP + self.steps), 8),
            batch_size=batch,
            collate_fn=self.collator.with_views(("original",)),
            pin_memory=not self.small,
        )
        start = 0.0
        for number, moved in enumerate(loader):
            if number == _WARM_UP:
                synchronize(self.device)
                start = time.perf_counter()
            inputs = {name: value.to(self.device, non_blocking=True) for name, value in moved.items()}
            inputs.pop(ROW_INDEX)
            inputs["pixel_values"] = (to_float(inputs["pixel_values"]) - mean) / std
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = model(**inputs)
            loss = clip_loss(
                outputs.image_embeds.float(), outputs.text_embeds.float(), model.logit_scale.float().exp()
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.steps

    def augmentation_seconds(self, batch: int) -> float:
        """Seconds of CleanCLIP's augmentation of a batch of images on the device."""
        side = self.config.vision_config.image_size
        images = torch.rand(batch, 3, side, side, device=self.device)
        augmentation = ImageAugmentation("cleanclip").to(self.device)
        return min(run_seconds(lambda: augmentation(images), self.device) for _ in range(4))


def _statistics(collator: CLIPDataCollator) -> tuple[Any, Any]:
    return collator.preprocess.mean, collator.preprocess.std


def speed(note: Callable[[str, Any], None], device: torch.device, left: Callable[[], float], images: Any) -> None:
    """Images a second, the share of the peak, and each trainer over the bare loop; the smaller model first."""
    peak = bf16_rate(device)
    note("bf16_flops_a_second", peak)
    with tempfile.TemporaryDirectory() as folder:
        for patch in PATCHES:
            bench = Bench(device, patch if device.type == "cuda" else patch // 4, folder)
            model = f"ViT-B/{patch}"
            first = BATCHES[device.type][0][0]
            note(f"{model}, trainers over the bare loop", lambda b=bench, n=first: ratios(b, n, left))
            note(
                f"{model}, augmentation of a batch of {first}, seconds",
                lambda b=bench, n=first: b.augmentation_seconds(n),
            )
            for batch, chunk in BATCHES[device.type]:
                if left() < 0:
                    return
                name = f"{model}, batch {batch}" + (f" in chunks of {chunk}" if chunk else "")
                note(name, lambda b=bench, n=batch, c=chunk: throughput(b, n, c, peak))


def ratios(bench: Bench, batch: int, left: Callable[[], float]) -> dict[str, Any]:
    """The bare loop's seconds a step, and each trainer's in shares of it: medians of rounds that alternate."""
    seconds: dict[str, list[float]] = {"bare_loop": []}
    for number in range(1 if bench.small else 5):
        if number and left() < 0:
            break
        seconds["bare_loop"].append(bench.bare_seconds(batch))
        for name, cls in TRAINERS.items():
            seconds.setdefault(name, []).append(bench.trainer_seconds(cls, batch))
    bare = seconds.pop("bare_loop")
    shares = {
        name: statistics.median(one / two for one, two in zip(times, bare, strict=False))
        for name, times in seconds.items()
    }
    return {"bare_loop_seconds": statistics.median(bare), "rounds": len(bare), **shares}


def throughput(bench: Bench, batch: int, chunk: int | None, peak: float) -> dict[str, float]:
    """Of CLIP's trainer; FLOP are those of the model, without what is computed twice in chunks."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.trainer_seconds(CLIPTrainer, batch, contrastive_chunk_size=chunk)
    rate = batch / seconds
    found = {"seconds_a_step": seconds, "images_a_second": rate, "share_of_bf16_peak": rate * bench.flops / peak}
    if bench.device.type == "cuda":
        found["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def compiled(note: Callable[[str, Any], None], device: torch.device, left: Callable[[], float], images: Any) -> None:
    """What `torch_compile` gains in a step, and how far the embeddings of a compiled model are off."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, PATCHES[0] if device.type == "cuda" else PATCHES[0] // 4, folder)
        batch = BATCHES[device.type][0][0]
        note("largest_difference_of_embeddings", lambda: compiled_difference(bench, batch))
        if device.type == "cuda":  # on a CPU that takes minutes
            for name, given in (("eager", {}), ("compiled", {"torch_compile": True})):
                note(f"{name}_seconds_a_step", lambda g=given: bench.trainer_seconds(CLIPTrainer, batch, **g))


def compiled_difference(bench: Bench, batch: int) -> float:
    """Of normalised image and text embeddings in float32."""
    model = copy.deepcopy(bench.model).to(bench.device).eval()
    inputs = {name: value.to(bench.device) for name, value in bench.collator([{}] * batch).items()}
    inputs.pop(ROW_INDEX)
    inputs["pixel_values"] = to_float(inputs["pixel_values"])
    # On a CPU the reduced form traces alone: code for it takes minutes to make.
    faster = torch.compile(model, backend="inductor" if bench.device.type == "cuda" else "eager")
    with torch.no_grad():
        one, two = model(**inputs), faster(**inputs)
    pairs = ((one.image_embeds, two.image_embeds), (one.text_embeds, two.text_embeds))
    return max(float((a - b).abs().max()) for a, b in pairs)
