"""`evaluate table`: results in one table, as Markdown, HTML and JSON, beside the published ones.

Values that were not measured in the same way say so: each way has its footnote.
"""

import argparse
import json
import logging
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.common.commands import path_given
from senseflow.common.files import require_writable, write_whole
from senseflow.common.templates import templates
from senseflow.distill.scorers.metric import Column
from senseflow.evaluate import official
from senseflow.evaluate.metrics import specs
from senseflow.evaluate.results import Result, check_result, merge, protocol, read_results

logger = logging.getLogger(__name__)

PUBLISHED_MARK = "\u2020"
_PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
PUBLISHED: tuple[str, ...] = tuple(_PUBLISHED["groups"])
_TEMPLATES = templates(Path(__file__).parent)


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


def make_table(
    files: list[Path],
    geneval: list[tuple[str, str]],
    t2i_compbench: list[tuple[str, str]],
    whose: list[str],
    folder: Path,
) -> None:
    """Read, merge and write; raises ValueError for files that are not what they should be.

    files: of `score`. geneval, t2i_compbench: rows and what their programs wrote. whose: published
    rows, "all" or "none". folder: gets the table.
    """
    if not (files or geneval or t2i_compbench):
        raise ValueError("no results: name files of `score`, --geneval or --t2i_compbench")
    if "none" in whose and len(whose) > 1:
        raise ValueError("--published none excludes the others")
    require_writable("--output_dir", folder)
    results = [entry for file in files for entry in read_results(file)]
    for name, file in geneval:
        results += official.read_geneval(name, path_given("--geneval", file))
    for name, place in t2i_compbench:
        results += official.read_t2i_compbench(name, path_given("--t2i_compbench", place))
    results = merge(results)
    table = compare(results, [name for name in PUBLISHED if "all" in whose or name in whose])
    page = _TEMPLATES.get_template("page.html").render(table=table)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "table.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "table.md", markdown(table))
    write_whole(folder / "table.html", page)
    logger.info("%d results in %s", len(results), folder / "table.{md,html,json}")


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


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, the footnotes below."""
    return _TEMPLATES.get_template("table.md.j2").render(table=table, plain=_plain)


def _plain(text: str) -> str:
    """Nothing in the text means anything to Markdown; its lines end with <br>."""
    return "<br>".join(re.sub(r"([\\`*_\[\]|<>&~])", r"\\\1", s) for s in text.splitlines())


def results_table_html(results: Sequence[Result], published: Sequence[str] = ()) -> str:
    """The table as a fragment of HTML with its style, for a page of its own or a report.

    results: entries of results files. published: whose published rows stand beside them, of
    "sdxl", "sd35" and "flux". Raises ValueError as `check_result` and `merge` do.
    """
    whole = [check_result(entry, f"result {number}") for number, entry in enumerate(results)]
    return _TEMPLATES.get_template("table.html").render(table=compare(merge(whole), published))


def columns() -> dict[str, Column]:
    """The columns known here by their metrics, in order: ours, then the benchmarks'."""
    own = [column for spec in specs.METRICS for column in (spec.published, spec.column) if column]
    return {column.metric: column for column in (*own, *official.COLUMNS)}


def column_of(metric: str) -> Column:
    """How a metric is headed and written; one that is not known here, by its own name."""
    return columns().get(metric) or Column(metric, metric, better="")


def compare(results: Sequence[Result], published: Sequence[str] = ()) -> Table:
    """Merged results, a row for each name, then the published rows of `published`.

    Where all of a column was measured in one way its head has the footnote, else each value has.
    """
    notes: dict[str, Marked] = {}
    named = [_PUBLISHED["groups"][name] for name in published]
    metrics = _metrics(results, bool(named))
    heads, alike = [], set()
    for metric in metrics:
        own = [entry for entry in results if entry["metric"] == metric]
        if len({protocol(entry) for entry in own}) == 1:
            alike.add(metric)
        heads.append(_head(metric, own, notes if metric in alike else None))
    names = list(dict.fromkeys(entry["name"] for entry in results))
    rows = [Row(Marked(n), [_cell(results, n, m, alike, notes) for m in metrics]) for n in names]
    sections = [Section("Measured here", rows)] if rows else []
    for group in named:
        sections.append(Section(f"Published: {group['title']}", _group(group, metrics), True))
    listed = list(notes.values())
    if named:
        source = f"published, not measured here: {_PUBLISHED['source']}; {_PUBLISHED['protocol']}"
        listed.append(Marked(source, (PUBLISHED_MARK,)))
    return Table(heads, sections, listed)


def _metrics(results: Sequence[Result], published: bool) -> list[str]:
    """Those that have a column, in its order; what is not known here stands last."""
    found = {entry["metric"] for entry in results}
    if published:
        found |= set(_PUBLISHED["metrics"])
    known = [metric for metric in columns() if metric in found]
    return [*known, *sorted(found - set(known))]


def _mark(notes: dict[str, Marked], text: str, key: str) -> str:
    """The mark of a footnote: a, b, ... z, aa, ..., in the order they were first needed."""
    if key not in notes:
        more, letter = divmod(len(notes), 26)
        first = string.ascii_lowercase[more - 1] if more else ""
        notes[key] = Marked(text, (first + string.ascii_lowercase[letter],))
    return notes[key].marks[0]


def _head(metric: str, own: list[Result], notes: dict[str, Marked] | None) -> Marked:
    """The column's title with N, the images measured here, and how: all alike, where `notes`."""
    column = column_of(metric)
    title = f"{column.title} {column.better}".rstrip()
    numbers = sorted({entry["num_images"] for entry in own})
    if numbers:
        title += f"\nN = {', '.join(map(str, numbers))}"
    return Marked(
        title, (_mark(notes, describe(own[0]), protocol(own[0])),) if notes is not None else ()
    )


def _cell(
    results: Sequence[Result], name: str, metric: str, alike: set[str], notes: dict[str, Marked]
) -> list[Marked]:
    values = []
    for entry in results:
        if (entry["name"], entry["metric"]) == (name, metric):
            marks = [] if metric in alike else [_mark(notes, describe(entry), protocol(entry))]
            marks += [_mark(notes, str(text), str(text)) for text in entry["notes"]]
            values.append(Marked(_number(metric, entry["value"]), tuple(marks)))
    return values


def _number(metric: str, value: float) -> str:
    return f"{value:z.{column_of(metric).digits}f}"  # z: a rounded -0.00 has no sign


def _group(group: dict[str, Any], metrics: list[str]) -> list[Row]:
    rows = []
    for name, nfe, *values in group["rows"]:
        given = dict(zip(_PUBLISHED["metrics"], values, strict=True))
        cells = [
            [] if given.get(metric) is None else [Marked(_number(metric, given[metric]))]
            for metric in metrics
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
