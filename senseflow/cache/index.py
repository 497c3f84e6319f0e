"""What is to be encoded, in which files, and how large they will be; nothing is computed here.

Rows keep their files: a larger data set adds files, and what was planned before and is not there
yet is made as it was planned, so that an interrupted cache becomes the uninterrupted one.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from senseflow.common.files import PARTIAL, require_room
from senseflow.common.weights_files import size_in_words
from senseflow.data.cache_index import (
    INDEX,
    KEY_DTYPE,
    Part,
    Shard,
    differences,
    read_index,
    write_index,
)
from senseflow.weights.safetensors_writer import num_bytes

NUMBER = re.compile(r"-(\d+)\.safetensors$")
SHARD_BYTES = 2**28  # 256 MiB: seconds of work, and few enough files for millions of rows
MOST_ROWS = 1024
MOST_BYTES = 2**33  # of a file, which is made in memory


@dataclass(frozen=True)
class Job:
    """One part of a cache: all of its files, and those that are to be made."""

    name: str
    part: Part
    todo: list[Shard]

    @property
    def num_rows(self) -> int:
        """How many rows are still to be made."""
        return sum(map(len, self.todo))

    @property
    def num_bytes(self) -> int:
        """The size of the files that are still to be written."""
        return sum(num_bytes(self.part.shapes(shard)) for shard in self.todo)

    def said(self) -> str:
        """One line: rows to encode and rows there, bytes per row and in all."""
        there = sum(map(len, self.part.shards)) - self.num_rows
        what = "images" if self.name == "latents" else "prompts"
        files = "1 file" if len(self.todo) == 1 else f"{len(self.todo)} files"
        return (
            f"{self.name}: {self.num_rows} {what} to encode, {there} are there; "
            f"{size_in_words(self.part.row_bytes)} each, {size_in_words(self.num_bytes)} in {files}"
        )


def plan_cache(
    folder: Path, fresh: dict[str, Part], wanted: dict[str, np.ndarray], most_rows: int | None
) -> list[Job]:
    """Write the index of all that is wanted; returns what there is to do.

    fresh: each part without files. wanted: its keys (N,), in order. most_rows: of a file; None: by
    its size. Raises ValueError for a folder with another cache, and for a disk too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = read_index(folder) if (folder / INDEX).exists() else {}
    for name, part in fresh.items():
        if name in parts:
            part = goes_on(folder, name, parts[name], part)
        parts[name] = with_files(folder, name, part, wanted[name], most_rows)
    jobs = [Job(name, parts[name], to_make(folder, parts[name], wanted[name])) for name in fresh]
    require_room("--output", folder, sum(job.num_bytes for job in jobs))
    for left in folder.glob(f"*.safetensors{PARTIAL}"):
        if NUMBER.search(left.name.removesuffix(PARTIAL)):  # as files of a cache are called
            left.unlink()
    write_index(folder, parts)
    return jobs


def goes_on(folder: Path, name: str, old: Part, fresh: Part) -> Part:
    """The part that is there; raises ValueError when it is made with something else."""
    differing = differences(old.made_with, fresh.made_with)
    if not differing and old.fields != fresh.fields:
        differing = [f"{old.fields} in the cache, {fresh.fields} here"]
    if differing:
        raise ValueError(
            f"--output {folder} has {name} of other encoders or settings: {'; '.join(differing)}. "
            "Name another --output, or remove it"
        )
    return old


def with_files(
    folder: Path, name: str, part: Part, wanted: np.ndarray, most_rows: int | None
) -> Part:
    """The part with files for all wanted rows.

    A planned file that is not there stays planned unless the data set lacks one of its samples.
    """
    samples = set(wanted.tolist())
    kept = [
        shard
        for shard in part.shards
        if part.fault(folder, shard) is None or samples.issuperset(_keys(shard))
    ]
    held = {key for shard in kept for key in _keys(shard)}
    rest = [key.decode() for key in wanted.tolist() if key not in held]
    first = 1 + max((_number(shard) for shard in part.shards), default=-1)
    rows = most_rows or max(1, min(MOST_ROWS, SHARD_BYTES // part.row_bytes))
    if (most := min(rows, len(rest)) * part.row_bytes) > MOST_BYTES:
        raise ValueError(
            f"--shard_rows {rows}: {size_in_words(most)} of {name} would be held in memory at "
            f"once; at most {MOST_BYTES // part.row_bytes} rows a file"
        )
    added = [
        Shard(f"{name}-{number:06d}.safetensors", "".join(rest[start : start + rows]))
        for number, start in enumerate(range(0, len(rest), rows), first)
    ]
    return dataclasses.replace(part, shards=(*kept, *added))


def to_make(folder: Path, part: Part, wanted: np.ndarray) -> list[Shard]:
    """The files that are missing, damaged, or hold images that could not be read."""
    samples = set(wanted.tolist())
    return [
        shard
        for shard in part.shards
        if part.fault(folder, shard) is not None
        or (
            "readable" in part.fields
            and samples.issuperset(_keys(shard))
            and not all_readable(folder / shard.file)
        )
    ]


def all_readable(file: Path) -> bool:
    """Whether every image of a file of latents could be read."""
    with safe_open(str(file), framework="pt") as opened:
        return bool(opened.get_tensor("readable").all())


def _keys(shard: Shard) -> list[bytes]:
    keys: list[bytes] = np.frombuffer(shard.keys.encode(), KEY_DTYPE).tolist()
    return keys


def _number(shard: Shard) -> int:
    found = NUMBER.search(shard.file)
    return int(found[1]) if found else -1
