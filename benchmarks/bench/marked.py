"""Tables in a page that a benchmark writes, between two lines of their own."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def table_marks(name: str, script: str) -> tuple[str, str]:
    """The lines around a table of that name that `benchmarks/SCRIPT` writes."""
    return f"<!-- {name} table: benchmarks/{script} -->\n", f"<!-- end of the {name} table -->\n"


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """
    Replace what a page has between two marks.

    Raises:
        `ValueError`: If the page has no such marks.
    """
    begin, end = marks
    content = page.read_text()
    if begin not in content or end not in content:
        raise ValueError(f"{page.name} has no place for the table: it needs the lines {begin!r} and {end!r}")
    page.write_text(content.split(begin)[0] + begin + text + end + content.split(end)[1])


def markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table as Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ("---",) * len(heads), *rows))
