"""Makes the JSON data set that the trainers read from images with captions.

Write data.json (keys, image_paths, prompts) of images with captions. SOURCE is
  a folder (and those below it): x.jpg with x.txt or x.caption beside it, or a metadata.jsonl, .csv,
  .tsv or .parquet with columns file_name and text;
  such a table alone, with image paths relative to it;
  WebDataset shards (.tar; an image with txt or json), or a folder of them: their images are
  extracted, and the same command goes on where it was stopped. As there, a sample's name ends at
  its first dot.
Images without a caption and captions without an image are left out, counted and listed.

The next step is `python -m senseflow.data.check`, which opens the images.
"""

import argparse
import logging
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from senseflow.common.commands import Parser, exit_status, module_parser, number, path_given
from senseflow.common.fields import CountOrNone
from senseflow.common.files import require_writable, write_whole
from senseflow.common.tables import SUFFIXES
from senseflow.data.image_lists import one_line, read_lists, write_lists
from senseflow.data.make.captioned import (
    CAPTION_COLUMNS,
    METADATA_SUFFIXES,
    NO_CAPTION,
    NO_IMAGE,
    Columns,
    Found,
    from_folder,
    from_table,
)
from senseflow.data.make.webdataset import DOTTED, expand, from_shards, note_of, require_shards

logger = logging.getLogger("senseflow")

EXAMPLES = """examples:
  python -m senseflow.data.make pictures/ --output pictures/data.json
  python -m senseflow.data.make captions.csv --file_column file --caption_column blip --output data.json
  python -m senseflow.data.make 'shards/{000000..000010}.tar' --output data/data.json
"""  # noqa: E501
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
MOST_SAID = 8  # kinds of files
EXPECTED = f"expected a folder of images, a table ({', '.join(SUFFIXES)}), or .tar shards"


def main(arguments: list[str] | None = None) -> int:
    """Parse, look, write; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(lambda: run(args), "extracted shards are kept, the same command goes on")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.data.make", __doc__, EXAMPLES)
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="see above")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="JSON",
        help="an earlier one is replaced; image paths in it are relative to it",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path, metavar="DIR",
        help="shards: where their images go (default: images/ beside the JSON)",
    )  # fmt: skip
    parser.add_argument("--file_column", metavar="NAME", help="tables: the image (file_name)")
    parser.add_argument(
        "--caption_column", metavar="NAME",
        help="tables and shards' json: the caption (text, caption or prompt)",
    )  # fmt: skip
    parser.add_argument(
        "--max_left_out", type=number(CountOrNone), default=100, metavar="N",
        help="stop, with the list written, when more is left out (100)",
    )  # fmt: skip
    parser.add_argument(
        "--max_damaged", type=number(CountOrNone), default=0, metavar="N",
        help="shards that may be damaged; what stands before the damage is taken (0)",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for sources and files that cannot be used."""
    check(args)
    columns = Columns(args.file_column, args.caption_column)
    kind, paths = find_sources(args.source)
    write(args, *look(args, kind, paths, columns))


def check(args: argparse.Namespace) -> None:
    """The flags and the output; raises ValueError."""
    if args.output.suffix != ".json" or args.output.is_dir():
        raise ValueError(f"--output {args.output}: name a file that ends in .json")
    require_writable("--output", args.output.parent)
    if args.output.exists():
        try:
            read_lists(args.output)
        except ValueError as error:
            raise ValueError(f"--output is there and no data set, left as it is: {error}") from None


def find_sources(words: list[str]) -> tuple[str, list[Path]]:
    """folder, table or shards, and their paths; raises ValueError for anything else."""
    for word in words:
        if not word.strip():
            raise ValueError(f"SOURCE is empty: {EXPECTED}")
        if "://" in word or word.startswith("pipe:"):
            raise ValueError(f"{word} is an address: download it first; {EXPECTED}")
    paths = [path_given("SOURCE", str(path)) for path in expand(words)]
    if all(path.name.lower().endswith(SHARD_SUFFIXES) for path in paths):
        require_shards(paths)
        return "shards", paths
    if len(paths) > 1:
        raise ValueError(f"{len(paths)} sources, not all of them .tar shards: name one; {EXPECTED}")
    (path,) = paths
    if not path.exists():
        raise ValueError(f"{path} does not exist; {EXPECTED}")
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return "table", paths
    if not path.is_dir():
        kind = f"file of the type {path.suffix or 'none'}" if path.is_file() else "pipe or a device"
        raise ValueError(f"{path} is a {kind}; {EXPECTED}")
    shards = sorted(f for f in path.iterdir() if f.name.lower().endswith(SHARD_SUFFIXES))
    shards = [shard for shard in shards if not shard.name.startswith(".")]
    require_shards(shards)
    return ("shards", shards) if shards else ("folder", paths)


