"""Tables and lists of texts as people keep them: JSON in its forms, CSV, TSV, parquet, plain lines.

What a file is, its content says; its name is asked only where the content leaves it open. So a
table under the wrong suffix is read as the table that it is, and never as lines of text.
"""

import codecs
import csv
import importlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.common.files import parse_json
from senseflow.common.weights_files import LFS, MARKUP, OTHERS

TEXT_COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "texts")
FILE_COLUMNS = ("file_name", "image_path", "image_paths", "image", "path")
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
JSON = (".json", *JSON_LINES)
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
PARQUET = ".parquet"
MOST_OF_NAMES = 10_000  # letters of a line of column names
SUFFIXES = (*JSON, *DELIMITERS, PARQUET)
PROMPTS_ALONE = (".txt", *JSON_LINES, *DELIMITERS, PARQUET)  # data sets without images
FORMS = (
    "a list of texts or of objects, an object with such a list or with lists as columns, or an "
    "object of texts or objects by name"
)

HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates, which UTF-8 cannot write

# The longest first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = {  # by how a file begins
    **OTHERS,
    b"PK\x03\x04": "a ZIP archive, as .xlsx files are: unpack it, or save the sheet as CSV",
    LFS: "a pointer of Git LFS: `git lfs pull` in its folder fetches the file itself",
}
_SCALARS = (  # of pyarrow
    "string", "large_string", "dictionary", "integer", "floating", "boolean", "null",
)  # fmt: skip
_JSON = re.compile(r'\s*(\{\s*("|\}\s*\Z)|\[\s*(["{]|\]\s*\Z))')  # how JSON begins, hardly a prompt
_FOREIGN = {  # by name, where the content is no table
    ".yaml": "YAML", ".yml": "YAML", ".xml": "XML", ".html": "HTML", ".toml": "TOML",
    PARQUET: "parquet by its name alone",
}  # fmt: skip
_LIKE_A_NAME = re.compile(r"[\w .:/()#-]{0,40}")  # of a column
_NAMES = {  # that are column names, where a sentence might be one too
    *TEXT_COLUMNS, *FILE_COLUMNS, "id", "image_id", "key", "category", "challenge", "note", "tag",
    "tags", "url", "seed", "negative_prompt",
}  # fmt: skip
_NUMBERED = re.compile(r"\s*(\d+|\S+\.(png|jpe?g|webp|bmp))\s*[,;|]", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """What a file holds, in its order: objects, or texts, each with its number in the file."""

    file: Path
    unit: str  # what the numbers count: "line", "entry" or "row"
    rows: Iterator[tuple[int, Any]]
    inside: str | None = None  # of a JSON object, the key under which they stand
    lines: bool = False  # plain text, a line each

    def place(self, number: int) -> str:
        """Where a row stands, as errors name it."""
        return f"{self.file}, {self.unit} {number}"


def open_table(file: Path, known: Iterable[str], cut_at_tab: bool = False) -> Table:
    """Find out what a file is.

    known: names of columns, in lower case, by which a line of column names is recognised.
    cut_at_tab: of a line of plain text, what follows a tab is a comment; else tabs are refused.
    Raises ValueError, naming the file and the place in it, for what is not read, here or when the
    rows are.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    with file.open("rb") as stream:
        begin = stream.read(32)
    if begin.startswith(b"PAR1"):
        return Table(file, "row", _parquet(file))
    text = read_text(file)
    # From its first line on, which may begin with a tab: pandas gives its index no name.
    start = text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1
    text, blank = text[start:].rstrip(), text.count("\n", 0, start)
    if not text:
        return Table(file, "line", iter(()), lines=True)
    line, suffix, known = text.partition("\n")[0], file.suffix.lower(), frozenset(known)
    if _JSON.match(text):
        return _json(file, text, blank, known)
    if delimiter := _delimiter(line, suffix, known):
        return Table(file, "line", _delimited(file, text, delimiter, blank))
    # texts in quotes, one a line
    quoted = line.lstrip().startswith('"')
    if suffix in JSON or (quoted and all(_is_json(s) for _, s in _numbered(text, blank))):
        return _json(file, text, blank, known)
    if suffix in _FOREIGN:
        raise ValueError(
            f"{file} is {_FOREIGN[suffix]}, which is not read: save it as CSV, JSON or lines"
        )
    rows = _plain(file, list(_numbered(text, blank)), cut_at_tab)
    return Table(file, "line", iter(rows), lines=True)


def read_text(file: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark; raises ValueError."""
    data = file.read_bytes()
    for begin, what in _NO_TEXT.items():
        if data.startswith(begin):
            raise ValueError(f"{file} is {what}")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        what = encoding.upper().removesuffix("-SIG")
        raise ValueError(f"{file} is not {what} text ({error}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(
            f"{file} holds NUL characters, so it is no text, or UTF-16 without a byte order mark: "
            "save it as UTF-8"
        )
    if text[:1000].lstrip().lower().startswith(tuple(mark.decode() for mark in MARKUP)):
        raise ValueError(f"{file} is a page (HTML or XML): download the file itself")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def has_prompts_alone(dataset: Path) -> bool:
    """Whether a data set is a list of prompts without images, by its name."""
    return dataset.suffix in PROMPTS_ALONE and not dataset.is_dir()


def text_fault(text: str) -> str | None:
    """Why no tokenizer takes a text, though JSON can write it; None of one that can be read."""
    return "half of a character, as of an emoji cut in two" if HALF_PAIR.search(text) else None


def find_column(place: Path | str, columns: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first of the wanted columns that is there, letters of either case being the same; None
    without any. Raises ValueError where two columns have that name.
    """
    there: dict[str, list[str]] = {}
    for column in columns:
        there.setdefault(column.strip().casefold(), []).append(column)
    for name in wanted:
        found = there.get(name.casefold(), [])
        if len(found) > 1:
            said = " and ".join(map(repr, found))
            raise ValueError(f"{place} has the columns {said}: leave one of them out")
        if found:
            return found[0]
    return None


# ---------------------------------------------------------------------------------------- the forms


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Texts and numbers alone: such tables may hold whole images in others."""
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{file} is parquet, which needs pyarrow: pip install pyarrow, or save it as CSV or "
            "JSON lines"
        ) from error
    try:
        opened = parquet.ParquetFile(file)
        kinds = [getattr(pyarrow.types, f"is_{kind}") for kind in _SCALARS]
        fields = [f for f in opened.schema_arrow if any(is_kind(f.type) for is_kind in kinds)]
        batches = opened.iter_batches(columns=[field.name for field in fields])
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def _numbered(text: str, blank: int) -> Iterator[tuple[int, str]]:
    """The lines that are not blank; blank: how many stood before the text."""
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), blank + 1))
    return ((number, line) for number, line in lines if line)


