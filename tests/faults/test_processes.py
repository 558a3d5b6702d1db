"""One of two processes that train together dies: the other ends with an error; it does not wait for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.training import make_trainer
from transformers import TrainerCallback

from hf_robust_clip import CLIPTrainer

#: Seconds after which what should have ended is taken to hang.
_PATIENCE = 60
#: After which a process no longer waits for the other.
_DDP_TIMEOUT = 10


class End(TrainerCallback):
    """The second process is killed after its third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and args.process_index == 1:
            print(f"ended at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.parametrize("launched", [True, False], ids=["torchrun", "alone"])
def test_process_that_is_left_ends_with_an_error(launched: bool, tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [__file__, str(tmp_path)]
    if launched:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
        places: list[dict[str, str]] = [{}]
    else:
        run = [sys.executable, *script]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        processes = [
            subprocess.Popen(run, env={**common, **place}, stdout=file, stderr=file, start_new_session=True)
            for place in places
        ]
    try:
        # The first one is the launcher, or the process that is left.
        status = processes[0].wait(timeout=_PATIENCE + 60)
        over = time.time()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = output.read_text()
    assert status != 0, text[-3000:]
    ended = float(text.partition("ended at ")[2].split()[0])
    print(f"\n{'torchrun' if launched else 'alone'}: over {over - ended:.1f} s later, status {status}")
    assert over - ended < _PATIENCE


if __name__ == "__main__":
    make_trainer(
        CLIPTrainer,
        Path(sys.argv[1]),
        callbacks=[End()],
        ddp_timeout=_DDP_TIMEOUT,
        per_device_train_batch_size=4,
    ).train()
