"""The prompts of a file, whatever table or list it is; the one reader of all commands."""

import logging
from pathlib import Path
from typing import Any

from senseflow.common.fields import FieldError, check_range
from senseflow.common.tables import TEXT_COLUMNS, Table, find_column, open_table, text_fault
from senseflow.sampling.job import Prompt

logger = logging.getLogger(__name__)

ID_COLUMNS = ("id", "image_id", "key", "keys")
FILES = "one a line, or CSV, TSV, JSON, JSON lines, parquet with a column prompt, caption or text"


def read_prompts_file(
    file: Path, cut_at_tab: bool = False, named: str | None = None
) -> list[Prompt]:
    """All prompts of a file, numbered from 0 (blank lines do not count), and a note of what they
    were found in.

    A table may name each by an id. cut_at_tab: what follows a tab in a line of text is no prompt.
    named: the column of the prompts; None: the first of TEXT_COLUMNS that is there. Raises
    ValueError naming the file and the place in it.
    """
    wanted = TEXT_COLUMNS if named is None else (named.strip().casefold(),)
    table = open_table(file, {*TEXT_COLUMNS, *wanted}, cut_at_tab)
    entries = list(table.rows)
    if not entries:
        raise ValueError(f"{file} holds no prompts")
    columns = {name: None for _, entry in entries if isinstance(entry, dict) for name in entry}
    column = find_column(file, columns, wanted)
    there = f"its columns are {', '.join(map(repr, list(columns)[:12]))}"
    if named is not None and column is None:
        there = f"; {there}" if columns else ", which has no columns: leave it out"
        raise FieldError("prompts_column", f"{named!r} is not in {file}{there}")
    if columns and column is None:
        raise ValueError(
            f"{file} has no column of prompts ({', '.join(TEXT_COLUMNS)}); {there}: call one of "
            f"them {TEXT_COLUMNS[0]}, or name it by --prompts_column where images are drawn"
        )
    id_columns = [name for wanted in ID_COLUMNS if (name := find_column(file, columns, [wanted]))]
    prompts = [
        _prompt(table, index, number, entry, column, id_columns)
        for index, (number, entry) in enumerate(entries)
    ]
    where = "the lines" if table.lines else f"column {column!r}" if column else "the list"
    inside = f" under {table.inside!r}" if table.inside else ""
    logger.info("%d prompts from %s%s of %s", len(prompts), where, inside, file)
    return prompts


def _prompt(
    table: Table, index: int, number: int, entry: Any, column: str | None, id_columns: list[str]
) -> Prompt:
    place = table.place(number)
    if isinstance(entry, str):
        return Prompt(index, checked_prompt(place, entry))
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {entry!r:.60}, not a text or an object")
    if column is None or (text := entry.get(column)) is None:
        raise ValueError(f"{place} has no {column}: a prompt is missing")
    text = checked_prompt(f"{place}, column {column!r}", text)
    ids = [entry[name] for name in id_columns if entry.get(name) is not None]
    return Prompt(index, text, {**entry, "id": ids[0]} if ids else entry)


def checked_prompt(place: str, text: object) -> str:
    """A prompt without spaces around it; raises ValueError, beginning with `place`, for none."""
    if not isinstance(text, str):
        raise ValueError(f"{place} is {text!r:.60}, not a text")
    if not text.strip():
        raise ValueError(f"{place} is empty: a prompt is missing")
    if fault := text_fault(text):
        raise ValueError(f"{place} holds {fault}")
    return text.strip()


def chosen(prompts: list[Prompt], file: Path, start_idx: int, num: int | None) -> list[Prompt]:
    """`num` (None: all) of a file's prompts, from start_idx on; raises ValueError past its end."""
    check_range("start_idx", start_idx, 0)
    check_range("num_prompts", num, 1)
    if start_idx >= len(prompts):
        raise FieldError(
            "start_idx", f"{start_idx} is past the end of {file} ({len(prompts)} prompts)"
        )
    return prompts[start_idx : None if num is None else start_idx + num]
