"""The report as one HTML page: no script, nothing from the network, every picture inside it."""

from dataclasses import dataclass
from html import escape
from typing import Any

import senseflow
from senseflow.evaluate.table import results_table_html
from senseflow.report.curves import draw, number
from senseflow.report.page_pictures import Pictures, samples_html, strips_html
from senseflow.report.page_style import CSS
from senseflow.report.panels import Panel, panels_of
from senseflow.report.run_folder import RunFolder, date, duration
from senseflow.report.settings import Comparison, Setting
from senseflow.report.signals import MIN_ROWS, RULES, Curves, Signal, curves_of, find_signals

LONG = ("teacher", "data")  # facts that need a line of their own on a narrow screen


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
    run = report.run
    curves = curves_of(run.rows)
    signals = find_signals(curves, run.facts())
    sections = [
        ("signals", "Signals", signals_html(signals, curves)),
        ("curves", "Curves", curves_html(run, curves, signals)),
        ("strips", "Strips", strips_html(report.pictures)),
        ("samples", "Samples", samples_html(report.pictures)),
        ("evaluation", "Evaluation", evaluation_html(report.results)),
        ("configuration", "Configuration", configuration_html(report.comparison)),
    ]
    shown = [part for part in sections if part[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in shown)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f"{content}</section>"
        for name, title, content in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_name(run))}: report</title>"
        f'<link rel="icon" href="data:,"><style>{CSS}</style></head><body>'
        f"{head_html(report, signals)}"
        f'<nav aria-label="sections"><ul>{links}</ul></nav><main>{body}</main>'
        f"<footer>Written {date(report.now)} by senseflow {senseflow.__version__}, "
        f"<code>python -m senseflow.report</code>.</footer></body></html>\n"
    )


def _name(run: RunFolder) -> str:
    return run.folder.resolve().name or str(run.folder)


# ------------------------------------------------------------------------------------------ head


