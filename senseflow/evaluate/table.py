"""`evaluate table`: results in one table, as Markdown, HTML and JSON, beside the published ones.

Values that were not measured in the same way say so: each way has its footnote.
"""

import argparse
import html
import json
import logging
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.common.files import write_whole
from senseflow.evaluate.layouts import CATEGORIES, GENEVAL_TASKS
from senseflow.evaluate.official import read_geneval, read_t2i_compbench
from senseflow.evaluate.results import Result, check_result, merge, protocol, read_results
from senseflow.sampling.cli import check_output

logger = logging.getLogger(__name__)

UP, DOWN = "\u2191", "\u2193"  # which way is better
PUBLISHED_MARK = "\u2020"
_PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
PUBLISHED: tuple[str, ...] = tuple(_PUBLISHED["groups"])


@dataclass(frozen=True)
class Column:
    """A metric in the table: how its column is headed and its numbers written."""

    title: str
    better: str
    digits: int


METRICS = {
    "fid_t": Column("FID-T", DOWN, 2),
    "patch_fid_t": Column("Patch FID-T", DOWN, 2),
    "clip": Column("CLIP", UP, 4),
    "hps": Column("HPSv2 (version not stated)", UP, 4),
    "hps_v2.1": Column("HPSv2.1", UP, 4),
    "hps_v2": Column("HPSv2.0", UP, 4),
    "pick_score": Column("PickScore", UP, 2),
    "image_reward": Column("ImageReward", UP, 4),
    "diversity_lpips": Column("Diversity, LPIPS", UP, 4),
    "diversity_clip": Column("Diversity, CLIP", UP, 4),
    "diversity_dinov2": Column("Diversity, DINOv2", UP, 4),
    "geneval": Column("GenEval", UP, 4),
    **{f"geneval_{t}": Column(f"GenEval {t.replace('_', ' ')}", UP, 4) for t in GENEVAL_TASKS},
    **{
        f"t2i_compbench_{c}": Column(f"T2I-CompBench {c.replace('_', '-')}", UP, 4)
        for c in CATEGORIES
    },
}


@dataclass(frozen=True)
class Marked:
    """A text with the marks of its footnotes."""

    text: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A method; a cell has as many values as ways it was measured in, none when it was not."""

    name: Marked
    cells: list[list[Marked]]


@dataclass(frozen=True)
class Section:
    """Rows under one title."""

    title: str
    rows: list[Row]
    published: bool = False


@dataclass(frozen=True)
class Table:
    """Everything to be said, for any way of writing it."""

    columns: list[Marked]  # title, and on a line of its own N
    sections: list[Section]
    notes: list[Marked]  # a footnote's text and its mark


class Footnotes:
    """Footnotes in the order they were first needed, marked a, b, ... z, aa, ..."""

    def __init__(self) -> None:
        self.notes: dict[str, Marked] = {}

    def of_protocol(self, entry: Result) -> str:
        """The mark of how a result was measured, the same for all that were measured alike."""
        return self._mark(protocol(entry), describe(entry))

    def of_text(self, text: str) -> str:
        """The mark of a remark."""
        return self._mark(text, text)

    def _mark(self, key: str, text: str) -> str:
        if key not in self.notes:
            more, letter = divmod(len(self.notes), 26)
            first = string.ascii_lowercase[more - 1] if more else ""
            self.notes[key] = Marked(text, (first + string.ascii_lowercase[letter],))
        return self.notes[key].marks[0]


def compare(results: Sequence[Result], published: Sequence[str] = ()) -> Table:
    """Merged results, a row for each name, then the published rows of `published`.

    Where all of a column was measured in one way its head has the footnote, else each value has.
    """
    notes = Footnotes()
    named = {name: _PUBLISHED["groups"][name] for name in published}
    columns = _columns(results, bool(named))
    heads, alike = [], set()
    for metric in columns:
        own = [entry for entry in results if entry["metric"] == metric]
        if len({protocol(entry) for entry in own}) == 1:
            alike.add(metric)
        heads.append(_head(metric, own, notes if metric in alike else None))
    names = list(dict.fromkeys(entry["name"] for entry in results))
    rows = [Row(Marked(n), [_cell(results, n, m, alike, notes) for m in columns]) for n in names]
    sections = [Section("Measured here", rows)] if rows else []
    for group in named.values():
        sections.append(Section(f"Published: {group['title']}", _group(group, columns), True))
    listed = list(notes.notes.values())
    if named:
        source = f"published, not measured here: {_PUBLISHED['source']}; {_PUBLISHED['protocol']}"
        listed.append(Marked(source, (PUBLISHED_MARK,)))
    return Table(heads, sections, listed)


def _columns(results: Sequence[Result], published: bool) -> list[str]:
    found = {entry["metric"] for entry in results}
    if published:
        found |= set(_PUBLISHED["metrics"])
    known = [metric for metric in METRICS if metric in found]
    return [*known, *sorted(found - set(METRICS))]


def _head(metric: str, own: list[Result], notes: Footnotes | None) -> Marked:
    """The column's title with N: the images measured here."""
    known = METRICS.get(metric)
    title = f"{known.title} {known.better}" if known else metric
    numbers = sorted({entry["num_images"] for entry in own})
    if numbers:
        title += f"\nN = {', '.join(map(str, numbers))}"
    return Marked(title, (notes.of_protocol(own[0]),) if notes else ())