def look(
    args: argparse.Namespace, kind: str, paths: list[Path], columns: Columns
) -> tuple[Found, list[tuple[Path, str]]]:
    """What the sources hold, and the damaged shards among them."""
    if kind != "shards":
        if args.images:
            raise ValueError(f"--images is of shards; the images of {paths[0]} stay where they are")
        read = from_folder if kind == "folder" else from_table
        return read(paths[0], columns), []
    images = args.images or args.output.parent / "images"
    if args.output.resolve() in {note_of(shard, images).resolve() for shard in paths}:
        raise ValueError(
            f"--output {args.output} is where the note of the shard {args.output.stem} is kept: "
            "name another file, or other --images"
        )
    found, damaged = from_shards(paths, images, columns)
    if len(damaged) > args.max_damaged:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        listed = list_left_out(args.output, [(str(shard), why) for shard, why in damaged])
        raise ValueError(
            f"{len(damaged)} of {len(paths)} shards are damaged, such as {damaged[0][0]} "
            f"({damaged[0][1]}), listed in {listed}: fetch them again, or allow it with "
            "--max_damaged; the others are extracted and kept"
        )
    return found, damaged


def write(args: argparse.Namespace, found: Found, damaged: list[tuple[Path, str]]) -> None:
    """The JSON and the list of what is left out, and what both hold in words."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    broken = [(str(shard), why) for shard, why in damaged]
    listed = list_left_out(args.output, [*found.left_out, *broken])
    counts = in_words(Counter(why for _, why in found.left_out), " x ")
    said = f"{len(found.left_out)} left out ({counts}), listed in {listed}" if counts else ""
    advice = hint(found, args.caption_column)
    if len(found.left_out) > args.max_left_out:
        raise ValueError(f"{said}; --max_left_out allows {args.max_left_out}{advice}")
    if not found.pairs:
        if others := in_words(found.passed_over):
            said = f"{said}; passed over: {others}" if said else f"passed over: {others}"
        said = f"; {said}" if said else f" ({EXPECTED})"
        more = f" and {len(args.source) - 1} more" if len(args.source) > 1 else ""
        raise ValueError(f"no image with a caption in {args.source[0]}{more}{said}{advice}")
    home = args.output.parent.resolve()
    # links of an image's folders are followed, its own name is kept
    places = [pair.image.parent.resolve() / pair.image.name for pair in found.pairs]
    rows = [
        (pair.key, os.path.relpath(place, home), pair.caption)
        for pair, place in zip(found.pairs, places, strict=True)
    ]
    write_lists(args.output, rows)
    kinds = in_words(Counter(pair.image.suffix.lower() for pair in found.pairs))
    logger.info("%s: %d images with captions (%s)", args.output, len(rows), kinds)
    if found.left_out:
        logger.warning("%s%s", said, advice)
    if damaged:
        logger.warning("%d damaged shards, read up to the damage: %s", len(damaged), listed)
    if others := in_words(found.passed_over):
        logger.info("passed over: %s", others)
    file = shlex.quote(str(args.output))
    logger.info("next: python -m senseflow.data.check %s CONFIG (the YAML of your run)", file)


def in_words(counts: Counter[str], between: str = " ") -> str:
    """`3 .jpg, 1 .png`, the most frequent first: no more words for more files."""
    kinds = [(kind, num) for kind, num in counts.most_common() if num]
    said = ", ".join(f"{num}{between}{kind}" for kind, num in kinds[:MOST_SAID])
    rest = sum(num for _, num in kinds[MOST_SAID:])
    return f"{said}, {rest} of {len(kinds) - MOST_SAID} more kinds" if rest else said


def hint(found: Found, column: str | None) -> str:
    """What may be wrong where images have no caption; column: of captions, if it is named."""
    reasons: dict[str, set[str]] = {}
    for name, reason in found.left_out:
        reasons.setdefault(name, set()).add(reason)
    if any(DOTTED in one for one in reasons.values()):
        return (
            "; in a shard a sample's name ends at its first dot: rename the files, or extract the "
            "shard and name its folder, where names may have dots"
        )
    if any(both >= {NO_CAPTION, NO_IMAGE} for both in reasons.values()):
        return "; in a shard image and caption stand one after the other: tar --sort=name"
    if tables := [kind for kind in METADATA_SUFFIXES if found.passed_over[kind]]:
        kind = tables[0]
        return f"; a table of captions is called metadata{kind}, or named itself as SOURCE"
    if any(NO_CAPTION in one for one in reasons.values()):
        names = column or " or ".join(CAPTION_COLUMNS)
        return (
            "; a caption is x.txt beside x.jpg, or in a table's or json's column "
            f"{names} (--caption_column)"
        )
    return ""


def list_left_out(output: Path, left_out: list[tuple[str, str]]) -> Path:
    """Write name and reason of each, beside the JSON; without any, no list is left there."""
    file = output.with_suffix(".left_out.tsv")
    if left_out:
        rows = (f"{one_line(name)}\t{one_line(reason)}\n" for name, reason in left_out)
        write_whole(file, "".join(rows))
    else:
        file.unlink(missing_ok=True)
    return file


if __name__ == "__main__":
    sys.exit(main())
