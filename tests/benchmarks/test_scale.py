"""What is computed of communication, FLOP and memory is what is counted; timers' parts add up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from bench.flops import counted_flops, pair_flops
from bench.marked import markdown, put_between, table_marks
from bench.phases import PHASES, phase_trainer
from bench.traffic import Counter, contrastive_traffic, counting, gradient_traffic
from cost_model import Machine, Training, step_of
from profile_step import Clock
from split_at_scale import EXTRAPOLATED, draw_scores, line_through
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, TrainerCallback

from hf_robust_clip import distributed

WORLD, BATCH = 3, 8


class Counts(TrainerCallback):
    """The bytes of each step."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.steps: list[dict[str, int]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.counter.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.counter.bytes())


@pytest.mark.parametrize("phase", PHASES)
def test_bytes_counted_in_a_step_are_those_computed_from_the_shapes(
    phase: str,
    pairs: datasets.Dataset,
    processor: CLIPProcessor,
    tiny_model: Callable[[int], CLIPModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Every other process holds what this one does.
    monkeypatch.setattr(distributed, "world_size", lambda: WORLD)
    monkeypatch.setattr(dist, "all_gather", lambda found, own: [one.copy_(own) for one in found])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: tensor.mul_(WORLD))
    trainer = phase_trainer(
        *(phase, str(tmp_path), tiny_model(0), processor, pairs, 16),
        per_device_train_batch_size=BATCH,
        max_steps=1,
        use_cpu=True,
    )
    counts = Counts(Counter())
    trainer.add_callback(counts)
    with counting(counts.counter):
        trainer.train()
    computed = contrastive_traffic(phase, BATCH, trainer.model.config.projection_dim, WORLD)
    assert counts.steps == [{"gathered": computed.gathered, "reduced": computed.reduced, "of_ddp": 0}]
    assert computed.gathered > 0


def test_one_process_sends_nothing_and_a_ring_sends_nearly_all() -> None:
    alone = contrastive_traffic("clip", BATCH, 512, 1), gradient_traffic(1000, 1)
    assert [traffic.sent(1) for traffic in alone] == [0, 0]
    gathered = contrastive_traffic("clip", BATCH, 512, 4)
    assert gathered.gathered == gathered.reduced == 2 * 4 * BATCH * 512 * 4
    # A ring passes each part on to all others once, and twice to sum.
    assert gathered.sent(4) == 3 / 4 * (gathered.gathered + 2 * gathered.reduced)


def test_flops_of_a_configuration_are_those_of_the_model_as_it_runs(
    tiny_model: Callable[[int], CLIPModel], processor: CLIPProcessor
) -> None:
    model = tiny_model(0)
    side = model.config.vision_config.image_size
    inputs = {"pixel_values": torch.randn(3, 3, side, side), "input_ids": torch.ones(3, 7, dtype=torch.int64)}
    computed = pair_flops(model.config, text_tokens=7)

    def embed() -> torch.Tensor:
        outputs = model.train()(**inputs)
        return outputs.image_embeds.sum() + outputs.text_embeds.sum()

    # But for the logits, which grow with the square of the batch.
    logits = 2 * model.config.projection_dim * (3 * 3 - 3)
    assert counted_flops(embed) == 3 * computed.forward + logits
    assert counted_flops(lambda: embed().backward()) == 3 * computed.training + logits


def test_a_step_costs_more_of_what_there_is_more_of() -> None:
    training = Training(pair_flops(small_config(), 8), parameters=10**6, dim=64, batch=32, pool_size=1000)
    seconds = [step_of("clip", training, Machine(), world).seconds for world in (1, 8, 64)]
    assert seconds == sorted(seconds) and seconds[0] < seconds[1]
    costs = {phase: step_of(phase, training, Machine(), 8) for phase in PHASES}
    assert costs["cleanclip"].towers == 2 * costs["clip"].towers
    assert costs["safeclip_unimodal"].look_up == 2 * costs["roclip_matching"].look_up > 0
    assert costs["clip"].look_up == 0


def small_config() -> CLIPConfig:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=16)


def test_parts_of_a_step_add_up_and_the_innermost_has_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    clock = Clock(torch.device("cpu"))
    clock.running = True
    with clock.section("loss"), clock.section("look_up"):
        pass
    parts = clock.end_step()
    # The clock is read as each part begins and ends, and as the step does.
    assert parts == {"rest": 2.0, "loss": 2.0, "look_up": 1.0}
    assert clock.end_step() == {"rest": 1.0}


def test_a_line_through_points_of_a_line_leads_where_it_does() -> None:
    rows = [1_000_000, 2_000_000, 4_000_000]
    line = line_through(rows, [5 * one + 300.0 for one in rows])
    assert line["per_row"] == pytest.approx(5)
    assert line["extrapolated"] == pytest.approx(5 * EXTRAPOLATED + 300)
    assert line["worst_residual"] < 1e-9


def test_poisons_drawn_are_few_and_of_low_similarity() -> None:
    scores = draw_scores(20_000, seed=0)
    assert scores.poisoned is not None and 0 < scores.poisoned.mean() < 0.01
    assert scores.similarities[scores.poisoned].mean() < scores.similarities.mean() - 0.1
    assert scores.similarities.dtype == "float32"


def test_a_table_replaces_what_is_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = marks = table_marks("small", "bench.py")
    page.write_text(f"before\n{begin}old\n{end}after\n")
    put_between(page, marks, markdown(("a", "b"), [("1", "2")]))
    assert page.read_text() == f"before\n{begin}| a | b |\n| --- | --- |\n| 1 | 2 |\n{end}after\n"
    with pytest.raises(ValueError, match=r"page\.md has no place for the table: it needs the lines '<!-- other table"):
        put_between(page, table_marks("other", "bench.py"), "")
