"""What the trials of a study found: tables in Markdown, curves and pictures, over seeds."""

import json
import statistics
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image

from senseflow.common.files import write_whole
from senseflow.common.pictures import save_whole
from senseflow.common.templates import markdown_table
from senseflow.sampling.drawing import CPS
from senseflow.tiny.ablate.study import Place, Study, Trial
from senseflow.tiny.ablate.trial import CURVE_STEPS, NUM_STEPS, STRIP, teacher_rows
from senseflow.tiny.families import TEACHER_STEPS
from senseflow.tiny.measure import labelled_rows


@dataclass(frozen=True)
class Findings:
    """The results that are there, by table, teacher, row and seed."""

    study: Study
    results: dict[Place, dict[str, Any]]
    teachers: dict[str, dict[str, dict[str, float]]]  # what teachers measure, by label
    places: dict[Place, Trial]
    output: Path

    @classmethod
    def read(cls, study: Study, places: dict[Place, Trial], output: Path) -> "Findings":
        """What the trials of a study have measured so far."""
        results, teachers = {}, {}
        for place, trial in places.items():
            file = trial.folder(output) / "result.json"
            if file.is_file():
                results[place] = json.loads(file.read_text())
            rows = teacher_rows(trial, output)
            if rows.is_file() and trial.teacher not in teachers:
                teachers[trial.teacher] = json.loads(rows.read_text())
        return cls(study, results, teachers, places, output)

    def of_row(self, table: str, teacher: str, row: str) -> list[dict[str, Any]]:
        """The results of one row, over seeds."""
        places = [(table, teacher, row, seed) for seed in self.study.seeds]
        return [self.results[place] for place in places if place in self.results]

    def curves_of(self, table: str, teacher: str, row: str) -> list[dict[int, float]]:
        """FID-T at 4 steps by iteration of one row, over seeds, from where its training begins: the
        untrained student at 0, or the end of the row that it goes on from."""
        rows, after = self.teachers.get(teacher, {}), self.study.tables[table].cells[row].after
        untrained = [{0: v["fid_t"]} for k, v in rows.items() if k.startswith("untrained")]
        curves = []
        for seed in self.study.seeds:
            result = self.results.get((table, teacher, row, seed))
            before = self.results.get((table, teacher, after or row, seed))
            if result is None or before is None:
                continue
            ends = [{p["iteration"]: p["fid_t"]} for p in before["curve"][-1:]]
            curve = dict(*(ends if after else untrained)[:1])
            begun = max(curve, default=0)
            found = {begun + point["iteration"]: point["fid_t"] for point in result["curve"]}
            curves.append(curve | found)
        return curves


def write_report(study: Study, places: dict[Place, Trial], output: Path) -> None:
    """Write report.md with its PNG files, and results.json."""
    findings = Findings.read(study, places, output)
    parts = [heading(findings)]
    names = [name for name in study.tables if any(place[0] == name for place in places)]
    for name in names:
        parts.append(f"## {study.tables[name].title}\n")
        for teacher in study.tables[name].teachers:
            parts.append(f"**{teacher}**\n\n{table_of(findings, name, teacher)}")
        if draw_curves(findings, name, output / f"{name}_curves.png"):
            parts.append(f"![FID-T over iterations]({name}_curves.png)\n")
        if draw_pictures(findings, name, output / f"{name}_pictures.png"):
            parts.append(f"![the same prompts and noise]({name}_pictures.png)\n")
    write_whole(output / "report.md", "\n".join(parts))
    flat = [
        {"table": t, "teacher": who, "row": row, "seed": seed, **result}
        for (t, who, row, seed), result in findings.results.items()
    ]
    write_whole(output / "results.json", json.dumps(flat, indent=1) + "\n")


def heading(findings: Findings) -> str:
    """How many trials, seeds and minutes."""
    trials = {trial.name for trial in findings.places.values()}
    distinct = {findings.places[p].name: r for p, r in findings.results.items()}
    seconds = sum(result["cpu_s"] for result in distinct.values())
    file = findings.output / "time.json"
    wall = json.loads(file.read_text())["wall_s"] if file.is_file() else 0
    return (
        f"{len(distinct)} of {len(trials)} trials done, seeds "
        f"{', '.join(map(str, findings.study.seeds))}, {findings.study.num_prompts} prompts; "
        f"{seconds / 60:.0f} minutes of one core, {wall / 60:.0f} minutes on the clock.\n"
    )


def table_of(findings: Findings, name: str, teacher: str) -> str:
    """A Markdown table: a line per row, the teacher above them."""
    heads = ["", *(f"{n} step{'s' if n > 1 else ''}" for n in NUM_STEPS), "4 steps, other sampler"]
    own = findings.teachers.get(teacher, {})
    found = {r: findings.of_row(name, teacher, r) for r in findings.study.tables[name].cells}
    measured = {label for results in found.values() for one in results for label in one["rows"]}
    by_cps = sorted(label for label in measured if f", {CPS} " in label)
    heads += [*by_cps, "IDA gap, %", "updates", "core minutes"]
    blank = [""] * (len(by_cps) + 3)
    rows = [[f"*{label}*", *cells, *blank] for label, cells in teacher_lines(own)]
    rows += [[row, *row_cells(results, by_cps)] for row, results in found.items()]
    return markdown_table(heads, rows) + floor_of(own)