def _json(file: Path, text: str, blank: int, known: frozenset[str]) -> Table:
    """A list or an object, or one of them per line."""
    first, _, more = text.partition("\n")
    if more and _is_json(first):
        numbered = _numbered(text, blank)
        rows = ((number, parse_json(s, f"{file}, line {number}")) for number, s in numbered)
        return Table(file, "line", rows)
    inside, entries = _entries(file, parse_json(text, str(file)), known)
    return Table(file, "entry", enumerate(entries, 1), inside)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _entries(file: Path, tree: Any, known: frozenset[str]) -> tuple[str | None, list[Any]]:
    """The rows that a JSON holds, and the key of an object under which they stand."""
    if isinstance(tree, list):
        return None, tree
    if isinstance(tree, dict):
        columns = {key: value for key, value in tree.items() if isinstance(value, list)}
        tables = [key for key, rows in columns.items() if any(_has(row, known) for row in rows)]
        if len(tables) > 1:
            raise ValueError(f"{file} has rows under {' and '.join(tables)}: leave one of them")
        if tables:
            return tables[0], tree[tables[0]]
        if _has(tree, known):
            return None, _transposed(file, columns) if _has(columns, known) else [tree]
        if tree and all(_has(value, known) for value in tree.values()):
            return None, [{"id": name, **row} for name, row in tree.items()]
        if tree and all(isinstance(value, str) for value in tree.values()):
            return None, [
                {FILE_COLUMNS[0]: name, TEXT_COLUMNS[0]: text} for name, text in tree.items()
            ]
    raise ValueError(f"{file} must hold {FORMS}; known columns are {', '.join(sorted(known))}")


