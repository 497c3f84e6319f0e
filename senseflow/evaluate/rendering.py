"""A table of results as Markdown and as HTML that needs no other file."""

import html
import re

from senseflow.evaluate.comparison import Marked, Row, Section, Table

MISSING = "\u2013"
STYLE = """
.results-table { color: #1c1c1c; background: #fff; font: 15px/1.4 system-ui, sans-serif; }
.results-table .wide { overflow-x: auto; }
.results-table table { border-collapse: collapse; }
.results-table th, .results-table td { padding: 5px 11px; text-align: right;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid #e3e3e3; }
.results-table thead th { vertical-align: bottom; border-bottom: 2px solid #555;
  min-width: 4.6em; max-width: 8em; }
.results-table tr > :first-child { text-align: left; position: sticky; left: 0;
  background: #fff; min-width: 8.5em; overflow-wrap: anywhere; }
.results-table td { white-space: nowrap; }
.results-table th { font-weight: 600; }
.results-table tbody th { font-weight: 400; }
.results-table .title th { text-align: left; font-weight: 600; padding-top: 14px; }
.results-table .title span { position: sticky; left: 11px; }
.results-table .published :is(th, td) { color: #5a5a5a; font-style: italic; background: #f6f6f4; }
.results-table .published .title :is(th, td) { font-style: normal; }
.results-table dl { font-size: 13px; color: #444; max-width: 72em; }
.results-table dt { float: left; clear: left; width: 2em; font-weight: 600; }
.results-table dd { margin: 0 0 4px 2em; overflow-wrap: anywhere; }
"""


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, the footnotes below."""
    lines = [
        "| method | " + " | ".join(_md(head) for head in table.columns) + " |",
        "|---" + "|---:" * len(table.columns) + "|",
    ]
    for section in table.sections:
        lines.append(f"| **{_plain(section.title)}** |" + " |" * len(table.columns))
        for row in section.rows:
            cells = [" / ".join(_md(value) for value in cell) or MISSING for cell in row.cells]
            lines.append(f"| {_md(row.name)} | " + " | ".join(cells) + " |")
    notes = [f"- <sup>{note.marks[0]}</sup> {_plain(note.text)}" for note in table.notes]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _md(marked: Marked) -> str:
    marks = f"<sup>{','.join(marked.marks)}</sup>" if marked.marks else ""
    return _plain(marked.text) + marks


def _plain(text: str) -> str:
    """Nothing in the text means anything to Markdown; its lines end with <br>."""
    return "<br>".join(re.sub(r"([\\`*_\[\]|<>&~])", r"\\\1", s) for s in text.splitlines())


def html_fragment(table: Table) -> str:
    """The table in a section with its own style; no script, no other file."""
    heads = "".join(f'<th scope="col">{_html(head)}</th>' for head in table.columns)
    bodies = "".join(_body(section, len(table.columns)) for section in table.sections)
    notes = "".join(
        f"<dt>{note.marks[0]}</dt><dd>{html.escape(note.text)}</dd>" for note in table.notes
    )
    return (
        f'<section class="results-table"><style>{STYLE}</style>\n'
        f'<div class="wide" tabindex="0" role="region" aria-label="results"><table>\n'
        f'<thead><tr><th scope="col">method</th>{heads}</tr></thead>\n'
        f"{bodies}</table></div>\n<dl>{notes}</dl></section>\n"
    )


def _body(section: Section, num_columns: int) -> str:
    kind = ' class="published"' if section.published else ""
    title = f"<span>{html.escape(section.title)}</span>"
    rows = "".join(_row(row) for row in section.rows)
    return (
        f'<tbody{kind}><tr class="title"><th scope="rowgroup" colspan="{num_columns + 1}">{title}'
        f"</th></tr>\n{rows}</tbody>\n"
    )


def _row(row: Row) -> str:
    cells = ["<br>".join(_html(value) for value in cell) or MISSING for cell in row.cells]
    values = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{_html(row.name)}</th>{values}</tr>\n'


def _html(marked: Marked) -> str:
    marks = f"<sup>{','.join(marked.marks)}</sup>" if marked.marks else ""
    return html.escape(marked.text).replace("\n", "<br>") + marks


def html_page(table: Table) -> str:
    """The table as a page of its own."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Results</title>\n"
        "<style>body { margin: 16px; background: #fff; font-family: system-ui, sans-serif; }"
        "</style></head>\n"
        f"<body><h1>Results</h1>\n{html_fragment(table)}</body></html>\n"
    )
