"""The README says what was measured, and its code is code."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import hf_robust_clip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_demo_table_is_that_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("demo_table", ROOT / "benchmarks" / "demo_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.BEGIN + module.table() + module.END in README
    for trigger, seed in module.RUNS:
        results = json.loads((module.RESULTS / f"{trigger}-{seed}.json").read_text())
        assert results["setup"]["trigger"]["name"] == trigger
        assert results["setup"]["seed"] == seed
        assert not results["setup"]["quick"]


def test_code_blocks_parse_and_import_public_names() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_robust_clip":
                assert {alias.name for alias in node.names} <= set(hf_robust_clip.__all__)


def test_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        if target != "in":
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
