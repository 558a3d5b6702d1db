"""The notebook runs from top to bottom and shows what it says; what is kept of it has no outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def test_no_outputs_are_kept() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert not any(cell["metadata"] for cell in cells)


def test_runs_and_shows_the_backdoor_and_its_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "running the notebook needs nbclient and ipykernel, of the extra 'dev'"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Fewer epochs: enough for the backdoor, not for the classes.
    for cell in notebook.cells:
        for whole, fewer in (("num_train_epochs=12", "num_train_epochs=7"), ('_epochs": 3', '_epochs": 2')):
            cell.source = cell.source.replace(whole, fewer)
    assert "num_train_epochs=7" in "".join(cell.source for cell in notebook.cells)
    notebook.cells.append(nbformat.v4.new_code_cell("print(outcome.to_json(orient='index'))"))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    *cells, last = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Digits, triggers, poisons, the backdoor before and after, the course.
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 6
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    outcome = json.loads(last.outputs[0].text)
    assert set(outcome) == {"attacked", "plain fine-tuning", "CleanCLIP"}
    attacked, cleaned = (outcome[name]["attack_success_rate"] for name in ("attacked", "CleanCLIP"))
    assert attacked > 0.5 > cleaned
