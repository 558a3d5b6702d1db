"""
Trains in child processes that are there to be killed; run as a script, which reads one [`Order`] a line.

Children are forks of a process that has the imports done. It prints `started PID`, `begun` as the order's moment
begins, and `ended STATUS`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_robust_clip import CLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer, newest_checkpoint
from hf_robust_clip.data.digits import digit_processor
from support.moments import MOMENTS, Moment, hold
from support.training import ARGUMENTS, digits, make_trainer, outcome

TRAINERS = {cls.__name__: cls for cls in ARGUMENTS}
#: Four steps an epoch, and a checkpoint after each, of which two stay. RoCLIP matches in epoch 1, with pools full
#: from step 3 on; SafeCLIP splits before steps 9 and 13.
RUNS: dict[type[CLIPTrainer], dict[str, Any]] = {
    cls: {"rows": 32, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    for cls in ARGUMENTS
}
RUNS[RoCLIPTrainer] |= {"matching": "cross"}
RUNS[SafeCLIPTrainer] |= {"rows": 40, "num_train_epochs": 4, "safe_threshold": 0.5, "safe_growth": 0.1}
#: Of a training from a stream, which does not tell how many rows it has.
STREAMED_STEPS = 12


@dataclass
class Order:
    """
    A training to start, or to go on with where `output_dir` has a checkpoint.

    Args:
        trainer (`str`): The name of its class.
        output_dir (`str`): Of the training.
        results (`str`): A folder for what is told of it: `output.txt`, and `outcome.pt` if it ends.
        moment (`str`, *optional*): From `MOMENTS`. `None`: it is to end.
        step (`int`): Before which the moment does not begin.
        workers (`int`): Of its data loader.
        streamed (`bool`): Whether its rows come as a stream of two shards.
        repo_id (`str`, *optional*): Where it pushes each checkpoint's model.
    """

    trainer: str
    output_dir: str
    results: str
    moment: str | None = None
    step: int = 0
    workers: int = 0
    streamed: bool = False
    repo_id: str | None = None


def train(order: Order, channel: int) -> None:
    """Do what the order says, in a process of its own; `channel` takes the announcement."""
    options = dict(RUNS[TRAINERS[order.trainer]])
    if order.repo_id is not None:
        options |= {"push_to_hub": True, "hub_model_id": order.repo_id, "hub_strategy": "every_save"}
        options |= {"hub_always_push": True}
    if order.streamed:
        options["train_dataset"] = digits().select(range(options["rows"])).to_iterable_dataset(num_shards=2)
        options["max_steps"] = STREAMED_STEPS
    output_dir, results = Path(order.output_dir), Path(order.results)
    trainer = make_trainer(TRAINERS[order.trainer], output_dir, dataloader_num_workers=order.workers, **options)
    if order.moment is not None:
        moment = Moment(trainer, lambda: announce(channel), order.step)
        MOMENTS[order.moment](moment)
    trainer.train(resume_from_checkpoint=newest_checkpoint(output_dir))
    if order.moment is not None:
        hold()
    torch.save(outcome(trainer), results / "outcome.pt")


def announce(channel: int) -> None:
    os.write(channel, b"begun\n")


def fork(order: Order) -> None:
    """Train in a child process, and wait for its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()  # so that its workers can be told from those of others
            channel = os.dup(sys.stdout.fileno())
            with open(Path(order.results, "output.txt"), "ab") as output:
                os.dup2(output.fileno(), sys.stdout.fileno())
                os.dup2(output.fileno(), sys.stderr.fileno())
            train(order, channel)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(f"started {child}", flush=True)
    print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    digits(), digit_processor()
    # The Trainer collects garbage before each run, and would look through all that is imported each time.
    gc.freeze()
    for line in sys.stdin:
        fork(Order(**json.loads(line)))
