"""From results to the cells and footnotes of a table, the published results among them."""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.evaluate.entries import Result, protocol
from senseflow.evaluate.layouts import CATEGORIES, GENEVAL_TASKS

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
