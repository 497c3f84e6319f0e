"""`evaluate table`: results in one table, as Markdown, HTML and JSON, beside the published ones.

Values that were not measured in the same way say so: each way has its footnote.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from senseflow.common.files import write_whole
from senseflow.evaluate.comparison import PUBLISHED, compare
from senseflow.evaluate.entries import Result, check_result, merge, read_results
from senseflow.evaluate.official import read_geneval, read_t2i_compbench
from senseflow.evaluate.rendering import html_fragment, html_page, markdown
from senseflow.sampling.cli import check_output

logger = logging.getLogger(__name__)


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
