"""The JSON file that lists images with their prompts; needs no torch.

    {"keys": ["0", ...], "image_paths": ["a.png", ...], "prompts": ["a sunset", ...]}

Three lists of one length; relative image paths are looked up beside the JSON file, then in the
working directory.
"""

import json
import os
from pathlib import Path

from senseflow.common.files import parse_json, write_whole

MOST_SAID = 300  # letters of a name in a message
LISTS = ("keys", "image_paths", "prompts")


def read_lists(file: Path) -> tuple[list[str], list[str], list[str]]:
    """keys, image_paths and prompts of a data set file, checked."""
    if not file.is_file():
        raise ValueError(f"data set {file} not found: paths.dataset names a JSON file")
    tree = parse_json(file.read_bytes(), f"data set {file}")
    missing = [name for name in LISTS if not isinstance(tree, dict) or name not in tree]
    if missing:
        raise ValueError(f"data set {file} has no {', '.join(missing)}")
    for name in LISTS:
        if not isinstance(tree[name], list):
            raise ValueError(f"data set {file}: {name} is not a list")
    lengths = {name: len(tree[name]) for name in LISTS}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"data set {file} has lists of different lengths: {said}")
    if not tree["keys"]:
        raise ValueError(f"data set {file} is empty")
    for name in LISTS[1:]:
        odd = next((i for i, text in enumerate(tree[name]) if not isinstance(text, str)), None)
        if odd is not None:
            raise ValueError(f"data set {file}: {name}[{odd}] is not text: {tree[name][odd]!r}")
    return tree["keys"], tree["image_paths"], tree["prompts"]


def write_lists(file: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write key, image path and prompt of every row, whole or not at all."""
    columns = zip(*rows, strict=True)
    tree = {name: list(column) for name, column in zip(LISTS, columns, strict=True)}
    write_whole(file, json.dumps(tree, indent=0) + "\n")


def resolve(folder: Path, path: str) -> Path:
    """Where an image of the list in `folder` is: beside it if it is there, else as given."""
    beside = folder / path
    return beside if os.path.exists(beside) else Path(path)  # no error of a name that is too long


def said(name: str) -> str:
    """A file's name in a message: of a very long one its beginning and its end."""
    name = one_line(name)
    return (
        name if len(name) <= MOST_SAID else f"{name[: MOST_SAID // 2]}...{name[-MOST_SAID // 2 :]}"
    )


def one_line(name: str) -> str:
    """A file's name, of any characters, as UTF-8 can write it in one line and one column."""
    return " ".join(name.split()).encode("utf-8", "backslashreplace").decode()
