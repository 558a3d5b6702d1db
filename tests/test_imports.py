"""The floors of the house: what may import what, and what importing the package costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import networkx as nx
import pytest

import hf_robust_clip
from hf_robust_clip.defences import LINES

PACKAGE = Path(hf_robust_clip.__file__).parent

#: From the ground up: a module imports from its own floor and from those below.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset(
        {"batch", "columns", "losses", "distributed", "pool", "lookup", "mixture", "seeding", "imaging", "augment"}
        | {"files", "settings", "versions", "weight_names", "wording", "kinds", "locking"}
    ),
    frozenset({"attacks"}),
    frozenset({"models", "data", "evaluation"}),
    frozenset({"scanning"}),
    frozenset({"arguments", "methods", "record"}),
    frozenset({"defences"}),
    frozenset({"describing", "telling", "callbacks"}),
    frozenset({"trainers"}),
    frozenset({"cli", "__main__"}),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module(path: Path) -> str:
    """The name of a file's module inside the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module(path) for path in MODULES}


def part(name: str) -> str:
    """The top-level module or package that a module belongs to."""
    return name.partition(".")[0]


def imported(path: Path, when_imported: bool = False) -> Iterator[str]:
    """
    Full dotted names: of modules for `import`, of modules and what is taken from them for `from ... import`. All of a
    file, or those of them that importing it carries out: none inside functions or for type checkers.
    """
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            skipped = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            if not (when_imported and skipped):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def arrows(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever it does."""
    inside = [name.removeprefix(f"{PACKAGE.name}.") for name in imported(path) if part(name) == PACKAGE.name]
    return {name if name in NAMES else name.rpartition(".")[0] for name in inside} - {module(path), ""}


def test_imports_go_down():
    without = {part(name) for name in NAMES} - FLOOR.keys()
    assert not without, "these have no floor yet: add them to FLOORS"
    up = [(module(path), name) for path in MODULES for name in arrows(path)]
    assert [(own, name) for own, name in up if FLOOR[part(name)] > FLOOR[part(own)]] == []


def test_no_imports_run_in_circles():
    graph = nx.DiGraph((module(path), name) for path in MODULES for name in arrows(path))
    assert [circle for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_only_commands_import_attacks():
    """Training and measuring have no need of them: what all know of a row is in `columns`."""
    users = {part(module(path)) for path in MODULES if any(part(name) == "attacks" for name in arrows(path))}
    assert users <= {"attacks", "scanning", "cli"}


def test_the_ground_floor_needs_neither_transformers_nor_datasets():
    ground = [path for path in MODULES if FLOOR[part(module(path))] == 0]
    roots = {(module(path), part(name)) for path in ground for name in imported(path, when_imported=True)}
    heavy = {"transformers", "datasets", "accelerate", "peft", "evaluate"}
    assert [(own, root) for own, root in roots if root in heavy] == []


def test_only_the_upper_floors_know_the_trainer():
    upper = ("arguments", "trainers", "callbacks", "cli")
    lower = [path for path in MODULES if part(module(path)) not in upper]
    trainer = re.compile(r"transformers\.(.*\.)?[^.]*Train[^.]*")
    assert [(module(path), name) for path in lower for name in imported(path) if trainer.fullmatch(name)] == []


def test_no_test_imports_another():
    """What they share is in `support`."""
    line = re.compile(r"^ *(?:from|import) +(?:[\w.]+\.)?(test_\w+|conftest)\b", re.MULTILINE)
    files = sorted(Path(__file__).parent.rglob("*.py"))
    assert [(path.name, taken) for path in files for taken in line.findall(path.read_text())] == []


def run(command: str) -> str:
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_alone_is_cheap():
    heavy = ("torch", "transformers", "datasets", "numpy", "PIL", "sklearn", "kornia", "nlpaug")
    loaded = run(f"import sys, hf_robust_clip; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_ground_floor_imports_without_transformers_and_datasets():
    modules = [f"{PACKAGE.name}.{name}" for name in sorted(NAMES) if FLOOR[part(name)] == 0]
    run(
        "import sys, importlib\n"
        "sys.modules.update(transformers=None, datasets=None, accelerate=None)\n"
        f"for name in {modules}: importlib.import_module(name)"
    )


def test_every_public_name_resolves():
    for name in hf_robust_clip.__all__:
        value = getattr(hf_robust_clip, name)
        assert value is not None, name
        if isinstance(value, ModuleType):
            assert value.__name__ == f"{PACKAGE.name}.{name}" and value.__doc__, name
        elif name != "__version__":
            assert value.__name__ == name and value.__doc__, name
            # One object, whichever way it is imported.
            assert getattr(import_module(value.__module__), name) is value, name


def test_public_names_are_listed_and_others_are_refused():
    assert set(hf_robust_clip.__all__) <= set(dir(hf_robust_clip))
    assert sorted(hf_robust_clip.__all__[:-1]) == hf_robust_clip.__all__[:-1]
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchTrainer'"):
        hf_robust_clip.NoSuchTrainer  # noqa: B018
    with pytest.raises(ImportError):
        from hf_robust_clip import NoSuchTrainer  # noqa: F401


def test_editors_and_type_checkers_see_the_same_names():
    """The imports under `TYPE_CHECKING`, which nobody runs, are of what `__getattr__` finds."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} as {alias.name}, or it is private to a type checker"
            seen[alias.name] = node.module or alias.name
    # A trainer that is made of a defence's line is there when it runs.
    tree = ast.parse((PACKAGE / "trainers" / "defended.py").read_text(encoding="utf-8"))
    written = {"CLIPTrainer", *(node.name for node in tree.body if isinstance(node, ast.ClassDef))}
    made = [cls for cls, _ in LINES.values() if f"{cls}Trainer" not in written]
    names = {f"{cls}{ending}" for cls in made for ending in ("Trainer", "TrainingArguments")}
    assert seen == {name: place for name, place in hf_robust_clip._PUBLIC.items() if name not in names}


def test_names_that_transformers_owns_are_not_taken():
    taken = {"CLIPConfig", "RoCLIPConfig", "CLIPModel", "CLIPProcessor"}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        assert not defined & taken
        assert path.stem not in ("datasets", "evaluate", "utils")