def title_of(metric: str) -> str:
    """How a metric's column is headed; one that is not known here, by its own name."""
    return METRICS[metric].title if metric in METRICS else metric


def _cell(
    results: Sequence[Result], name: str, metric: str, alike: set[str], notes: Footnotes
) -> list[Marked]:
    values = []
    for entry in results:
        if (entry["name"], entry["metric"]) == (name, metric):
            marks = [] if metric in alike else [notes.of_protocol(entry)]
            marks += [notes.of_text(str(text)) for text in entry["notes"]]
            values.append(Marked(_number(metric, entry["value"]), tuple(marks)))
    return values


def _number(metric: str, value: float) -> str:
    return f"{value:z.{METRICS[metric].digits if metric in METRICS else 4}f}"


def _group(group: dict[str, Any], columns: list[str]) -> list[Row]:
    rows = []
    for name, nfe, *values in group["rows"]:
        given = dict(zip(_PUBLISHED["metrics"], values, strict=True))
        cells = [
            [] if given.get(metric) is None else [Marked(_number(metric, given[metric]))]
            for metric in columns
        ]
        rows.append(Row(Marked(f"{name}, {nfe} NFE", (PUBLISHED_MARK,)), cells))
    return rows


def describe(entry: Result) -> str:
    """How a value was measured, in words: all that `protocol` compares."""
    prompts = f" of {entry['num_prompts']} prompts" if entry["num_prompts"] else ""
    size = f" of {entry['image_size']} pixels" if "image_size" in entry else ""
    said = [f"N = {entry['num_images']} images{size}{prompts}"]
    if entry["model"]:
        said.append(f"model {entry['model']}")
    for item in entry["weights"]:
        said.append(f"weights {Path(item['file']).name} (sha256 {item['sha256'][:16]})")
    if entry["preprocessing"]:
        said.append(f"preprocessing {entry['preprocessing']}")
    digest = entry.get("reference_digest")
    if entry["reference"] or digest:
        known = f" (digest {digest[:16]})" if digest else ""
        said.append(f"against {entry['reference'] or 'a reference'}{known}")
    settings = [f"{key} {json.dumps(value)}" for key, value in entry["settings"].items()]
    versions = [f"{package} {version}" for package, version in entry["versions"].items()]
    said += [", ".join(words) for words in (settings, versions) if words]
    return "; ".join(said)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `table`."""
    parser.epilog = (
        "example: %(prog)s evaluation/results.json --geneval student_4_x0 geneval/results.jsonl "
        "--output_dir evaluation"
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="FILE", help="what `score` wrote")
    parser.add_argument(
        "--geneval", nargs=2, action="append", default=[], metavar=("NAME", "FILE"),
        help="row and results.jsonl of GenEval's evaluate_images.py; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--t2i_compbench", nargs=2, action="append", default=[], metavar=("NAME", "DIR"),
        help="row and folder of `generate --layout t2i_compbench` with T2I-CompBench's "
        "vqa_result.json files in it; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--published", nargs="+", choices=(*PUBLISHED, "all", "none"), default=["all"],
        help="whose published rows stand beside ours (all)",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR",
        help="gets table.md, table.html and table.json (all results merged)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Read, merge and write; raises ValueError for files that are not what they should be."""
    if not (args.results or args.geneval or args.t2i_compbench):
        raise ValueError("no results: name files of `score`, --geneval or --t2i_compbench")
    if "none" in args.published and len(args.published) > 1:
        raise ValueError("--published none excludes the others")
    check_output(args.output_dir)
    results = [entry for file in args.results for entry in read_results(file)]
    for name, file in args.geneval:
        results += read_geneval(name, Path(file))
    for name, folder in args.t2i_compbench:
        results += read_t2i_compbench(name, Path(folder))
    results = merge(results)
    table = compare(results, _groups(args.published))
    files = {
        "table.json": json.dumps(results, indent=2, ensure_ascii=False) + "\n",
        "table.md": markdown(table),
        "table.html": html_page(table),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(args.output_dir / name, text)
    logger.info("%d results in %s", len(results), args.output_dir / "table.{md,html,json}")


def _groups(published: list[str]) -> list[str]:
    if "all" in published:
        return list(PUBLISHED)
    return [name for name in PUBLISHED if name in published]


def results_table_html(results: Sequence[Result], published: Sequence[str] = ()) -> str:
    """The table as a fragment of HTML with its style, for a page of its own or a report.

    results: entries of results files. published: whose published rows stand beside them, of
    "sdxl", "sd35" and "flux". Raises ValueError as `check_result` and `merge` do.
    """
    whole = [check_result(entry, f"result {number}") for number, entry in enumerate(results)]
    return html_fragment(compare(merge(whole), published))
