"""The command answers at once where nothing has to be loaded, and ends with the right exit code and one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_robust_clip import __version__
from hf_robust_clip.cli import evaluation, info
from hf_robust_clip.cli.flags import IMAGE_TRIGGERS, TEXT_TRIGGERS, check_source, parse_trigger
from hf_robust_clip.cli.main import main
from hf_robust_clip.cli.output import UsageError
from hf_robust_clip.defences import LINES

NAMES = ("demo", "poison", "prepare", "train", "evaluate", "card", "push", "info")
#: What has to answer without the heavy libraries, with the exit code that it ends with.
LIGHT: list[tuple[list[str], int]] = [
    ([], 2),
    (["--help"], 0),
    (["--version"], 0),
    (["evalute"], 2),
    *((["--traceback", name, "--help"], 0) for name in NAMES),
    (["demo"], 2),
    (["demo", "--output-dir", "x", "--trigger", "sticker"], 2),
    (["poison", "there/is/none", "--output-dir", "x", "--target", "dog", "--rate", "0.1", "--trigger", "patch"], 2),
    (["poison", "pairs", "--output-dir", "x", "--target", "dog", "--trigger", "patch"], 2),
    (["poison", "pairs", "--output-dir", "x", "--target", "dog", "--rate", "2", "--trigger", "patch"], 2),
    (["poison", "pairs", "--output-dir", "x", "--target", "dog", "--rate", "0.1"], 2),
    (["prepare", "there/is/none", "--model", "model", "--output-dir", "x"], 2),
    (["prepare", "pairs", "--model", "model", "--output-dir", "x", "--num-proc", "0"], 2),
    (["evaluate", "model"], 2),
    (["evaluate", "model", "--data", "none.parquet"], 2),
    (["evaluate", "model", "--data", "images", "--trigger", "sticker"], 2),
    (["evaluate", "model", "--data", "images", "--trigger", "patch"], 2),
    (["evaluate", "model", "--data", "images", "--config", "none.yaml"], 2),
    (["train", "magic"], 2),
    (["train"], 2),
    (["card", "nowhere"], 2),
    (["push", "nowhere", "name/model"], 2),
    (["info", "--jsn"], 2),
]


def code_of(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_without_work_the_heavy_libraries_stay_away(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from hf_robust_clip.cli.main import main\n"
        "found = []\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        code = main(arguments)\n"
        "    except SystemExit as exit_:\n"
        "        code = exit_.code\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub', 'matplotlib'}\n"
        "    heavy &= set(sys.modules)\n"
        "    found.append([code, sorted(heavy)])\n"
        "print('\\n' + json.dumps(found))\n"
    )
    cases = json.dumps([arguments for arguments, _ in LIGHT])
    done = subprocess.run([sys.executable, "-c", script, cases], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[code, []] for _, code in LIGHT]
    # What went wrong is said in one line each.
    assert done.stderr.count("\n") == sum(code == 2 for _, code in LIGHT)
    assert all(line.startswith("hf-robust-clip") for line in done.stderr.splitlines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [*([name] for name in NAMES), *(["train", method] for method in LINES)])
def test_help_of_every_command(command: list[str], capsys: Any) -> None:
    assert code_of(*command, "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: hf-robust-clip {' '.join(command)} ") and "--traceback" in printed


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "hf_robust_clip", "--version"], capture_output=True, text=True)
    assert done.stdout == f"hf-robust-clip {__version__}\n"


def test_an_error_holds_nothing_that_a_terminal_carries_out(capsys: Any, monkeypatch: Any) -> None:
    def fail(args: Any) -> None:
        raise ValueError("no image: a\x1b[2J\x9b1m\u202eb\udce9 \u00e9")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    assert main(["evaluate", "model", "--data", "images"]) == 1
    assert capsys.readouterr().err.endswith("no image: a\\x1b[2J\\x9b1m\\u202eb\\udce9 \u00e9\n")


@pytest.mark.parametrize(
    "error, code",
    [
        (UsageError("wrong\n  usage"), 2),
        (ValueError("cannot\nwork"), 1),
        (RuntimeError("out of memory"), 1),
        (ConnectionError("no network"), 1),
        (ModuleNotFoundError("no jinja2"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def fail(args: Any) -> None:
        raise error

    monkeypatch.setattr(evaluation, "evaluate", fail)
    arguments = ["evaluate", "model", "--data", "images"]
    assert main(arguments) == code
    printed = capsys.readouterr().err
    assert printed.strip().count("\n") == 0 and "Traceback" not in printed
    if code != 130:
        assert printed == f"hf-robust-clip evaluate: error: {' '.join(str(error).split())}\n"
        for wherever in (["--traceback", *arguments], [*arguments, "--traceback"]):
            with pytest.raises(type(error)):
                main(wherever)


def test_an_error_of_the_network_is_one_line(capsys: Any, monkeypatch: Any) -> None:
    from huggingface_hub.errors import HTTPError

    def fail(args: Any) -> None:
        raise HTTPError("no such\nhost")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    assert main(["evaluate", "model", "--data", "images"]) == 1
    assert capsys.readouterr().err == "hf-robust-clip evaluate: error: no such host\n"


def test_an_error_has_an_end(capsys: Any, monkeypatch: Any) -> None:
    def fail(args: Any) -> None:
        raise RuntimeError("first " + "x" * 5000 + " last")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    assert main(["evaluate", "model", "--data", "images"]) == 1
    printed = capsys.readouterr().err
    assert len(printed) < 650 and "first" in printed and printed.endswith(" last\n")


def test_mistakes_of_the_package_are_not_hidden(monkeypatch: Any) -> None:
    def fail(args: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    with pytest.raises(KeyError):
        main(["evaluate", "model", "--data", "images"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("patch", ("patch", {})),
        ("patch:size=16,place=center", ("patch", {"size": 16, "place": "center"})),
        ("blended:alpha=1e-1, seed=3", ("blended", {"alpha": 0.1, "seed": 3})),
        ("word:word=cf", ("word", {"word": "cf"})),
    ],
)
def test_triggers_are_read(text: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert parse_trigger(text) == expected


@pytest.mark.parametrize("text", ["sticker", "", "patch:size", "patch:=3", "patch:size=", "patch:size=3,"])
def test_triggers_that_do_not_read(text: str, capsys: Any) -> None:
    assert code_of("evaluate", "model", "--data", "images", "--trigger", text) == 2
    assert "--trigger" in capsys.readouterr().err


def test_triggers_are_those_that_there_are() -> None:
    from hf_robust_clip.attacks.triggers import Trigger, trigger_classes

    own = {name: cls for name, cls in trigger_classes().items() if cls.__module__.startswith("hf_robust_clip")}
    assert {name for name, cls in own.items() if issubclass(cls, Trigger)} == set(IMAGE_TRIGGERS)
    assert set(own) == {*IMAGE_TRIGGERS, *TEXT_TRIGGERS}


def test_sources(tmp_path: Path) -> None:
    for source in (str(tmp_path), "name/data", "mnist"):
        check_source("--data", source)
    for source in (str(tmp_path / "none"), "a/b/c", "./data", "data.parquet", "", "~/data"):
        with pytest.raises(UsageError, match="--data"):
            check_source("--data", source)


def test_info(capsys: Any) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*info.DEPENDENCIES, *info.EXTRAS, "Device: cpu"))
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["hf_robust_clip"] == __version__ and found["versions"]["torch"]
    assert found["devices"][-1]["device"] == "cpu"
    assert all(set(extra) == {"installed", "get"} for extra in found["extras"].values())


def test_info_says_what_is_missing(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(info.EXTRAS, "report", (("no-such-package",), "pip install 'hf-robust-clip[report]'"))
    monkeypatch.setattr(info, "DEPENDENCIES", ("no-such-package",))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "missing; to get it: pip install 'hf-robust-clip[report]'" in printed
    assert any(line.split() == ["no-such-package", "missing"] for line in printed.splitlines())


def test_dependencies_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {entry.partition(">")[0].partition("=")[0].lower() for entry in project["dependencies"]}
    assert names <= set(info.DEPENDENCIES)
    report = {entry.partition(">")[0] for entry in project["optional-dependencies"]["report"]}
    assert report <= set(info.EXTRAS["report"][0])