def head_html(report: Report, signals: list[Signal]) -> str:
    """Recipe, state, and the facts of the run."""
    run, state = report.run, report.run.state(report.now)
    css = state.name.replace(" ", "-")
    recipe = str(run.config.get("recipe", "recipe not known"))
    num = len(signals)
    found = f'<a href="#signals">{num} warning signal{"s" if num > 1 else ""}</a>' if num else ""
    facts = "".join(
        f'<div class="{"long" if name in LONG else "short"}"><dt>{name}</dt><dd>{value}</dd></div>'
        for name, value in _facts(report)
    )
    notices = "".join(f"<li>{escape(said)}</li>" for said in run.notices)
    return (
        f'<header><p class="eyebrow">{escape(recipe)}</p><h1>{escape(_name(run))}</h1>'
        f'<p><span class="pill {css}">{escape(state.name)}</span>{escape(state.words)}'
        f'{"; " if found else ""}{found}</p><dl class="facts">{facts}</dl>'
        + (f'<ul class="notices">{notices}</ul>' if notices else "")
        + "</header>"
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """Names and HTML of what the head tells; what is not known is left out."""
    run = report.run
    facts = [("iterations", _progress(run)), ("wall time, saves not counted", _training_time(run))]
    if run.starts:
        begun = date(run.starts[0][0])
        again = len(run.starts) - 1
        times = f"; started again {again} time{'s' if again > 1 else ''}" if again else ""
        facts.append(("begun", escape(begun + times)))
    if run.changed_at is not None:
        facts.append(("last written", escape(date(run.changed_at))))
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
            facts.append((name, escape(words)))
    if run.num_unreadable:
        facts.append(("unreadable files", f"{run.num_unreadable}, listed in unreadable.txt"))
    return [(name, value) for name, value in facts if value]


def _progress(run: RunFolder) -> str:
    if not run.planned:
        return f"{run.done} done"
    share = min(1.0, run.done / run.planned)
    return (
        f"{run.done} of {run.planned} ({share:.0%})"
        f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
    )


def _training_time(run: RunFolder) -> str:
    if not run.training_s or not run.done:
        return ""
    each = run.training_s / max(1.0, run.rows[-1]["iteration"])
    words = f"{duration(run.training_s)}, {number(each)} s per iteration"
    left = (run.planned or 0) - run.done
    return words + (f"; {duration(each * left)} to go" if left > 0 else "")


# --------------------------------------------------------------------------------------- signals


def signals_html(signals: list[Signal], curves: Curves) -> str:
    """What the rules found, and what they look for."""
    rows = max((len(curve.values) for curve in curves.values()), default=0)
    short = ""
    if curves and rows < MIN_ROWS:
        short = (
            f'<p class="soft">Rules about a trend need {MIN_ROWS} rows of a measure; this run has '
            f"{rows}: trends are not judged.</p>"
        )
    if signals:
        found = "".join(
            f"<li><b>{escape(signal.rule)}</b>{escape(signal.words)} "
            f'<a href="#{_anchor(signal.curve)}">the curve</a></li>'
            for signal in signals
        )
        said = f'<ul class="signals">{found}</ul>'
    elif not curves:
        said = '<p class="notice">There are no curves to look at yet.</p>'
    elif not short:
        said = f'<p class="none">None of the {len(RULES)} rules found anything suspicious.</p>'
    else:
        said = '<p class="notice">Nothing suspicious in what can be judged.</p>'
    rules = "".join(f"<dt>{r.name}</dt><dd>{escape(r.meaning)}</dd>" for r in RULES)
    return (
        f"{said}{short}<details><summary>What the rules look for</summary>"
        '<p class="soft">They compare the medians of the four quarters of a curve. A signal is a '
        "reason to look, not a verdict; silence is not a proof that all is well.</p>"
        f'<dl class="rules">{rules}</dl></details>'
    )


def _anchor(measure: str) -> str:
    return "curve-" + "".join(c if c.isalnum() else "-" for c in measure)


# ---------------------------------------------------------------------------------------- curves


def curves_html(run: RunFolder, curves: Curves, signals: list[Signal]) -> str:
    """The panels, group by group; "" without rows."""
    if not curves:
        return ""
    warned = {signal.curve for signal in signals}
    parts, group = [], ""
    for panel in panels_of(curves, run.facts()):
        if panel.group != group:
            parts.append("</div>" if group else "")
            parts.append(f'<h3>{escape(panel.group)}</h3><div class="panels">')
            group = panel.group
        parts.append(_panel(panel, warned))
    marked = "; a dashed upright line is a resume" if run.resumed else ""
    return (
        f'<p class="lead">{len(run.rows)} rows of stats.jsonl over {run.done} iterations, each a '
        f"mean since the row before. The strong line is a running median{marked}. Point at a curve "
        "to read it.</p>" + "".join(parts) + "</div>"
    )


def _panel(panel: Panel, warned: set[str]) -> str:
    chart = panel.chart
    caught = [name for name in panel.measures if name in warned]
    see = '<a class="see" href="#signals">warning signal: see above</a>' if caught else ""
    anchors = "".join(f'<span id="{_anchor(name)}"></span>' for name in panel.measures[1:])
    now, legend = "", ""
    if len(chart.curves) == 1:
        (curve,) = chart.curves.values()
        now = f'<span class="now">{number(float(curve.values[-1]))}{chart.unit}</span>'
    else:
        legend = "".join(
            f'<li><svg viewBox="0 0 20 8" aria-hidden="true"><path class="curve c{k}" '
            f'd="M1 4H19"/></svg>{escape(name)} {number(float(curve.values[-1]))}{chart.unit}</li>'
            for k, (name, curve) in enumerate(chart.curves.items())
        )
        legend = f'<ul class="legend">{legend}</ul>'
    return (
        f'<figure class="panel{" warned" if caught else ""}" id="{_anchor(panel.measures[0])}">'
        f'{anchors}<figcaption><span class="name">{escape(chart.title)}{now}</span>'
        f'<p class="about">{escape(chart.about)}</p>{see}</figcaption>{legend}{draw(chart)}'
        "</figure>"
    )


# --------------------------------------------------------------------- evaluation, configuration


def evaluation_html(results: list[dict[str, Any]]) -> str:
    """The table of --results; "" without one."""
    return results_table_html(results) if results else ""


def configuration_html(comparison: Comparison) -> str:
    """config.yaml, section by section; "" where there is none."""
    if not comparison.settings:
        return ""
    sections: dict[str, list[Setting]] = {}
    for setting in comparison.settings:
        sections.setdefault(setting.section, []).append(setting)
    parts = "".join(
        f"<section>{f'<h3>{escape(name)}</h3>' if name else ''}<dl>"
        + "".join(_setting(setting, comparison) for setting in settings)
        + "</dl></section>"
        for name, settings in sections.items()
    )
    return f'{_compared_with(comparison)}<div class="config">{parts}</div>'


def _setting(setting: Setting, comparison: Comparison) -> str:
    other = ""
    if comparison.published and not setting.known:
        other = f"<small>not in {escape(comparison.published.name)}</small>"
    elif comparison.published and setting.published is not None:
        other = f"<small>{escape(comparison.published.name)}: {escape(setting.published)}</small>"
    value = escape(setting.value)
    css, value = (' class="own"', f"<b>{value}</b>") if setting.own else ("", value)
    return f"<div{css}><dt>{escape(setting.key)}</dt><dd>{value}{other}</dd></div>"


def _compared_with(comparison: Comparison) -> str:
    """What the marks mean."""
    published, start = comparison.published, comparison.start
    if not published or not start:
        return '<p class="lead">No published YAML of this recipe was found to compare with.</p>'
    differing = sum(setting.published is not None for setting in comparison.settings)
    own = sum(setting.own for setting in comparison.settings)
    words = f"{differing} of {len(comparison.settings)} values differ from {published.name}"
    if start != published:
        words += f"; {own} of them, marked, also from {start.name}"
    else:
        words += " and are marked"
    return f'<p class="lead">{escape(words)}.</p>'
