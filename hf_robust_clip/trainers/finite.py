"""Stops a training whose loss or gradient is not finite, and writes down where it went wrong."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..batch import Embeddings
from ..files import write_text
from ..wording import listed, shortened

FILE = "non_finite.json"
#: Steps after which an accelerator has long computed what is asked for, so that asking does not make it wait.
_LAG = 2
#: Names of parameters that are listed.
_LISTED = 20


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite; the message says which, and in which file the rest is."""


class FiniteCheck:
    """
    Follows the loss terms and the gradient norm of each step, and stops at the first that is not finite.

    On a CPU before the weights are updated; on an accelerator, which is not made to wait, two steps later, but before
    anything is saved.

    Args:
        folder (`Path`): Where it writes down what it found.
        process (`int`): Of this rank.
        device (`torch.device`): That losses and gradients are on.
        parameters (callable): The model's names and parameters, as they are.
    """

    def __init__(
        self,
        folder: Path,
        process: int,
        device: torch.device,
        parameters: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ) -> None:
        self._folder, self._process, self._device, self._parameters = folder, process, device, parameters
        self._batches: list[dict[str, Any]] = []
        self._steps: deque[dict[str, Any]] = deque()

    def clear(self) -> None:
        """Forget everything."""
        self.drop_batches()
        self._steps.clear()

    def drop_batches(self) -> None:
        """Forget the batches of a step that was not made; steps that are still to be looked at stay."""
        self._batches.clear()

    @torch.no_grad()
    def note_batch(
        self, terms: Mapping[str, torch.Tensor], views: Mapping[str, Embeddings], rows: torch.Tensor | None
    ) -> None:
        """Take in a batch: its loss terms, its embeddings and the numbers of its rows."""
        finite = [side.isfinite().all(dim=1) for view in views.values() for side in view]  # (B,) each
        self._batches.append(
            {
                "terms": {name: term.detach() for name, term in terms.items()},
                "usable": torch.stack(finite).all(dim=0),
                "rows": rows,
            }
        )

    def note_gradient(self, norm: Any, step: int, epoch: float | None) -> None:
        """Take in the norm of a step's gradient, if it is to be looked at, after its batches, before its update."""
        device = self._device
        values = [term for batch in self._batches for term in batch["terms"].values()]
        if norm is not None:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            values.append(torch.as_tensor(whole, device=device))
        if not values:
            return
        # Reading a value waits for all that the device was asked to do until then; a copy that it was told to make in
        # passing has long been made when it is read.
        copied = torch.stack([value.float().reshape(()) for value in values]).to("cpu", non_blocking=True)
        made = torch.Event(device) if device.type != "cpu" else None
        if made is not None:
            made.record()
        self._steps.append(
            {
                "step": step,
                "epoch": epoch,
                "values": copied,
                "made": made,
                "batches": self._batches,
            }
        )
        self._batches = []
        self.check(lag=0 if device.type == "cpu" else _LAG)

    def check(self, lag: int = 0) -> None:
        """
        Look at all steps but the last `lag`.

        Raises:
            [`NonFiniteError`]: At the first that is not finite.
        """
        while len(self._steps) > lag:
            step = self._steps.popleft()
            if step["made"] is not None:
                step["made"].synchronize()
            values = iter(step["values"].tolist())
            terms = [{name: next(values) for name in batch["terms"]} for batch in step["batches"]]
            norm = next(values, None)
            wrong = {name for batch in terms for name, value in batch.items() if not math.isfinite(value)}
            if wrong or not (norm is None or math.isfinite(norm)):
                self._stop(step, terms, sorted(wrong) or ["gradient_norm"], norm)

    def _stop(self, step: dict[str, Any], terms: list[dict[str, float]], wrong: list[str], norm: float | None) -> None:
        rows = [_rows(batch["rows"]) for batch in step["batches"]]
        broken = [_rows(batch["rows"], ~batch["usable"]) for batch in step["batches"]]
        path = self._folder / (FILE if self._process == 0 else f"rank-{self._process}-{FILE}")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "step": step["step"],
            "epoch": step["epoch"],
            "process": self._process,
            "not_finite": wrong,
            "terms": [{name: repr(value) for name, value in batch.items()} for batch in terms],
            "gradient_norm": repr(norm),
            "rows": rows,
            "rows_with_embeddings_not_finite": broken,
            # Not the gradients: clipping divides all of them by their norm.
            "parameters_not_finite": _not_finite(self._parameters()),
        }
        write_text(path, json.dumps(content, indent=2) + "\n")
        suspects = sorted({row for batch in broken for row in batch or ()})
        raise NonFiniteError(
            shortened(
                f"step {step['step']}: {listed(wrong)} not finite. "
                + (f"The embeddings of rows {listed(suspects)} are not. " if suspects else "")
                + f"{shortened(str(path), 120)} has the rows and the terms. Checkpoints saved before are finite: "
                "start anew with the newest as model, with a lower learning_rate or without those rows, or resume it "
                "with a smaller max_grad_norm (resumed, it keeps its learning_rate and its rows). "
                "stop_on_non_finite=False goes on regardless"
            )
        )


def _rows(numbers: torch.Tensor | None, where: torch.Tensor | None = None) -> list[int] | None:
    if numbers is None:
        return None
    chosen: list[int] = (numbers if where is None else numbers[where.to(numbers.device)]).tolist()
    return chosen


def _not_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    # Of sharded weights each process knows its own.
    parts = ((name, value.to_local() if hasattr(value, "to_local") else value) for name, value in parameters)
    names = [name for name, value in parts if not bool(value.isfinite().all())]
    return names if len(names) <= _LISTED else [*names[:_LISTED], f"and {len(names) - _LISTED} more"]