def _has(row: Any, known: frozenset[str]) -> bool:
    return isinstance(row, dict) and any(key.strip().casefold() in known for key in row)


def _transposed(file: Path, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The rows of lists side by side."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"{file} has lists that are not of one length: {said}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _delimiter(line: str, suffix: str, known: frozenset[str]) -> str | None:
    """What stands between the cells of a table that begins with this line; None: it is none.

    A file that does not call itself a table is one when its first line has a known name among cells
    that are all like names; a sentence with commas is not, nor are tags with spaces after them.
    """
    best, most = DELIMITERS.get(suffix), 0
    if len(line) > MOST_OF_NAMES:
        return best
    for delimiter in ",\t;|":
        (cells,) = csv.reader([line], delimiter=delimiter, skipinitialspace=True)
        names = [cell.strip().casefold() for cell in cells]
        like_names = all(map(_LIKE_A_NAME.fullmatch, names)) and (
            f"{delimiter} " not in line or _NAMES.issuperset(names)
        )
        named = not known.isdisjoint(names)
        if named and len(names) > most and (like_names or suffix in DELIMITERS):
            best, most = delimiter, len(names)
    if most == 1 and suffix not in DELIMITERS:
        return "\t"  # one column, whose texts have commas
    return best


def _delimited(
    file: Path, text: str, delimiter: str, blank: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows by the names of the columns; blank: how many lines stood before the text."""
    raw = delimiter == "\t" and not _is_quoted(text)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL,
        skipinitialspace=delimiter != "\t",
        strict=True,
    )
    names: list[str] = []
    begin = blank + 1
    try:
        for cells in reader:
            line, begin = begin, blank + reader.line_num + 1
            if not names:
                names = _names(f"{file}, line {line}", cells)
            elif any(cell.strip() for cell in cells):
                yield line, _row(f"{file}, line {line}", names, cells, delimiter)
    except csv.Error as error:
        raise ValueError(f"{file}, line {begin} cannot be used: {error}") from error


def _is_quoted(text: str) -> bool:
    """Whether quotes at a cell's begin and end are a TSV's own, and not of its sentences."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    try:
        return all("\t" not in cell for cells in reader for cell in cells)
    except csv.Error:
        return False


def _names(place: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{place}: two columns are called {name!r}")
    return names


def _row(place: str, names: list[str], cells: list[str], delimiter: str) -> dict[str, Any]:
    if any(cell.strip() for cell in cells[len(names) :]):
        raise ValueError(
            f"{place} has {len(cells)} cells, its table {len(names)} columns ({', '.join(names)}): "
            f"a text with {delimiter!r} in it wants quotes around it"
        )
    return dict(itertools.zip_longest(names, cells[: len(names)]))


def _plain(file: Path, numbered: list[tuple[int, str]], cut_at_tab: bool) -> list[tuple[int, str]]:
    """Lines of text; raises ValueError where they look like a table without column names."""
    if cut_at_tab:
        return [(number, line.partition("\t")[0].strip()) for number, line in numbered]
    tabbed = next((number for number, line in numbered if "\t" in line), None)
    if tabbed is not None:
        raise ValueError(
            f"{file}, line {tabbed} has a tab in it, as a table has: name the columns in its first "
            f"line, one of them {TEXT_COLUMNS[0]}, or write a space"
        )
    if len(numbered) > 1 and all(_NUMBERED.match(line) for _, line in numbered):
        raise ValueError(
            f"{file} looks like a table without names of its columns ({numbered[0][1][:60]}): name "
            f"them in its first line, one of them {TEXT_COLUMNS[0]}"
        )
    return numbered
