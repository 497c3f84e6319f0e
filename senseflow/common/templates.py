"""Pages, cards and reports: jinja2 templates beside the modules that fill them, Markdown tables."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


@cache
def templates(folder: Path) -> Environment:
    """The templates of a folder: `templates(Path(__file__).parent).get_template("page.html")`.

    What goes into a `.html` is escaped unless it is marked safe, into other files never. A name
    that a template uses and nobody gave is an error (`jinja2.UndefinedError`), not an empty place.
    All know `table(heads, rows)` for Markdown, and the filter `g`: a number in six digits at most.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["g"] = "{:g}".format
    environment.globals["table"] = markdown_table
    return environment


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown with a line break at its end; cells are one line of Markdown."""
    head, *lines = (
        "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (heads, *rows)
    )
    return "\n".join([head, "|---" * len(heads) + "|", *lines]) + "\n"
