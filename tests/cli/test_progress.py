"""Where no bar is shown, a few lines show that a training lives, and how it fares."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_robust_clip.cli import progress
from hf_robust_clip.cli.progress import TrainingBar, TrainingLog, progress_callback
from hf_robust_clip.trainers.means import RecentLoss


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: Any, steps: int, seconds: float, first: int = 0, **options: Any) -> list[tuple[float, str]]:
    """When a training of so many steps, of so many seconds and 8 pairs each, printed what; its loss is its step."""
    clock, recent = Clock(), RecentLoss()
    trainer: Any = SimpleNamespace(recent_loss=recent)
    args: Any = SimpleNamespace(world_size=2)
    state: Any = SimpleNamespace(global_step=first, max_steps=steps)
    log = TrainingLog(trainer.recent_loss, {"eval_clean_accuracy": "clean"}, clock=clock, **options)
    found: list[tuple[float, str]] = []

    def call(event: Any, **kwargs: Any) -> None:
        event(args, state, None, **kwargs)
        found.extend((clock.now - 1000, line) for line in capsys.readouterr().out.splitlines())

    recent.add(torch.tensor(1e6), 8)  # of an earlier training
    call(log.on_train_begin)
    for step in range(first + 1, steps + 1):
        clock.now += seconds
        recent.add(torch.tensor(float(step), requires_grad=True), 8)
        state.global_step = step
        call(log.on_step_end)
        if 2 * step == steps:
            clock.now += 30
            call(log.on_evaluate, metrics={"eval_clean_accuracy": 0.5, "eval_loss": 1.0})
    call(log.on_train_end)
    return found


@pytest.mark.parametrize("steps, seconds", [(1, 1), (3, 0.1), (150, 0.1), (40, 1), (1000, 0.01)])
def test_a_short_run_prints_about_ten_lines(steps: int, seconds: float, capsys: Any) -> None:
    lines = [line for _, line in lines_of(capsys, steps, seconds)]
    assert 2 <= len(lines) <= 11
    assert lines[0] == f"step 0 of {steps:,}" and lines[-1].startswith(f"step {steps:,} of {steps:,}: loss ")
    assert lines[-1].count(" in all") == 1 and all(" left" in line for line in lines[1:-1])


@pytest.mark.parametrize("steps, seconds", [(100, 100), (3000, 1.5), (200, 45), (50_000, 0.2)])
def test_a_long_run_prints_one_a_minute_or_a_step(steps: int, seconds: float, capsys: Any) -> None:
    times = [when for when, _ in lines_of(capsys, steps, seconds)]
    # Half a minute of the evaluation belongs to no step.
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert max(gaps) <= max(60, seconds) + seconds + 30
    assert len(times) <= times[-1] / 60 + 12


def test_figures_are_those_since_the_line_before(capsys: Any) -> None:
    lines = [line for _, line in lines_of(capsys, 100, 2)]
    losses = [float(re.findall(r"loss (\S+),", line)[0]) for line in lines[1:]]
    assert losses == [5.5 + 10 * tenth for tenth in range(10)]
    # Of two processes, 8 pairs each in 2 seconds; the evaluation's time does not count.
    assert all(", 8 pairs/s, " in line for line in lines[1:])
    assert [("clean 50.0%" in line) for line in lines] == [False] * 6 + [True] * 5
    assert "0:02:40 left" in lines[2]
    assert lines_of(capsys, 100, 2, first=50)[0][1] == "step 50 of 100"


def test_a_brief_log_has_only_the_lines_of_minutes(capsys: Any) -> None:
    assert lines_of(capsys, 20, 1, brief=True) == []
    long = lines_of(capsys, 200, 1, brief=True, indent="  ")
    assert 3 <= len(long) <= 4 and all(line.startswith("  step ") for _, line in long)


def test_recent_loss_is_weighed_by_rows_and_forgotten() -> None:
    recent = RecentLoss()
    recent.add(torch.tensor(1.0), 1)
    recent.add(torch.tensor(4.0), 3)
    assert recent.take() == (3.25, 4)
    loss, rows = recent.take()
    assert math.isnan(loss) and rows == 0


@pytest.mark.parametrize("terminal, bar, expected", [(True, True, TrainingBar), (True, False, TrainingLog)])
@pytest.mark.parametrize("given", [True, False])
def test_a_bar_where_it_is_seen_and_wanted(
    terminal: bool, bar: bool, expected: type, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal and given)
    trainer: Any = SimpleNamespace(add_callback=found.append, recent_loss=RecentLoss())
    trainer.add_callback(progress_callback(trainer.recent_loss, {}, bar=bar))
    assert type(found[0]) is (expected if given else TrainingLog)
