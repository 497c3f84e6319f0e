"""Converts images or DMD2's shards of latents to the LMDB of latents that the trainers read.

Write an LMDB of VAE latents and prompts, in the format of DMD2, from images (resized to cover the
resolution and cropped in the middle) or from DMD2's .pt shards. Samples that cannot be read are
skipped, counted and listed. Stopped in any way, the same command goes on where it was; only a
finished LMDB has latents_shape, without which no trainer takes it.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from senseflow.common.commands import Parser, exit_status, module_parser, number
from senseflow.common.fields import Bounds, CountOrNone, Seed, Threads
from senseflow.common.files import require_own, require_writable
from senseflow.data.image_files import IMAGE_SUFFIXES, files_below
from senseflow.teachers.folder import vae_factor

if TYPE_CHECKING:
    from senseflow.data.convert.conversion import Posterior, Source

logger = logging.getLogger("senseflow")

DATA = "data.mdb"  # LMDB's own name
JSON, SHARDS, PICTURES = "JSON data set", "shards of latents", "folder of images"
SHARD_SUFFIX = ".pt"
Side = Annotated[int, Bounds(1, 2**14)]  # pixels
Batch = Annotated[int, Bounds(1, 1024)]  # per call of the VAE: no memory holds more
EXAMPLES = """examples:
  python -m senseflow.data.convert data.json --output data/lmdb --teacher /path/to/sdxl --resolution 1024
  python -m senseflow.data.convert pictures/ --output data/lmdb --teacher /path/to/FLUX.1-dev --resolution 768 1360
  python -m senseflow.data.convert sdxl_vae_latents_laion_500k/ --output data/lmdb --teacher /path/to/sdxl
