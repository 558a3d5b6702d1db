"""The README is short and its code is code; the page of results says what was measured."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import hf_robust_clip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_demo_tables_are_those_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("demo_table", ROOT / "benchmarks" / "demo_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    for table in module.TABLES:
        begin, end = table.marks
        assert begin + table.markdown() + end in RESULTS
        assert table.path(*table.runs[0]).is_file()
        for trigger, seed in table.runs:
            if table.path(trigger, seed).is_file():
                setup = json.loads(table.path(trigger, seed).read_text())["setup"]
                assert (setup["trigger"]["name"], setup["seed"], setup["quick"]) == (trigger, seed, False)
                assert setup.get("defence", "cleanclip") == table.defence


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
