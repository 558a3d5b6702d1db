"""Two processes of batch B train as one of batch 2B, and resume to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from training import make_trainer

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer
from hf_robust_clip.losses import cleanclip_loss, clip_loss, roclip_loss, safeclip_cross_loss, safeclip_unimodal_loss

WORLD = 2
ROWS, DIM = 6, 5
TRAINERS: list[type[CLIPTrainer]] = [CLIPTrainer, CleanCLIPTrainer]


def losses_of(embeds: list[torch.Tensor], scale: torch.Tensor, pools: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every loss of the package on the same embeddings, with negatives from all ranks."""
    first, second = embeds[:2], embeds[2:]
    terms = {
        "cleanclip": cleanclip_loss(*first, *second, scale, gather=True),
        "roclip_cross": roclip_loss(*first, scale, *pools, matching="cross", gather=True),
        "roclip_image_to_text": roclip_loss(*first, scale, *pools, matching="image_to_text", gather=True),
        "roclip_unimodal": roclip_loss(*first, scale, *pools, matching="unimodal", gather=True),
        "safeclip_unimodal": safeclip_unimodal_loss(*first, *second, scale, *pools, gather=True),
        "safeclip_cross": safeclip_cross_loss(*first, *second, scale, gather=True),
    }
    summed = {name: torch.stack(list(parts.values())).sum() for name, parts in terms.items()}
    return {"clip": clip_loss(*first, scale, gather=True), **summed}


def example() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Embeddings of the whole batch, a tower's weight that all of them went through, and the log of the scale."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(WORLD * ROWS, DIM, generator=generator, dtype=torch.float64) for _ in range(4)]
    pools = [torch.randn(20, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]
    return inputs, pools, torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)


def gradients(rows: slice) -> dict[str, list[torch.Tensor]]:
    """The gradients of a shared tower and of the log scale, for each loss on these rows of the batch."""
    inputs, pools, start = example()
    grads = {}
    for name in losses_of(inputs, torch.tensor(1.0), pools):
        weight = start.clone().requires_grad_()
        log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        embeds = [torch.nn.functional.normalize(part[rows] @ weight, dim=1) for part in inputs]
        losses_of(embeds, log_scale.exp(), pools)[name].backward()
        grads[name] = [weight.grad, log_scale.grad]
    return grads


def gradients_of_rank(rank: int, rendezvous: str, output: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    grads = gradients(slice(rank * ROWS, (rank + 1) * ROWS))
    for parts in grads.values():
        for grad in parts:  # as DDP does
            torch.distributed.all_reduce(grad)
            grad /= WORLD
    if rank == 0:
        torch.save(grads, output)
    torch.distributed.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    output = tmp_path / "gradients.pt"
    mp.spawn(gradients_of_rank, args=(str(tmp_path / "rendezvous"), str(output)), nprocs=WORLD)
    expected, found = gradients(slice(None)), torch.load(output)
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        for one, two in zip(parts, found[name], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def launch(mode: str, output: Path, **environment: str) -> None:
    """Run this file as a script in two processes, as `torchrun` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(WORLD), "--master_port", "0"]
    command[3:3] = ["--standalone"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*command, __file__, mode, str(output)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def one_step(cls: type[CLIPTrainer], output: Path, batch: int) -> dict[str, torch.Tensor]:
    """Weights after one step of plain SGD at rate 1 without augmentation of images; captions are keyed by row."""
    trainer = make_trainer(
        cls,
        output,
        rows=WORLD * 8,
        per_device_train_batch_size=batch,
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        learning_rate=1.0,
        weight_decay=0.0,
        image_augmentation="identity",
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}),
    )
    for module in trainer.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_trainers_in_two_processes(tmp_path: Path) -> None:
    launch("script", tmp_path)
    for cls in TRAINERS:
        found = torch.load(tmp_path / f"{cls.__name__}.pt")
        for name, value in one_step(cls, tmp_path / "one", batch=WORLD * 8).items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["resumed_equals_uninterrupted"] == {
        "CLIPTrainer, 0 workers": True,
        "CleanCLIPTrainer, 0 workers": True,
        "CleanCLIPTrainer, 2 workers": True,
    }
    assert report["skipped_rows"] == [3, 17]
    assert report["eval_rows"] == [0.0, 1.0]
    assert report["streamed_steps"] == 3


def script(output: Path) -> None:
    """What the launched processes do: everything that needs two of them, in one launch."""
    from test_base import broken, evaluators
    from training import assert_same_bits, train_and_resume

    from hf_robust_clip.data.digits import load_digit_pairs

    report: dict[str, Any] = {"resumed_equals_uninterrupted": {}}
    main = int(os.environ["RANK"]) == 0
    for cls in TRAINERS:
        weights = one_step(cls, output / "two", batch=8)
        if main:
            torch.save(weights, output / f"{cls.__name__}.pt")
    for cls, workers in [(CLIPTrainer, 0), (CleanCLIPTrainer, 0), (CleanCLIPTrainer, 2)]:
        name = f"{cls.__name__}, {workers} workers"
        # 64 pairs in two batches of 8 a step: four steps an epoch.
        pair = train_and_resume(cls, output / name, step=3, num_train_epochs=2, dataloader_num_workers=workers)
        assert_same_bits(*pair)
        report["resumed_equals_uninterrupted"][name] = True
    trainer = make_trainer(
        CLIPTrainer, output / "bad", train_dataset=broken(), on_bad_row="skip", per_device_train_batch_size=4
    )
    trainer.train()
    report["skipped_rows"] = trainer.skipped_rows
    test = load_digit_pairs("test").select(range(21))
    metrics = make_trainer(CLIPTrainer, output / "eval", evaluators=evaluators(test)).evaluate()
    report["eval_rows"] = [0.0, 1.0] if 0 <= metrics["eval_clean_accuracy"] <= 1 else []
    stream = load_digit_pairs("train", renderings=1).select(range(64)).to_iterable_dataset(num_shards=2)
    trainer = make_trainer(CleanCLIPTrainer, output / "stream", train_dataset=stream, max_steps=3)
    trainer.train()
    report["streamed_steps"] = trainer.state.global_step
    if main:
        (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    script(Path(sys.argv[2]))
