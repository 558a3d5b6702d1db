"""Cells in a bounded number of processes, each saved as it finishes, continued where they were interrupted."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from .cell import Cell, run_cell


class Results:
    """
    The file of results: cells by the key of their settings, written anew after each.

    Args:
        path (`Path`): A JSON file; read if it is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.cells: dict[str, dict[str, Any]] = {cell["key"]: cell for cell in self.content.get("cells", [])}

    def add(self, result: dict[str, Any]) -> None:
        """Keep the result of a cell, and save."""
        self.cells[result["key"]] = result
        self.save()

    def save(self, **values: Any) -> None:
        """Write the file, in one step: an interruption leaves the old one or the new one. `values` are added to it."""
        self.content |= values
        self.content["cells"] = list(self.cells.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)

    def keep(self, cells: Sequence[Cell]) -> None:
        """Drop results of cells that are not among these: of other settings than the study's now."""
        keys = {cell.key for cell in cells}
        self.cells = {key: result for key, result in self.cells.items() if key in keys}

    def take_over(self, other: Results, cells: Sequence[Cell]) -> None:
        """Results of these cells that are in another file."""
        for cell in cells:
            if cell.key in other.cells:
                self.cells.setdefault(cell.key, other.cells[cell.key])

    def has(self, cell: Cell) -> bool:
        """Whether the cell's model has been measured, by today's measures."""
        wanted, measured = cell.measuring(), self.cells.get(cell.key, {}).get("measuring") or {}
        # A rebound that nobody asks for does no harm.
        return wanted | ({} if wanted["rebound"] else {"rebound": measured.get("rebound")}) == measured

    def of(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell."""
        return self.cells[cell.key]


def run_cells(
    cells: Sequence[Cell],
    results: Results,
    data: Path | None,
    work: Path,
    processes: int,
    threads: int,
    until: float = math.inf,
) -> bool:
    """
    Run the cells that have no result yet, those first whose models others start from.

    Args:
        cells (sequence of [`Cell`]): In the order in which they are to run, as far as they can.
        results ([`Results`]): Gets each result as it comes.
        data (`Path`, *optional*): The folder of the study's files.
        work (`Path`): For the models.
        processes (`int`): Most at a time; with 1 they run in this process.
        threads (`int`): Of each.
        until (`float`): No cell begins after `time.monotonic()` has reached it.

    Returns:
        `bool`: Whether all have a result now.

    Raises:
        `RuntimeError`: At the end, if a cell failed; the others have been run.
    """
    waiting = {cell.key: cell for cell in _with_starts(cells, results, work)}
    total, done, failed = len(waiting), 0, []
    if not total:
        return True
    wanted = len({cell.key for cell in cells} | set(waiting))
    print(f"{total} of {wanted} cells to run, {processes} at a time", flush=True)
    start = time.perf_counter()
    with _executor(processes, threads) as pool:
        running: dict[Future[dict[str, Any]], Cell] = {}
        while (waiting and time.monotonic() < until) or running:
            for key, cell in list(waiting.items()) if time.monotonic() < until else ():
                if len(running) < processes and _can_start(cell, waiting, running, work):
                    arguments = (waiting.pop(key), data, work, threads, results.cells.get(key))
                    running[pool.submit(run_cell, *arguments)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                done += 1
                minutes = (time.perf_counter() - start) / 60
                try:
                    results.add(future.result())
                    print(f"[{done}/{total}, {minutes:.1f} min] {cell.label}: {summary(results.of(cell))}", flush=True)
                except Exception:
                    failed.append(cell)
                    print(f"[{done}/{total}] {cell.label} FAILED\n{traceback.format_exc()}", flush=True)
                    for key in [
                        key for key, other in waiting.items() if cell.key in {start.key for start in other.starts}
                    ]:
                        failed.append(waiting.pop(key))
                        done += 1
    if failed:
        raise RuntimeError(f"{len(failed)} cells failed or could not start: " + "; ".join(c.label for c in failed))
    return not waiting


def result_of(cell: Cell, table: Results, data: Path | None, work: Path, threads: int) -> dict[str, Any]:
    """
    The result of a cell whose model is needed, too: a table's if the model is there. Else it runs in this process,
    after those that it starts from; the table stays as it is.
    """
    if cell.key in table.cells and cell.is_trained(work):
        return table.of(cell)
    return [run_cell(link, data, work, threads) for link in _chain(cell, work)][-1]


class _InThisProcess(Executor):
    """Runs what it is given at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executor(processes: int, threads: int) -> Executor:
    if processes == 1:
        return _InThisProcess()
    # Workers read it before torch starts its threads.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker when the process that started it ends, however it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def summary(result: dict[str, Any]) -> str:
    """A result on one line."""
    figures = result["figures"]
    return (
        f"accuracy {figures['clean_accuracy']:.1%}, balanced {figures['clean_balanced_accuracy']:.1%}, "
        f"attack {figures[result['success']]:.1%}, {result['seconds']:.0f} s"
    )


def _with_starts(cells: Sequence[Cell], results: Results, work: Path) -> Iterator[Cell]:
    """The cells without a result, each after the one it starts from if that has no model yet."""
    seen = set()
    for cell in cells:
        if results.has(cell):
            continue
        for link in _chain(cell, work):
            if link.key not in seen:
                seen.add(link.key)
                yield link


def _chain(cell: Cell, work: Path) -> list[Cell]:
    """The cell, after those that it starts from and that have no model yet."""
    return [*(start for start in reversed(cell.starts) if not start.is_trained(work)), cell]


def _can_start(cell: Cell, waiting: dict[str, Cell], running: dict[Future[dict[str, Any]], Cell], work: Path) -> bool:
    if cell.model_key in {other.model_key for other in running.values()}:
        return False  # twins: the first trains the model of all
    under_way = {other.model_key for other in (*waiting.values(), *running.values())}
    return all(need.is_trained(work) or need.model_key not in under_way for need in cell.starts[:1])
