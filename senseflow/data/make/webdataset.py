"""Images with captions in WebDataset shards, extracted to a folder.

The files of a sample stand one after the other in a tar and share their name up to the first dot.
A shard is read once, as a stream, one sample in memory. What was found in it is written beside the
images when the shard is done, so that the same command goes on with the next; before that the note
says no more than whose the folder is.
"""

import json
import lzma
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from senseflow.common.files import naming, parse_json, read_json, write_whole
from senseflow.data.image_files import IMAGE_SUFFIXES
from senseflow.data.make.captioned import (
    CAPTION_COLUMNS,
    CAPTION_SUFFIXES,
    NO_IMAGE,
    Columns,
    Found,
    decoded,
)

CAPTIONS = (*CAPTION_SUFFIXES, ".json")  # the first that is there
KNOWN = (*IMAGE_SUFFIXES, *CAPTIONS)
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
BLOCK = 512  # bytes; two empty ones end a tar
RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
MOST_FILES = 10**6  # that a pattern may stand for: a petabyte of shards
MOST_BYTES = 2**28  # of one file; a sparse one of a terabyte takes a kilobyte in a tar
FORMAT = 2  # of the notes

DOTTED = "a name with a dot before its suffix"
AGAIN = "a name that stands before in the shard"
LINK = "a link or a device in the place of a file"
LARGE = f"a file of more than {MOST_BYTES // 2**20} MiB"


