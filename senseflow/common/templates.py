"""Pages and cards are jinja2 templates that lie beside the module that fills them."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


@cache
def templates(folder: Path) -> Environment:
    """The templates of a folder: `templates(Path(__file__).parent).get_template("page.html")`.

    What goes into a `.html` is escaped unless it is marked safe, into other files never. A name
    that a template uses and nobody gave is an error (`jinja2.UndefinedError`), not an empty place.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["g"] = "{:g}".format  # a number in six digits at most
    return environment
