"""
What the documentation takes from the code and the results at each build, so that it cannot go stale: the public names
with their sources, the tables of arguments, and the tables and plots of what was measured.

mkdocs calls `on_files` and `on_page_markdown`. In a page, a comment asks for a part:

    <!-- names: attacks -->                            public names that are defined in a part of the package
    <!-- functions: losses -->                         functions and classes of a module
    <!-- arguments: CleanCLIPTrainingArguments -->     what a class of arguments adds to the class that it derives from
    <!-- file: benchmarks/results/checks/*.md -->      Markdown files

Pictures of `../benchmarks/results`, which the pages show where they are read as files, are found there too.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import hf_robust_clip
from hf_robust_clip.arguments import own_fields
from hf_robust_clip.defences import LINES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_robust_clip"
RESULTS = ROOT / "benchmarks" / "results"
#: Modules that the reference lists in addition to the public names.
MODULES = ("losses", "data.loading", "evaluation.metrics", "record")
#: Longer than any fence within a source.
_FENCE = "`" * 6
_PART = re.compile(r"^<!-- (names|functions|arguments|file): (\S+) -->$", re.MULTILINE)
_PLOT = re.compile(r"\]\(\.\./benchmarks/results/(\w+)/(\w+\.png)\)")
_REFERENCE = re.compile(r"\[`~?(?:\w+\.)*(\w+)`\]")


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each source that the reference points to, and the plots of the results."""
    modules = {PACKAGE / path_of(module) for module in (*hf_robust_clip._PUBLIC.values(), *MODULES)}
    for path in sorted(modules):
        files.append(File.generated(config, source_page(path), content=source_text(path)))
    for plot in sorted(RESULTS.glob("*/*.png")):
        name = f"images/{plot.parent.name}-{plot.name}"
        files.append(File.generated(config, name, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in the parts that a page asks for."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    parts = {"names": names_list, "functions": functions_list, "arguments": arguments_table, "file": file_texts}
    markdown = _PART.sub(lambda match: parts[match[1]](match[2]), markdown)
    return _PLOT.sub(r"](images/\1-\2)", markdown)


def names_list(part: str) -> str:
    """
    Public names with what they are, and links to their sources.

    Args:
        part (`str`): A part of the package, such as `attacks`; `other` for all that the page names nowhere else.
    """
    parts = ("trainers", "attacks", "evaluation")
    modules = {
        name: module
        for name, module in hf_robust_clip._PUBLIC.items()
        if name != module  # a module has a section of its own
        and (module.partition(".")[0] == part if part in parts else module.partition(".")[0] not in parts)
    }
    if not modules:
        raise ValueError(f"no public name is defined in {part!r}")
    return "\n".join(entry(*defined(name, module), name) for name, module in modules.items())


def defined(name: str, module: str) -> tuple[str, Any]:
    """The module that defines a public name, and the definition; of a trainer made for a defence, the defence's."""
    found = definitions(PACKAGE / path_of(module))
    if name not in found:
        name = name.removesuffix("Trainer")
        module = next(f"defences.{file}" for file, (cls, _) in LINES.items() if cls == name)
        found = definitions(PACKAGE / path_of(module))
    return module, found[name]


def functions_list(module: str) -> str:
    """The functions and classes of a module, with links to their sources."""
    if module not in MODULES:
        raise ValueError(f"{module!r} is not among the modules {MODULES}, whose sources are there to link to")
    found = definitions(PACKAGE / path_of(module)).values()
    return "\n".join(entry(module, node) for node in found if not node.name.startswith("_"))


def entry(module: str, node: Any, name: str = "") -> str:
    """A definition: its name, or `name`, linked to its line, and the first paragraph of its docstring."""
    text = (ast.get_docstring(node) or "").partition("\n\n")[0]
    if not text:
        raise ValueError(f"{node.name} in {module} has no docstring")
    where = f"{source_page(PACKAGE / path_of(module))}#{node.name}"
    return f"- [`{name or node.name}`]({where}): {prose(text).rstrip('.:')}."


def arguments_table(name: str) -> str:
    """The arguments that a class of arguments has beyond those of `CLIPTrainingArguments`, or that one's own."""
    cls = getattr(hf_robust_clip, name)
    base = hf_robust_clip.CLIPTrainingArguments
    stop = base.__base__ if cls is base else base
    described = documented(ast.get_docstring(definitions(PACKAGE / path_of(hf_robust_clip._PUBLIC[name]))[name]) or "")
    rows = ["| argument | default | what it is |", "|---|---|---|"]
    inherited = {field.name for field in dataclasses.fields(stop)}
    # What is new first, then what only has another default.
    for field in sorted(own_fields(cls, stop), key=lambda field: field.name in inherited):
        text = described.get(field.name) or field.metadata["help"]
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        rows.append(f"| `{field.name}` | `{default}` | {prose(text).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def documented(docstring: str) -> dict[str, str]:
    """What the section `Args` of a docstring says of each argument."""
    section = docstring.partition("Args:\n")[2]
    entries = re.findall(r"^ {4}(\w+) \(.*?\): (.*?)(?=^ {4}\w|\Z)", section, re.MULTILINE | re.DOTALL)
    return dict(entries)


def prose(text: str) -> str:
    """A docstring's text as one line of Markdown."""
    return " ".join(_REFERENCE.sub(r"`\1`", text).split())


def file_texts(pattern: str) -> str:
    """The Markdown files of the repository that a pattern names, one after the other."""
    found = sorted(ROOT.glob(pattern))
    if not found:
        raise ValueError(f"no file is {pattern!r}")
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in found)


def definitions(path: Path) -> dict[str, Any]:
    """The functions and classes of a module, by name."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def path_of(module: str) -> Path:
    """The file of a module of the package."""
    return Path(*module.split(".")).with_suffix(".py")


def source_page(path: Path) -> str:
    """The page that shows a source."""
    return str(Path("source") / path.relative_to(PACKAGE).with_suffix(".md"))


def source_text(path: Path) -> str:
    """A page with a source and its numbered lines, under a heading for each public function and class."""
    title = path.relative_to(ROOT).as_posix()
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = {1: f"# `{title}`"}
    for node in definitions(path).values():
        if not node.name.startswith("_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            starts[first] = f"## `{node.name}` {{#{node.name}}}"
    parts = [f"---\ntitle: {title}\nsearch: {{exclude: true}}\n---"]
    for (first, heading), after in zip(starts.items(), [*list(starts)[1:], len(lines) + 1], strict=True):
        code = "\n".join(lines[first - 1 : after - 1]).rstrip()
        parts.append(f'{heading}\n\n{_FENCE}python linenums="{first}"\n{code}\n{_FENCE}')
    return "\n\n".join(parts) + "\n"