@dataclass
class Sample:
    """The files of one sample that are of use, by suffix, and those whose suffix has dots."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    dotted: list[str] = field(default_factory=list)


def expand(words: list[str]) -> list[Path]:
    """The files that `a-{000..010}.tar` stands for, in order.

    Raises ValueError for a reversed range and for more files than anyone has.
    """
    for word in words:
        ranges = [(int(first), int(last)) for first, last in RANGE.findall(word)]
        num = math.prod(max(1, last - first + 1) for first, last in ranges)
        if num > MOST_FILES:
            raise ValueError(f"{word} stands for {num:,} files, more than {MOST_FILES:,}")
    files: list[Path] = []
    for word in words:
        match = RANGE.search(word)
        if match is None:
            files.append(Path(word))
            continue
        first, last = match.groups()
        if int(first) > int(last):
            raise ValueError(f"{word}: {first} is above {last}")
        numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        files += expand([word[: match.start()] + n + word[match.end() :] for n in numbers])
    return files


def require_shards(shards: list[Path]) -> None:
    """Raise ValueError for shards that are not there or share a name."""
    absent = [shard for shard in shards if not shard.is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(shards)} shards are not there, such as {absent[0]}"
        )
    names = Counter(stem(shard) for shard in shards)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"two shards are named {twice[0]}: give them one at a time, or rename one")


def stem(shard: Path) -> str:
    """The name of a shard without its suffixes."""
    return shard.name.partition(".tar")[0]


def note_of(shard: Path, images: Path) -> Path:
    """Where it is written what a shard held, once it is extracted."""
    return images / f"{stem(shard)}.json"


def from_shards(
    shards: list[Path], images: Path, columns: Columns
) -> tuple[Found, list[tuple[Path, str]]]:
    """Extract what is not extracted yet, to `images`/NAME OF SHARD/.

    Returns what the shards held, and (shard, reason) of those that are damaged: of these the
    samples before the damage are taken, and they are read again the next time. Raises ValueError,
    before any is read, for a folder of something else.
    """
    for shard in shards:
        _require_ours(shard, images)
    whole, damaged = Found(), []
    for shard in tqdm(shards, unit="shard"):
        found = _earlier(shard, images, columns)
        if found is None:
            _begin(shard, images, columns)
            found, reason = extract(shard, images / stem(shard), columns)
            if reason:
                damaged.append((shard, reason))
            else:
                _remember(shard, images, columns, found)
        whole.extend(found)
    return whole, damaged


def extract(shard: Path, folder: Path, columns: Columns) -> tuple[Found, str | None]:
    """Write the images of one shard; what it holds, and what is wrong with it."""
    found, keys = Found(), set[str]()
    samples = enumerate(read_samples(shard, found))
    while True:
        try:
            number, sample = next(samples)
        except StopIteration:
            return found, None
        except DAMAGE as error:
            return found, f"damaged: {error}"
        if _add(found, folder / f"{number:06d}", sample, keys, columns):
            keys.add(sample.key)


def read_samples(shard: Path, found: Found) -> Iterator[Sample]:
    """The samples of a tar, in order, and in `found` the files that are of no sample.

    Raises one of DAMAGE where it is cut short or damaged.
    """
    sample = Sample("")
    with tarfile.open(shard, "r|*") as tar:
        while (member := tar.next()) is not None:
            # a stream never goes back to the files before; tarfile would keep them all
            tar.members.clear()  # type: ignore[attr-defined]  # no name of its stubs
            path = PurePosixPath(member.name)
            name, _, ending = path.name.partition(".")
            if member.isdir():
                continue
            if not name or path.suffix.lower() not in KNOWN:
                # by the last suffix alone: few kinds, however many files
                found.passed_over[(path.suffix.lower() or "no suffix") if name else "hidden"] += 1
                continue
            key, suffix = str(path.with_name(name)), f".{ending.lower()}"
            if key != sample.key:
                if sample.key:
                    yield sample
                sample = Sample(key)
            if suffix not in KNOWN:
                sample.dotted.append(member.name)
            elif why := _fault(member, suffix in sample.parts):
                found.left_out.append((member.name, why))
            else:
                opened = tar.extractfile(member)
                assert opened is not None, "a regular file"
                sample.parts[suffix] = opened.read()
    if sample.key:
        yield sample
    _require_end(shard)


def _fault(member: tarfile.TarInfo, again: bool) -> str | None:
    if not member.isfile():
        return LINK
    if member.size > MOST_BYTES:
        return LARGE
    return AGAIN if again else None


def _require_end(shard: Path) -> None:
    """A tar cut off between two files reads as a shorter one: its end is two blocks of zeros."""
    try:
        tarfile.open(shard, "r:").close()
    except tarfile.ReadError:
        return  # it is compressed, and that has a checksum
    with shard.open("rb") as stream:
        stream.seek(-BLOCK, 2)
        if any(stream.read(BLOCK)):
            raise tarfile.ReadError("it has no end: cut short")


def _add(found: Found, place: Path, sample: Sample, keys: set[str], columns: Columns) -> bool:
    """Put a sample's image on the disk and the pair among those found; whether there is one.

    place: of the image without its suffix; its key may be any text. keys: of the pairs before.
    """
    parts, key = sample.parts, f"{place.parent.name}/{sample.key}"
    suffix = next((s for s in IMAGE_SUFFIXES if s in parts), None)
    if suffix is None or not any(s in parts for s in CAPTIONS):
        # it may be what was meant: without it there is no pair
        found.left_out += [(name, DOTTED) for name in sample.dotted]
    else:
        found.passed_over["further files of a sample"] += len(sample.dotted)
    if suffix is None:
        found.left_out += [(key, NO_IMAGE)] if parts else []
        return False
    if sample.key in keys:
        found.left_out.append((key, AGAIN))
        return False
    image, num = place.with_suffix(suffix), len(found.pairs)
    found.add(key, image, _caption(parts, columns))
    if len(found.pairs) == num:
        return False
    with naming(image):
        image.write_bytes(parts[suffix])
    return True


def _caption(parts: dict[str, bytes], columns: Columns) -> Any:
    """Text; None without a caption; bytes or another value for one that is not text."""
    for suffix in CAPTION_SUFFIXES:
        if suffix in parts and columns.caption is None:
            return decoded(parts[suffix])
    if ".json" not in parts:
        return None
    try:
        row = parse_json(parts[".json"], "it")
        return columns.caption_of(row) if isinstance(row, dict) else None
    except ValueError:  # no JSON, or with two columns of one name
        return parts[".json"]


def _require_ours(shard: Path, images: Path) -> None:
    """Raise ValueError for a folder with files in it that no earlier extraction has left."""
    folder = images / stem(shard)
    if not note_of(shard, images).is_file() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}, where the images of {shard.name} would go, has files that this command did "
            "not write: name another folder with --images"
        )


def _earlier(shard: Path, images: Path, columns: Columns) -> Found | None:
    """What an earlier extraction of the same shard found; None when it is to be done."""
    file, folder = note_of(shard, images), images / stem(shard)
    if not file.is_file():
        return None
    try:
        tree = read_json(file)
        if tree["of"] != _identity(shard, columns) or "pairs" not in tree:
            return None
        found = Found(passed_over=Counter(tree["passed_over"]))
        found.left_out = [(name, reason) for name, reason in tree["left_out"]]
        for key, name, caption in tree["pairs"]:
            found.add(key, folder / name, caption)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no note of a shard, or damaged: name another --images, or remove it to "
            f"extract anew ({error})"
        ) from error
    return found


def _begin(shard: Path, images: Path, columns: Columns) -> None:
    """The folder of a shard's images, and the note that says whose it is."""
    (images / stem(shard)).mkdir(parents=True, exist_ok=True)
    write_whole(note_of(shard, images), json.dumps({"of": _identity(shard, columns)}) + "\n")


def _remember(shard: Path, images: Path, columns: Columns, found: Found) -> None:
    tree = {
        "of": _identity(shard, columns),
        "pairs": [(pair.key, pair.image.name, pair.caption) for pair in found.pairs],
        "left_out": found.left_out,
        "passed_over": found.passed_over,
    }
    write_whole(note_of(shard, images), json.dumps(tree) + "\n")


def _identity(shard: Path, columns: Columns) -> list[Any]:
    """Equal where the same shard is read in the same way."""
    stat = shard.stat()
    caption = columns.caption or "/".join(CAPTION_COLUMNS)
    return [FORMAT, shard.name, stat.st_size, stat.st_mtime_ns, caption]