def teacher_lines(rows: dict[str, dict[str, float]]) -> list[tuple[str, list[str]]]:
    """The teacher at few steps with each sampler, and the untrained student, in the columns."""
    own = {label: row for label, row in rows.items() if label.startswith("teacher")}
    samplers = list(dict.fromkeys(k.split(", ")[2] for k in own if k.count(", ") == 2))
    lines = []
    for sampler in samplers:
        labels = [f"teacher, {num} steps, {sampler}" for num in NUM_STEPS[:-1]]
        labels += ["teacher, 1 step"] if sampler == samplers[-1] else [""]  # measured with the last
        cells = [cell([own[label]]) if label in own else "" for label in labels]
        lines.append((f"teacher, {sampler}", [*cells, ""]))
    for label, row in rows.items():
        if label.startswith("untrained"):
            lines.append(("before training", ["", cell([row]), "", "", ""]))
    return lines


def floor_of(rows: dict[str, dict[str, float]]) -> str:
    """What the teacher's many steps measure when they are drawn once more."""
    many = rows.get(f"teacher, {TEACHER_STEPS} steps")
    said = f"The teacher's {TEACHER_STEPS} steps, drawn once more with other noise"
    return f"\n{said}: {cell([many])}.\n" if many else ""


def row_cells(results: list[dict[str, Any]], by_cps: list[str]) -> list[str]:
    """One row's cells, over its seeds; by_cps: what rows of its table are measured by besides."""
    if not results:
        return ["-"] * (len(NUM_STEPS) + len(by_cps) + 4)
    rows = [result["rows"] for result in results if result["rows"]]
    labels = [f"{num} steps" for num in NUM_STEPS]
    labels += [k for k in rows[0] if k not in [*labels, *by_cps]] if rows else [""]
    labels += by_cps
    measured = [[row[label] for row in rows if label in row] for label in labels]
    cells = [cell(found) if found else "" for found in measured]
    diverged = sum(result["diverged"] is not None for result in results)
    if diverged:
        cells[1] += f" ({diverged} of {len(results)} diverged)"
    minutes = statistics.mean(result["cpu_s"] for result in results) / 60
    gaps = [100 * result["gap"] for result in results if "gap" in result]
    gap = spread(gaps, digits=2) if gaps else ""
    return [*cells, gap, str(results[0]["updates"]), f"{minutes:.1f}"]


def cell(rows: list[dict[str, float]]) -> str:
    """FID-T with its spread over seeds, and the share of pictures with all attributes right."""
    accuracy = statistics.mean(row["all"] for row in rows)
    return f"{spread([row['fid_t'] for row in rows])} · {accuracy:.2f}"


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, and standard deviation over seeds if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def draw_curves(findings: Findings, name: str, file: Path) -> bool:
    """FID-T at 4 steps over iterations: a panel per teacher, mean and range over seeds."""
    table = findings.study.tables[name]
    teachers = [t for t in table.teachers if any(p[:2] == (name, t) for p in findings.results)]
    if not teachers:
        return False
    columns = min(5, 2 * len(teachers))  # of the legend: names of rows may be long
    size = 4.6 * len(teachers), 4 + 0.25 * ceil(len(table.cells) / columns)
    figure, axes = plt.subplots(1, len(teachers), figsize=size, squeeze=False, layout="constrained")
    for axis, teacher in zip(axes[0], teachers, strict=True):
        draw_panel(findings, name, teacher, axis)
    axes[0][0].set_ylabel(f"FID-T, {CURVE_STEPS} steps")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")  # a legend may be wider than a panel
    plt.close(figure)
    return True


def draw_panel(findings: Findings, name: str, teacher: str, axis: Axes) -> None:
    """One teacher's curves, from its untrained student on, or from the row that a row goes on from;
    dotted: the teacher at 28 steps."""
    rows = findings.teachers.get(teacher, {})
    for number, row in enumerate(findings.study.tables[name].cells):
        curves = findings.curves_of(name, teacher, row)
        if not curves:
            continue
        steps = sorted(set.intersection(*map(set, curves)))  # those that every seed reached
        values = [[curve[step] for curve in curves] for step in steps]
        colour = f"C{number % 10}"
        axis.plot(steps, [statistics.mean(v) for v in values], color=colour, label=row,
                  linestyle="-" if number < 10 else "--")  # fmt: skip
        axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values],
                          color=colour, alpha=0.15, linewidth=0)  # fmt: skip
    floor = rows.get(f"teacher, {TEACHER_STEPS} steps")
    if floor:
        axis.axhline(floor["fid_t"], color="grey", linestyle=":")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 0.4)))  # where few fit
    axis.set_xlabel("iterations")
    locator = axis.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)
    locator.set_params(integer=True)
    axis.set_title(teacher)
    axis.grid(alpha=0.2, which="both")


def draw_pictures(findings: Findings, name: str, file: Path) -> bool:
    """The first seed's students and the teacher, the same prompts and noise, a line each."""
    table, seed, strips = findings.study.tables[name], findings.study.seeds[0], []
    for teacher in table.teachers:
        trials = {row: findings.places[name, teacher, row, seed] for row in table.cells}
        own = teacher_rows(next(iter(trials.values())), findings.output)
        strips.append((f"{teacher}: teacher, {TEACHER_STEPS} steps", own.with_name(STRIP)))
        for row, trial in trials.items():
            strips.append((row, trial.folder(findings.output) / STRIP))
    rows = [(said, [Image.open(strip).convert("RGB")]) for said, strip in strips if strip.is_file()]
    if rows:
        save_whole(labelled_rows(rows), file)
    return bool(rows)
