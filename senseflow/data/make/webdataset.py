"""Images with captions in WebDataset shards, extracted to a folder.

The files of a sample stand one after the other in a tar and share their name up to the first dot.
A shard is read once, as a stream, one sample in memory. What was found in it is written beside the
images when the shard is done, so that the same command goes on with the next.
"""

import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from senseflow.common.files import write_whole
from senseflow.data.make.captioned import (
    CAPTION_COLUMNS,
    CAPTION_SUFFIXES,
    NO_IMAGE,
    Columns,
    Found,
    decoded,
)

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = (*CAPTION_SUFFIXES, ".json")  # the first that is there
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
BLOCK = 512  # bytes; two empty ones end a tar
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Parts = dict[str, bytes]  # the files of one sample that are of use, by suffix


def expand(words: list[str]) -> list[Path]:
    """The files that `a-{000..010}.tar` stands for, in order; raises ValueError for a reversed."""
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
    samples before the damage are taken, and they are read again the next time.
    """
    whole, damaged = Found(), []
    for shard in tqdm(shards, unit="shard"):
        found = _earlier(shard, images, columns)
        if found is None:
            found, reason = extract(shard, images / stem(shard), columns)
            if reason:
                damaged.append((shard, reason))
            else:
                _remember(shard, images, columns, found)
        whole.extend(found)
    return whole, damaged


def extract(shard: Path, folder: Path, columns: Columns) -> tuple[Found, str | None]:
    """Write the images of one shard; what it holds, and what is wrong with it."""
    found = Found()
    folder.mkdir(parents=True, exist_ok=True)
    samples = enumerate(read_samples(shard, found.passed_over))
    while True:
        try:
            number, (key, parts) = next(samples)
        except StopIteration:
            return found, None
        except DAMAGE as error:
            return found, f"damaged: {error}"
        _add(found, folder / f"{number:06d}", f"{folder.name}/{key}", parts, columns)


def read_samples(shard: Path, passed_over: Counter[str]) -> Iterator[tuple[str, Parts]]:
    """Key and files of each sample of a tar, in order.

    Raises one of DAMAGE where it is cut short or damaged. passed_over: counts the files of other
    kinds.
    """
    before, parts = "", Parts()
    with tarfile.open(shard, "r|*") as tar:
        while (member := tar.next()) is not None:
            # a stream never goes back to the files before; tarfile would keep them all
            tar.members.clear()  # type: ignore[attr-defined]  # no name of its stubs
            path = PurePosixPath(member.name)
            if not member.isfile() or path.name.startswith("."):
                passed_over["hidden"] += member.isfile()
                continue
            name, _, ending = path.name.partition(".")
            key, suffix = str(path.with_name(name)), f".{ending.lower()}"
            if suffix not in IMAGES + CAPTIONS:
                passed_over[suffix] += 1
                continue
            if parts and key != before:
                yield before, parts
                parts = {}
            opened = tar.extractfile(member)
            assert opened is not None, "a regular file"
            before, parts[suffix] = key, opened.read()
    if parts:
        yield before, parts
    _require_end(shard)


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


def _add(found: Found, place: Path, key: str, parts: Parts, columns: Columns) -> None:
    """Put a sample's image on the disk and the pair among those found.

    place: of the image without its suffix; its key may be any text.
    """
    suffix = next((s for s in IMAGES if s in parts), None)
    if suffix is None:
        found.left_out.append((key, NO_IMAGE))
        return
    image, num = place.with_suffix(suffix), len(found.pairs)
    found.add(key, image, _caption(parts, columns))
    if len(found.pairs) > num:
        image.write_bytes(parts[suffix])


def _caption(parts: Parts, columns: Columns) -> Any:
    """Text; None without a caption; bytes or another value for one that is not text."""
    for suffix in CAPTION_SUFFIXES:
        if suffix in parts and columns.caption is None:
            return decoded(parts[suffix])
    if ".json" not in parts:
        return None
    try:
        row = json.loads(parts[".json"])
    except ValueError:
        return parts[".json"]
    return columns.caption_of(row) if isinstance(row, dict) else None


def _earlier(shard: Path, images: Path, columns: Columns) -> Found | None:
    """What an earlier extraction of the same shard found; None when it is to be done."""
    file = note_of(shard, images)
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, remove it to extract anew: {error}") from error
    if tree["of"] != _identity(shard, columns):
        return None
    found = Found(passed_over=Counter(tree["passed_over"]))
    found.left_out = [(name, reason) for name, reason in tree["left_out"]]
    for key, name, caption in tree["pairs"]:
        found.add(key, images / stem(shard) / name, caption)
    return found


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
    return [shard.name, stat.st_size, stat.st_mtime_ns, caption]
