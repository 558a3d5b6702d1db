"""Arguments come from the command line, then from the file, then from their defaults; what fits none is named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_robust_clip.cli.flags import prompt
from hf_robust_clip.cli.parsing import ConfigParser


def make_parser(modes: Any = ("one", "two"), **kwargs: Any) -> ConfigParser:
    parser = ConfigParser(prog="test", **kwargs)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--learning-rate", "--learning_rate", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--name")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mode", choices=modes, default="one")
    parser.add_argument("--template", type=prompt, action="append")
    parser.add_argument("--hub_token")
    return parser


def parse(tmp_path: Path, config: object, *flags: str, **kwargs: Any) -> argparse.Namespace:
    path = tmp_path / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return make_parser(**kwargs).parse_args(["--config", str(path), *flags])


def refused(capsys: Any, tmp_path: Path, config: object, *flags: str, **kwargs: Any) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(tmp_path, config, *flags, **kwargs)
    assert exit_.value.code == 2
    error = str(capsys.readouterr().err)
    assert error.startswith("test: error: ") and error.count("\n") == 1
    return error


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = {"steps": 5, "name": "file", "quick": True, "source": "there", "file": "a/b", "template": ["a {}"]}
    args = parse(tmp_path, config, "--name", "flag", "--template", "the {}", "--template", "no {}")
    assert (args.steps, args.name, args.quick, args.source, args.learning_rate) == (5, "flag", True, "there", 0.1)
    assert args.file == Path("a/b") and args.template == ["the {}", "no {}"]
    assert parse(tmp_path, config, "here").source == "here"
    # A flag that says the default still wins.
    assert parse(tmp_path, config, "--steps", "10").steps == 10


def test_without_a_file_it_is_a_plain_parser() -> None:
    args = make_parser().parse_args(["--steps", "3"])
    assert (args.steps, args.mode, args.quick, args.template, args.source) == (3, "one", False, None, None)


@pytest.mark.parametrize("config, value", [("1e-5", 1e-5), ("2", 2), ("'0.5'", 0.5), ("010", 10)])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, config: str, value: float) -> None:
    assert parse(tmp_path, f"learning_rate: {config}").learning_rate == value


@pytest.mark.parametrize("word", ["no", "No", "off", "on", "yes", "true", "007", "1e3", "2024-01-01", "1_000", "1:30"])
def test_a_string_is_what_is_written(tmp_path: Path, word: str) -> None:
    """As on the command line, whatever YAML takes it for; in a list as well."""
    structures = {"name": (dict, list)}
    assert parse(tmp_path, f"name: {word}").name == word
    assert parse(tmp_path, f"name: {word}", structures=structures).name == word
    config = f"name: [{word}, a]\ntemplate: ['{word} {{}}']\nmode: {word}"
    args = parse(tmp_path, config, structures=structures, modes=None)
    assert (args.name, args.template, args.mode) == ([word, "a"], [f"{word} {{}}"], word)


def test_numbers_within_a_mapping_are_numbers(tmp_path: Path) -> None:
    args = parse(tmp_path, "name: {min_lr: 1e-7, b: -1E+3, c: .5e1}", structures={"name": (dict,)})
    assert args.name == {"min_lr": 1e-7, "b": -1000.0, "c": 5.0}


def test_one_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    assert parse(tmp_path, {"template": "a {}"}).template == ["a {}"]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"learning-rate": 1}, "unknown key 'learning-rate'; did you mean 'learning_rate'?"),
        ({"stps": 1}, "unknown key 'stps'; did you mean 'steps'?"),
        ({"config": "x"}, "unknown key 'config'"),
        ({3: "x"}, "unknown key '3'"),
        ({"steps": "many"}, "argument --steps: invalid int value: 'many'"),
        ({"steps": 1.5}, "--steps: invalid int value: '1.5'"),
        ({"steps": True}, "--steps: invalid int value: 'true'"),
        ({"steps": None}, "--steps: it is null; accepted is what the flag takes"),
        ({"learning_rate": "high"}, "--learning_rate: invalid float value: 'high'"),
        ({"quick": "yes please"}, "--quick: it is 'yes please'; accepted is true or false"),
        ({"quick": [True]}, "--quick: it is ['true']; accepted is true or false"),
        ({"name": [3]}, "--name: it is a list; accepted is what the flag takes"),
        ({"name": {"a": 1}}, "--name: it is a dict; accepted is what the flag takes"),
        ({"template": [[1]]}, "--template: it is a list; accepted is what the flag takes"),
        ("steps: 1:30", "--steps: invalid int value: '1:30'"),
        ("learning_rate: 0x10", "--learning_rate: invalid float value: '0x10'"),
        ("name: null\nmode: null", "--mode: it is null"),
        ("quick: maybe", "--quick: it is 'maybe'"),
        ({"template": ["none"]}, "template: 'none' must have exactly one {}"),
        ({"mode": "three"}, "--mode: invalid choice: 'three' (choose from"),
        ("- a\n- b\n", "is a list; accepted is a mapping"),
        ("", "is empty; accepted is a mapping"),
        ("a: [", "is not YAML, line"),
        ("steps: 1\nsteps: 2\n", "a key stands there twice"),
        ("<<: {steps: 1, name: a}", "is not YAML, line 1"),
    ],
)
def test_what_does_not_fit_is_named(capsys: Any, tmp_path: Path, config: object, expected: str) -> None:
    error = refused(capsys, tmp_path, config)
    assert expected in error and "config.yaml" in error


def test_a_file_that_is_not_there(capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--config", str(tmp_path / "none.yaml")])
    assert "none.yaml cannot be read" in capsys.readouterr().err


def test_required_arguments_come_from_either(capsys: Any, tmp_path: Path) -> None:
    required = {"required": ("source", "name")}
    assert parse(tmp_path, {"name": "x"}, "here", **required).source == "here"
    assert "required: SOURCE, --name" in refused(capsys, tmp_path, {"steps": 1}, **required)


def test_unknown_flags_are_named_and_their_values_are_not(capsys: Any, tmp_path: Path) -> None:
    error = refused(capsys, tmp_path, {"steps": 1}, "here", "--hub_tokn", "hf_secret")
    assert "--hub_tokn; did you mean --hub_token?" in error and "hf_secret" not in error
    assert "hf_secret" not in refused(capsys, tmp_path, {"steps": 1}, "--hub_tokn=hf_secret")
    # No abbreviations: another flag may come to have that beginning.
    assert "--step" in refused(capsys, tmp_path, {"steps": 1}, "--step", "4")


@pytest.mark.parametrize("config", ["hub_token: [hf_secret", "hub_token: {a: hf_secret}", "? hub_token\n- hf_secret"])
def test_secrets_are_in_no_error(capsys: Any, tmp_path: Path, config: str) -> None:
    assert "hf_secret" not in refused(capsys, tmp_path, config)


def test_what_is_dumped_is_read_back_as_the_same(tmp_path: Path) -> None:
    config = {
        "learning_rate": 1e-5,
        "template": ["a {}: b", "é {}"],
        "file": "a/b",
        "quick": True,
        "hub_token": "hf_s",
    }
    args = parse(tmp_path, config, "--name", "null", "--learning-rate", "inf")
    text = args.parser.dump(args)
    assert "hf_s" not in text and text.startswith("# hub_token is given, and left out here\n")
    again = parse(tmp_path, text)
    assert again.parser.resolved(again) == args.parser.resolved(args)
    assert vars(again) | {"parser": None, "config": None, "hub_token": None} == vars(args) | {
        "parser": None,
        "config": None,
        "hub_token": None,
    }
