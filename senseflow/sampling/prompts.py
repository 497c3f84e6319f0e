"""Prompts from a file: one per line, or JSON, JSON lines and TSV, which may name each by an id."""

import csv
from pathlib import Path
from typing import Any

from senseflow.common.fields import FieldError, check_range
from senseflow.common.files import parse_json
from senseflow.sampling.job import Prompt

TEXT_KEYS = ("prompt", "caption")
ID_KEYS = ("id", "image_id", "key")
FORMS = (
    "strings, objects with 'prompt' or 'caption' and perhaps 'id', or an object with 'prompts' and "
    "perhaps 'keys'"
)


def read_prompts_file(file: Path) -> list[Prompt]:
    """All prompts of a file, numbered from 0 (blank lines do not count).

    .json, .jsonl and .tsv (with a line of column names) may name each prompt by an id; every other
    file has one prompt per line. Raises ValueError naming the file, and the line.
    """
    if not file.is_file():
        raise ValueError(f"--prompts_file {file} is not a file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts_file {file} is not UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.split("\n")]
    if file.suffix == ".json":
        entries = _entries(file, parse_json(text, f"--prompts_file: {file}"))
    elif file.suffix == ".jsonl":
        numbered = ((f"--prompts_file: line {n} of {file}", s) for n, s in enumerate(lines, 1) if s)
        entries = [parse_json(line, where) for where, line in numbered]
    elif file.suffix == ".tsv":
        entries = _rows(file, text)
    else:
        entries = [line for line in lines if line]
    if not entries:
        raise ValueError(f"--prompts_file {file} holds no prompts")
    return [_prompt(file, index, entry) for index, entry in enumerate(entries)]


def _rows(file: Path, text: str) -> list[dict[str, Any]]:
    """The rows of a .tsv, by the names of its columns."""
    reader = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        return list(reader)
    except csv.Error as error:
        line = reader.line_num + 1  # counted once it is read
        raise ValueError(
            f"--prompts_file: line {line} of {file} cannot be used: {error}"
        ) from error


def _entries(file: Path, tree: Any) -> list[Any]:
    """The entries of a .json: a list, or a data set's keys and prompts side by side."""
    if isinstance(tree, list):
        return tree
    prompts = tree.get("prompts") if isinstance(tree, dict) else None
    if not isinstance(prompts, list):
        raise ValueError(f"--prompts_file {file} must hold {FORMS}")
    keys = tree.get("keys")
    if keys is None:
        return prompts
    if not isinstance(keys, list) or len(keys) != len(prompts):
        raise ValueError(f"--prompts_file {file}: keys and prompts are not of one length")
    return [{"id": key, "prompt": prompt} for key, prompt in zip(keys, prompts, strict=True)]


def _prompt(file: Path, index: int, entry: Any) -> Prompt:
    if isinstance(entry, str) and entry.strip():
        return Prompt(index, entry.strip())
    texts = [entry.get(key) for key in TEXT_KEYS] if isinstance(entry, dict) else []
    text = next((t for t in texts if isinstance(t, str) and t.strip()), None)
    if text is None:
        raise ValueError(f"--prompts_file {file}: entry {index} is no prompt: expected {FORMS}")
    names = [entry[key] for key in ID_KEYS if entry.get(key) is not None]
    return Prompt(index, text.strip(), {**entry, "id": names[0]} if names else entry)


def chosen(prompts: list[Prompt], file: Path, start_idx: int, num: int | None) -> list[Prompt]:
    """`num` (None: all) of a file's prompts, from start_idx on; raises ValueError past its end."""
    check_range("start_idx", start_idx, 0)
    check_range("num_prompts", num, 1)
    if start_idx >= len(prompts):
        raise FieldError(
            "start_idx", f"{start_idx} is past the end of {file} ({len(prompts)} prompts)"
        )
    return prompts[start_idx : None if num is None else start_idx + num]
