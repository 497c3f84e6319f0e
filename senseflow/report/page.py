"""The report as one HTML page: no script, nothing from the network, every picture inside it.

`page.html` says what stands where, `report.css` how it looks; here is what they are filled with.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

import senseflow
from senseflow.common.templates import templates
from senseflow.evaluate.table import results_table_html
from senseflow.report.curves import Chart, charts_of, draw, number
from senseflow.report.pictures import Pictures
from senseflow.report.run_folder import RunFolder, counted, date, duration
from senseflow.report.settings import Comparison, Setting
from senseflow.report.signals import MIN_ROWS, RULES, curves_of, find_signals


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    run: RunFolder
    comparison: Comparison
    pictures: Pictures
    results: list[dict[str, Any]]
    now: float  # Unix time


def page(report: Report) -> str:
    """The whole page."""
    run, comparison = report.run, report.comparison
    curves = curves_of(run.rows)
    signals = find_signals(curves, run.facts())
    sections = {
        "Signals": True,
        "Curves": bool(curves),
        "Strips": True,
        "Samples": bool(report.pictures.columns),
        "Evaluation": bool(report.results),
        "Configuration": bool(comparison.settings),
    }
    charts = groupby(charts_of(curves, run.facts()), lambda chart: chart.group)
    return (
        templates(Path(__file__).parent)
        .get_template("page.html")
        .render(
            name=run.folder.resolve().name or str(run.folder),
            recipe=str(run.config.get("recipe", "recipe not known")),
            run=run,
            state=run.state(report.now),
            facts=_facts(run),
            share=min(1.0, run.done / run.planned) if run.planned else None,
            sections=[title for title, shown in sections.items() if shown],
            signals=signals,
            rules=RULES,
            min_rows=MIN_ROWS,
            num_rows=max((len(curve.values) for curve in curves.values()), default=0),
            warned={signal.curve for signal in signals},
            groups=[(group, list(found)) for group, found in charts],
            pictures=report.pictures,
            results=Markup(results_table_html(report.results)) if report.results else "",
            compared_with=_compared_with(comparison),
            published=comparison.published,
            configuration=_by_section(comparison.settings),
            written=date(report.now),
            version=senseflow.__version__,
            anchor=_anchor,
            draw=draw,
            counted=counted,
            latest=_latest,
        )
    )


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """Names and words of what the head tells; what is not known is left out."""
    of = f" of {run.planned} ({min(1.0, run.done / run.planned):.0%})" if run.planned else " done"
    facts = [("iterations", f"{run.done}{of}"), ("wall time, saves not counted", _wall_time(run))]
    if run.starts:
        again = len(run.starts) - 1
        times = f"; started again {again} time{'s' if again > 1 else ''}" if again else ""
        facts.append(("begun", date(run.starts[0][0]) + times))
    if run.changed_at is not None:
        facts.append(("last written", date(run.changed_at)))
    if run.saved is not None:
        facts.append(("newest checkpoint", f"iteration {run.saved}"))
    for name, section, key in (
        ("teacher", "paths", "pretrained_model"),
        ("data", "paths", "dataset"),
        ("batch", "train", "batch_size"),
        ("resolution", "train", "resolution"),
    ):
        value = run.setting(section, key)
        if value is not None:
            words = " × ".join(map(str, value)) if isinstance(value, list) else str(value)
            facts.append((name, words))
    if run.num_unreadable:
        facts.append(("unreadable files", f"{run.num_unreadable}, listed in unreadable.txt"))
    return [(name, words) for name, words in facts if words]


def _wall_time(run: RunFolder) -> str:
    if not run.training_s or not run.done:
        return ""
    each = run.training_s / max(1.0, run.rows[-1]["iteration"])
    words = f"{duration(run.training_s)}, {number(each)} s per iteration"
    left = (run.planned or 0) - run.done
    return words + (f"; {duration(each * left)} to go" if left > 0 else "")


def _latest(chart: Chart, name: str) -> str:
    return f"{number(float(chart.curves[name].values[-1]))}{chart.unit}"


def _anchor(measure: str) -> str:
    return "curve-" + "".join(c if c.isalnum() else "-" for c in measure)


def _by_section(settings: list[Setting]) -> dict[str, list[Setting]]:
    sections: dict[str, list[Setting]] = {}
    for setting in settings:
        sections.setdefault(setting.section, []).append(setting)
    return sections


def _compared_with(comparison: Comparison) -> str:
    """What the marks mean."""
    published, start = comparison.published, comparison.start
    if not published or not start:
        return "No published YAML of this recipe was found to compare with."
    differing = sum(setting.published is not None for setting in comparison.settings)
    own = sum(setting.own for setting in comparison.settings)
    words = f"{differing} of {len(comparison.settings)} values differ from {published.name}"
    if start == published:
        return f"{words} and are marked."
    return f"{words}; {own} of them, marked, also from {start.name}."