"""  # noqa: E501
IMAGE_FLAGS = ("resolution", "mode", "seed", "dtype", "device", "batch_size", "num_workers")
DEFAULTS = {"seed": 0, "dtype": "float32", "batch_size": 8, "num_workers": 4}


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, convert; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        kind = find_kind(args.input)
        check(args, kind)
        run(args, kind)

    return exit_status(work, "the same command goes on from what is stored")


def build_parser() -> Parser:
    """The flags; those of images get their DEFAULTS in `check`, which sees which were given."""
    parser = module_parser("senseflow.data.convert", __doc__, EXAMPLES)
    parser.add_argument(
        "input", type=Path, metavar="INPUT",
        help="a .json with keys, image_paths, prompts; a folder of images with captions, as "
        "senseflow.data.make takes it; a .pt shard of DMD2, or a folder of them",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the LMDB")
    parser.add_argument(
        "--teacher", type=Path, metavar="DIR",
        help="diffusers folder whose vae/ encodes the images; with shards: the teacher whose VAE "
        "made them, to have that checked at training",
    )  # fmt: skip
    parser.add_argument(
        "--max_unreadable", type=number(CountOrNone), default=100, metavar="N",
        help="stop when more samples cannot be read (100)",
    )  # fmt: skip
    _add_image_flags(parser)
    parser.add_argument(
        "--unscaled", action="store_true",
        help="shards only: their latents are not multiplied by the scaling factor yet (DMD2's are)",
    )  # fmt: skip
    return parser


def _add_image_flags(parser: Parser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--resolution",
        type=number(Side),
        nargs="+",
        metavar="PIXELS",
        help="one side, or height and width",
    )
    group.add_argument(
        "--mode", action="store_true", default=None,
        help="the posterior's mean; by default one sample of it, which is what the teachers were "
        "trained on, what DMD2 stored, and what training on images draws",
    )  # fmt: skip
    group.add_argument("--seed", type=number(Seed), help="of the posterior's samples (0)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="the VAE computes in (float32; SDXL's VAE overflows in float16)",
    )  # fmt: skip
    group.add_argument("--device", help="(cuda if there is one, else cpu)")
    group.add_argument(
        "--batch_size",
        type=number(Batch),
        help="images per call of the VAE (8); may be another when going on",
    )
    group.add_argument("--num_workers", type=number(Threads), help="threads that read images (4)")


def find_kind(path: Path) -> str:
    """What INPUT is; raises ValueError saying what was found and what is expected."""
    expected = f"expected a .json, a {SHARD_SUFFIX} shard, or a folder of images or shards"
    if not path.exists():
        raise ValueError(f"{path} does not exist; {expected}")
    if not path.is_dir():
        kinds = {".json": JSON, SHARD_SUFFIX: SHARDS}
        if path.suffix not in kinds:
            raise ValueError(f"{path} is a file of the type {path.suffix or 'none'}; {expected}")
        if not path.is_file():
            raise ValueError(f"{path} is a pipe or a device; {expected}")
        return kinds[path.suffix]
    shards, images = any(path.glob(f"*{SHARD_SUFFIX}")), any(find_images(path))
    if shards == images:
        found = "both images and shards" if shards else "neither images nor shards"
        raise ValueError(f"{path} holds {found}; {expected}")
    return SHARDS if shards else PICTURES


def find_images(folder: Path) -> Iterator[Path]:
    """Image files in a folder and below it, in any order."""
    files = map(folder.joinpath, files_below(folder, Counter()))
    return (file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def check(args: argparse.Namespace, kind: str) -> None:
    """What needs no network to be read, and defaults; raises ValueError."""
    require_writable("--output", args.output)
    require_own("--output", args.output, DATA)
    given = [f"--{name}" for name in IMAGE_FLAGS if getattr(args, name) is not None]
    if kind == SHARDS and given:
        raise ValueError(f"{', '.join(given)}: {args.input} holds latents already, not images")
    if kind != SHARDS:
        _check_images(args)
    if args.teacher is not None:
        _check_vae(args)


def _check_images(args: argparse.Namespace) -> None:
    if args.unscaled:
        raise ValueError(f"--unscaled is of shards; {args.input} holds images")
    for name in ("teacher", "resolution"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is needed to encode images")
    if len(args.resolution) > 2:
        raise ValueError(f"--resolution {args.resolution}: one side, or height and width")
    args.resolution = (args.resolution[0], args.resolution[-1])
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _check_vae(args: argparse.Namespace) -> None:
    file = args.teacher / "vae" / "config.json"
    if not file.is_file():
        raise ValueError(f"--teacher {args.teacher} is not a diffusers folder: it has no {file}")
    if args.resolution:
        factor = vae_factor(args.teacher)
        if any(side % factor for side in args.resolution):
            raise ValueError(
                f"--resolution {list(args.resolution)}: both sides must be multiples of {factor}"
            )


def run(args: argparse.Namespace, kind: str) -> None:
    """Convert all of it, or what is left of it."""
    from senseflow.data.convert.conversion import convert  # torch and diffusers, seconds
    from senseflow.data.convert.latents_writer import LatentsWriter

    source = open_source(args, kind)
    settings = {**source.settings(), "scaled": not args.unscaled}
    with LatentsWriter(args.output, settings) as writer:
        if writer.finished:
            logger.info("%s is finished already", args.output)
        else:
            convert(source, writer, args.max_unreadable)
            writer.finish(not args.unscaled, source.scaling)
        progress = writer.progress
        logger.info("%d rows of latents %s in %s", progress.num_rows, progress.shape, args.output)
        if progress.num_skipped:
            logger.info("%d skipped, listed in %s", progress.num_skipped, writer.list_skipped())


def open_source(args: argparse.Namespace, kind: str) -> "Source":
    """The samples that INPUT holds."""
    from senseflow.data.convert import conversion

    vae = args.teacher / "vae" if args.teacher else None
    if kind == SHARDS:
        files = sorted(args.input.glob(f"*{SHARD_SUFFIX}")) if args.input.is_dir() else [args.input]
        return conversion.Shards.open(files, vae)
    if kind == JSON:
        pictures = conversion.json_pictures(args.input)
    else:
        pictures = conversion.captioned_pictures(args.input)
    assert vae is not None, "checked by check"
    conversion.require_captions(pictures, args.max_unreadable)
    posterior: Posterior = "mode" if args.mode else "sample"
    encoder = conversion.Encoder.load(vae, posterior, args.seed, args.dtype, args.device)
    return conversion.Pictures(
        pictures, encoder, args.resolution, args.batch_size, args.num_workers
    )


if __name__ == "__main__":
    sys.exit(main())
