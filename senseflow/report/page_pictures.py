"""The pictures of the report: strips through time, and samples side by side."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from senseflow.report.embed import Embedded, embed, evenly
from senseflow.report.pairs import Pairs, Samples
from senseflow.report.run_folder import RunFolder

STRIP_SIDE = 1400  # pixels at most: eight columns of 175
SAMPLE_SIDE = 512
WIDE_STRIP = 900  # pixels above which each strip has the page's whole width
SMALL = 160  # pixels below which a picture is shown enlarged, without smoothing

Shown = Embedded | str  # a picture, or why there is none


@dataclass(frozen=True)
class Pictures:
    """What the page shows of the strips and of the samples, and how many there were."""

    strips: list[tuple[int, Shown]]
    num_strips: int
    columns: list[Samples]
    samples: list[tuple[str, int, list[Shown | None]]]  # prompt, seed, one per column
    num_samples: int
    notices: list[str]


def collect(run: RunFolder, pairs: Pairs | None, num_strips: int, num_samples: int) -> Pictures:
    """Embed at most so many strips and prompts, evenly spaced."""
    strips = [run.strips[k] for k in evenly(len(run.strips), num_strips)]
    columns, keys = (pairs.columns, pairs.keys) if pairs else ([], [])
    chosen = [keys[k] for k in evenly(len(keys), num_samples)]
    rows = []
    for key in chosen:
        files = [column.files.get(key) for column in columns]
        rows.append((*key, [_shown(file, SAMPLE_SIDE) if file else None for file in files]))
    return Pictures(
        strips=[(iteration, _shown(file, STRIP_SIDE)) for iteration, file in strips],
        num_strips=len(run.strips),
        columns=columns,
        samples=rows,
        num_samples=len(keys),
        notices=pairs.notices if pairs else [],
    )


def unreadable(pictures: Pictures) -> list[str]:
    """Why pictures are missing, a line each."""
    cells = [shown for _, shown in pictures.strips]
    cells += [shown for _, _, row in pictures.samples for shown in row if shown is not None]
    return [shown for shown in cells if isinstance(shown, str)]


def strips_html(pictures: Pictures) -> str:
    """What iterations computed, in their order."""
    if not pictures.num_strips:
        return '<p class="notice">There are no strips in samples/ (log.sample_interval).</p>'
    figures = "".join(
        f"<figure><figcaption><b>Iteration {iteration}</b></figcaption>"
        + _strip(iteration, shown)
        + "</figure>"
        for iteration, shown in pictures.strips
    )
    widths = [shown.width for _, shown in pictures.strips if isinstance(shown, Embedded)]
    large = " large" if max(widths, default=0) > WIDE_STRIP else ""
    return (
        '<p class="lead">What an iteration computed, one line per sample: what the student drew, '
        f"and what it was measured against. {_of(len(pictures.strips), pictures.num_strips)}</p>"
        f'<div class="strips{large}">{figures}</div>'
    )


def samples_html(pictures: Pictures) -> str:
    """One card per prompt and seed, one picture per folder; "" without folders."""
    if not pictures.columns:
        return ""
    notices = "".join(f"<li>{escape(said)}</li>" for said in pictures.notices)
    said = f'<ul class="notices">{notices}</ul>' if notices else ""
    made = "; ".join(
        f"{column.label} ({column.detail})" if column.detail else column.label
        for column in pictures.columns
    )
    cells = [shown for _, _, row in pictures.samples for shown in row]
    cell = 110 if all(_is_small(shown) for shown in cells if isinstance(shown, Embedded)) else 220
    width = 30 + (cell + 10) * min(4, len(pictures.columns))
    cards = "".join(_card(pictures.columns, *sample) for sample in pictures.samples)
    return (
        '<p class="lead">The same prompts and seeds in every column. '
        f"{_of(len(pictures.samples), pictures.num_samples)}</p>"
        f'<p class="soft">Columns: {escape(made)}.</p>{said}'
        f'<div class="samples" style="--card-width:{max(300, width)}px;--cell:{cell}px">{cards}'
        "</div>"
    )


def _card(columns: list[Samples], prompt: str, seed: int, cells: list[Shown | None]) -> str:
    row = "".join(
        f"<figure>{_cell(column, prompt, shown)}<figcaption>{escape(column.label)}</figcaption>"
        "</figure>"
        for column, shown in zip(columns, cells, strict=True)
    )
    return (
        f'<figure class="sample"><figcaption>{escape(prompt)} <small>seed {seed}</small>'
        f'</figcaption><div class="row">{row}</div></figure>'
    )


def _cell(column: Samples, prompt: str, shown: Shown | None) -> str:
    if shown is None:
        return '<div class="missing">no such image</div>'
    if isinstance(shown, str):
        return f'<div class="missing">{escape(shown)}</div>'
    small = ' class="small"' if _is_small(shown) else ""
    return _image(shown, f"{column.label}: {prompt}", small)


def _is_small(shown: Embedded) -> bool:
    return max(shown.width, shown.height) < SMALL


def _strip(iteration: int, shown: Shown) -> str:
    if isinstance(shown, str):
        return f'<div class="notice">{escape(shown)}</div>'
    image = _image(shown, f"image strip of iteration {iteration}, labelled columns", "")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="strip of iteration '
        f'{iteration}">{image}</div>'
    )


def _image(shown: Embedded, alt: str, attributes: str) -> str:
    return (
        f'<img{attributes} src="{shown.uri}" width="{shown.width}" height="{shown.height}" '
        f'alt="{escape(alt, quote=True)}">'
    )


def _shown(file: Path, side: int) -> Shown:
    try:
        return embed(file, side)
    except ValueError as error:
        return str(error)


def _of(shown: int, num: int) -> str:
    return "" if shown == num else f"{shown} of {num} are shown, evenly spaced."
