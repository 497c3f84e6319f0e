"""Images with captions as users keep them: in folders with sidecars, or named in tables.

Sidecars are `x.txt` or `x.caption` beside `x.jpg` (or `x.jpg.txt`). Tables are `metadata.jsonl`,
`.csv` or `.tsv` of a folder, as Hugging Face's imagefolder has them, or one table alone. Nothing is
left out without a word: every file is a pair, left out for a reason, or counted as passed over.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from senseflow.common.tables import FILE_COLUMNS, find_column, open_table, text_fault
from senseflow.data.image_files import IMAGE_SUFFIXES, files_below, why_unread

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
METADATA = tuple(f"metadata{suffix}" for suffix in METADATA_SUFFIXES)
CAPTION_COLUMNS = ("text", "caption", "prompt")

NO_CAPTION = "an image without a caption"
NO_IMAGE = "a caption without an image"
EMPTY = "an empty caption"
NOT_TEXT = "a caption that is not text"


@dataclass(frozen=True)
class Pair:
    """One image and its caption."""

    key: str
    image: Path
    caption: str


@dataclass
class Found:
    """What a source holds: pairs, (name, reason) of what is left out, and other files by kind."""

    pairs: list[Pair] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def add(self, key: str, image: Path, text: object) -> None:
        """A pair, or why there is none."""
        if why := why_unread(image.suffix) or _caption_fault(text):
            self.left_out.append((key, why))
        else:
            self.pairs.append(Pair(key, image, " ".join(str(text).split())))

    def extend(self, other: "Found") -> None:
        """Take over what another source holds."""
        self.pairs += other.pairs
        self.left_out += other.left_out
        self.passed_over += other.passed_over


def _caption_fault(text: object) -> str | None:
    if text is None:
        return NO_CAPTION
    if not isinstance(text, str):
        return NOT_TEXT
    fault = text_fault(text)
    return f"a caption with {fault}" if fault else None if text.strip() else EMPTY


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold an image's file and its caption; None: the usual names."""

    file: str | None = None
    caption: str | None = None

    def caption_of(self, row: dict[str, Any], place: str = "the json of a sample") -> Any:
        """The caption; None when no column holds one. Raises ValueError where two could."""
        return _first(place, row, _caption_columns(self))


def from_folder(folder: Path, columns: Columns) -> Found:
    """Pairs of a folder and those below it, in the order of their paths.

    An image that a metadata table names has its captions from there, one pair each; any other from
    its sidecar. Raises ValueError for a table that cannot be read, OSError for a folder.
    """
    found = Found()
    files = walk(folder, found.passed_over)
    captions = _from_tables(folder, files, columns, found)
    sidecars = {_same(name): name for name in files["sidecar"]}
    used = set()
    for image in sorted({*files["image"], *captions}):
        own = [s for s in _sidecar_names(image) if s in sidecars]
        used.update(own)
        if image in captions:
            for number, text in enumerate(captions[image], start=1):
                found.add(image if number == 1 else f"{image}#{number}", folder / image, text)
        else:
            text = decoded((folder / sidecars[own[0]]).read_bytes()) if own else None
            found.add(image, folder / image, text)
    found.left_out += [(s, NO_IMAGE) for s in files["sidecar"] if _same(s) not in used]
    return found


def from_table(file: Path, columns: Columns) -> Found:
    """Pairs of one table, whose image paths are relative to it."""
    found, seen = Found(), Counter[str]()
    for place, row in read_table(file, columns):
        name = _file_name(place, row, columns)
        image = file.parent / name
        seen[name] += 1
        key = name if seen[name] == 1 else f"{name}#{seen[name]}"
        if os.path.isfile(image):
            found.add(key, image, columns.caption_of(row, place))
        else:
            found.left_out.append((f"{place}: {name}", NO_IMAGE))
    return found


def walk(folder: Path, others: Counter[str]) -> dict[str, list[str]]:
    """The images, sidecars and tables below a folder, as sorted relative POSIX paths.

    Counts in `others` what `files_below` does, and files of other kinds.
    """
    known: dict[str, list[str]] = {"image": [], "sidecar": [], "table": []}
    for name in files_below(folder, others):
        if (kind := _kind(PurePosixPath(name))) in known:
            known[kind].append(name)
        else:
            others[kind] += 1
    return {kind: sorted(names) for kind, names in known.items()}


def decoded(data: bytes) -> str | bytes:
    """The caption that a file holds; its bytes where they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data


def read_table(file: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the cells of each row; raises ValueError naming the place."""
    known = [*_file_columns(columns), *_caption_columns(columns)]
    table = open_table(file, [name.casefold() for name in known])
    for number, row in table.rows:
        place = table.place(number)
        if not isinstance(row, dict):
            what = "a line of text" if table.lines else type(row).__name__
            raise ValueError(f"{place} is {what}, not a row of a table")
        yield place, row


def _from_tables(
    folder: Path, files: dict[str, list[str]], columns: Columns, found: Found
) -> dict[str, list[object]]:
    """The captions that the metadata tables of a folder give to its images.

    A file that a row names is one of its images, whatever its kind.
    """
    images = {_same(name): name for name in files["image"]}
    captions: dict[str, list[object]] = {}
    for table in files["table"]:
        for place, row in read_table(folder / table, columns):
            name = _file_name(place, row, columns)
            below = os.path.normpath(PurePosixPath(table).parent / name)
            image = below if os.path.isfile(folder / below) else images.get(_same(below))
            if image is None:
                found.left_out.append((f"{place}: {name}", NO_IMAGE))
            else:
                captions.setdefault(image, []).append(columns.caption_of(row, place))
    others = (_kind(PurePosixPath(image)) for image in captions.keys() - {*files["image"]})
    found.passed_over.subtract(kind for kind in others if kind in found.passed_over)
    return captions


def _file_columns(columns: Columns) -> tuple[str, ...]:
    return (columns.file,) if columns.file else FILE_COLUMNS


def _caption_columns(columns: Columns) -> tuple[str, ...]:
    return (columns.caption,) if columns.caption else CAPTION_COLUMNS


def _file_name(place: str, row: dict[str, Any], columns: Columns) -> str:
    wanted = _file_columns(columns)
    name = _first(place, row, wanted)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"{place}: no image file in a column {' or '.join(wanted)}; it has "
            f"{', '.join(map(str, row))}: name the column with --file_column"
        )
    return name


def _kind(file: PurePosixPath) -> str:
    suffix = file.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in CAPTION_SUFFIXES:
        return "sidecar"
    return "table" if file.name.lower() in METADATA else suffix or "no suffix"


def _sidecar_names(image: str) -> list[str]:
    """The names that an image's caption may have, the likeliest first."""
    stems = (os.path.splitext(image)[0], image)
    return [_same(stem + suffix) for stem in stems for suffix in CAPTION_SUFFIXES]


def _same(name: str) -> str:
    """Equal for two spellings of one file: composed and decomposed letters, upper-case suffixes."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + suffix.lower()


def _first(place: str, row: dict[str, Any], names: tuple[str, ...]) -> Any:
    filled = [name for name, value in row.items() if value is not None]
    column = find_column(place, filled, names)
    return None if column is None else row[column]
