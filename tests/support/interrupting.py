"""Trainings that are killed, resumed, perhaps killed again, and end as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hf_robust_clip.trainers.checkpoints import why_incomplete
from support.moments import LOSSES, MOMENTS, SCORING
from support.stand_in import HubStandIn
from support.training import assert_same_outcome, is_whole, saved_steps
from support.victim import Order

VICTIM = Path(__file__).parent / "victim.py"
#: Steps of a training, and before which of them SafeCLIP scores its pairs.
STEPS = {"CLIPTrainer": 12, "CleanCLIPTrainer": 12, "RoCLIPTrainer": 12, "SafeCLIPTrainer": 16}
SPLITS = (8, 12)
#: For each kill there is an epoch's room: in which workers are started, checkpoints deleted, and models uploaded.
ROOM = 4
#: Seconds within which a training begins, ends, or comes to a moment.
PATIENCE = 120.0


def moments_of(trainer: str) -> list[str]:
    """The names of the moments at which a trainer can be killed."""
    return [moment for moment in MOMENTS if trainer == "SafeCLIPTrainer" or moment not in SCORING]


class Interrupter:
    """
    Starts trainings one after the other, kills them, and looks at what is left; a context manager.

    Args:
        folder (`Path`): For all that the trainings write.

    Attributes:
        killed (`dict[tuple[str, str], int]`): How often, by trainer and moment.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hub = HubStandIn()
        self._lines: queue.Queue[str] = queue.Queue()
        self._wholes: dict[str, dict[str, Any]] = {}
        self._chains = 0
        self._running: int | None = None
        self.killed: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Interrupter:
        self._hub.__enter__()
        environment = {
            **os.environ,
            **self._hub.environment(self._folder / "home"),
            "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(VICTIM)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._process.kill()
        self._process.communicate()
        self._hub.__exit__(kind, error, trace)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())

    def _next(self, word: str, order: Order) -> int:
        """The number that comes with a line of the trainings' process."""
        try:
            found, _, number = self._lines.get(timeout=PATIENCE).partition(" ")
        except queue.Empty:
            found, number = "nothing", ""
        if found == "ended":
            self._running = None
        assert found == word, f"{found} {number} instead of {word}: {order}\n{_output(order)}"
        return int(number or 0)

    def _start(self, order: Order) -> int:
        Path(order.results).mkdir(parents=True)
        assert self._process.stdin is not None
        self._stop()
        print(json.dumps(dataclasses.asdict(order)), file=self._process.stdin, flush=True)
        self._running = self._next("started", order)
        return self._running

    def _stop(self) -> None:
        """End a training that did not do as expected."""
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running, signal.SIGKILL)
            while not self._lines.get(timeout=PATIENCE).startswith("ended"):
                pass
            self._running = None

    def finish(self, order: Order) -> dict[str, Any]:
        """Let a training end, and return its outcome."""
        self._start(order)
        assert self._next("ended", order) == 0, _output(order)
        outcome: dict[str, Any] = torch.load(Path(order.results, "outcome.pt"), weights_only=False)
        return outcome

    def lose_worker(self, order: Order) -> None:
        """Let a training lose a worker of its data loader, which is to end it with an error that says so."""
        process = self._start(order)
        assert self._next("begun", order) == 0
        assert self._next("ended", order) == 1, f"a killed worker did not end training\n{_output(order)}"
        assert "RuntimeError: DataLoader worker (pid" in _output(order), _output(order)
        _wait_for_workers(process)

    def kill(self, order: Order, delay: float, put: int = 1) -> None:
        """Kill a training so many seconds after its moment has begun; of a push, in the PUT of that number."""
        repo = order.repo_id
        held = self._hub.traffic.hold("PUT", f"/{repo}/upload/.*", put) if order.moment == "pushing" else None
        process = self._start(order)
        if held is None:
            self._next("begun", order)
        else:
            assert held.wait(PATIENCE), f"it never pushed: {order}\n{_output(order)}"
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        assert self._next("ended", order) == -signal.SIGKILL, _output(order)
        _wait_for_workers(process)

    def whole(self, trainer: str) -> dict[str, Any]:
        """The outcome of a training that nothing has interrupted."""
        if trainer not in self._wholes:
            folder = self._folder / f"{trainer}-whole"
            self._wholes[trainer] = self.finish(Order(trainer, str(folder / "out"), str(folder / "results")))
        return self._wholes[trainer]

    def _is_whole(self, trainer: str, checkpoint: Path) -> bool:
        """Whether it has all files of one that was never in danger, and they can be read."""
        self.whole(trainer)
        last = self._folder / f"{trainer}-whole" / "out" / f"checkpoint-{STEPS[trainer]}"
        names = {path.name for path in last.iterdir()}
        return names == {path.name for path in checkpoint.iterdir()} and is_whole(checkpoint)

    def check_survives(self, trainer: str, moments: list[str], seed: int) -> None:
        """
        Kill a training at each of some moments in turn, resuming it in between, and let it end.

        Raises:
            `AssertionError`: If a checkpoint that is not whole is taken for one, something is left over, or the
                outcome is another than that of the uninterrupted training; with the seed, at which it can be repeated.
        """
        try:
            self._check_survives(trainer, moments, random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"{trainer} killed {', then '.join(moments)}, with seed {seed}: {error}") from error

    def _check_survives(self, trainer: str, moments: list[str], rng: random.Random) -> None:
        self._chains += 1
        folder = self._folder / f"{trainer}-{self._chains}"
        output_dir = folder / "out"
        repo_id = f"tester/{folder.name}" if "pushing" in moments else None
        order = Order(trainer, str(output_dir), str(folder / "end"), repo_id=repo_id)
        begin, tried = 0, 0
        for number, moment in enumerate(moments):
            last = STEPS[trainer] - ROOM
            if begin > last:
                break
            step = rng.randint(begin, max(begin, last * (number + 1) // len(moments)))
            if moment in SCORING:
                step = rng.choice([split for split in SPLITS if split >= begin])
            started = dataclasses.replace(
                order,
                results=str(folder / str(number)),
                moment=moment,
                step=step,
                workers=2 if "worker" in moment else 0,
            )
            if moment in LOSSES:
                self.lose_worker(started)
            else:
                self.kill(started, delay=rng.uniform(0, rng.choice([0.005, 0.05])), put=rng.randint(1, 3))
            tried = number + 1
            steps = saved_steps(output_dir)
            whole = [step for step in steps if self._is_whole(trainer, output_dir / f"checkpoint-{step}")]
            taken = [step for step in steps if why_incomplete(output_dir / f"checkpoint-{step}") is None]
            assert taken == whole, f"whole after it was killed {moment}: {whole}; taken for whole: {taken}"
            begin = max(whole, default=0)
        outcome = self.finish(order)
        assert_same_outcome(self.whole(trainer), outcome)
        left = [path.name for path in output_dir.iterdir() if path.name.startswith("_") or ".partial" in path.name]
        assert not left, f"{left} is left over"
        if repo_id is not None:
            saved = output_dir / f"checkpoint-{STEPS[trainer]}" / "model.safetensors"
            pushed = self._hub.files(repo_id)
            assert pushed["model.safetensors"] == saved.read_bytes(), "the Hub has another model"
            inside = [path for path in pushed if "/" in path]
            assert not inside, f"{inside} are pushed, which are no files of the model"
        for moment in moments[:tried]:
            self.killed[trainer, moment] = self.killed.get((trainer, moment), 0) + 1


def _output(order: Order) -> str:
    path = Path(order.results, "output.txt")
    return path.read_text()[-4000:] if path.is_file() else ""


def _wait_for_workers(session: int) -> None:
    """Until nothing is left of a killed training; its workers look every few seconds whether it is still there."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"processes of session {session} live on without their trainer")
