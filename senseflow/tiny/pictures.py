"""Pictures of the embedded teachers: two real handwritten digits in colour, 32x32 RGB.

The scans are the 1,797 of scikit-learn's `load_digits` (the test part of UCI optdigits, CC BY 4.0).
They are split once, 1,500 for training and 297 held out. Rendering is one batched affine warp per
digit, drawn from an explicit generator. As a command this module writes a training set in the JSON
format of the trainers, and evaluation prompts:

    python -m senseflow.tiny.pictures --output data/tiny --num 4000 --seed 0
"""

import json
import logging
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from senseflow.common.commands import exit_status, module_parser, number
from senseflow.common.fields import Bounds, Count, FieldError, Seed
from senseflow.common.files import require_writable
from senseflow.common.pictures import to_pil
from senseflow.tiny.captions import ATTRIBUTES, captions_of, split_scenes

logger = logging.getLogger("senseflow")

SIZE = 32
NUM_TRAIN_SCANS = 1500
_SPLIT_SEED = 1797
_SCAN_SIZE = 8
_INK_SHARPNESS = 1.6

# RGB in [0, 1], in the order of captions.COLOURS and captions.BACKGROUNDS.
DIGIT_RGB = torch.tensor(
    [
        [0.88, 0.10, 0.10],
        [0.08, 0.60, 0.18],
        [0.10, 0.24, 0.90],
        [0.97, 0.82, 0.06],
        [0.56, 0.14, 0.70],
        [0.05, 0.76, 0.90],
    ]
)
BACKGROUND_RGB = torch.tensor(
    [[0.97, 0.97, 0.97], [0.04, 0.04, 0.04], [0.52, 0.52, 0.52], [1.00, 0.72, 0.80]]
)
# Centres in pixels of the two digits, by relation: (relation, digit, (x, y)).
_CENTRES = torch.tensor([[[8.0, 16.0], [24.0, 16.0]], [[16.0, 8.0], [16.0, 24.0]]])
# Largest shift from the centre, by relation: a digit may wander along its free direction only.
_WANDER = torch.tensor([[1.0, 3.0], [3.0, 0.8]])


@lru_cache(maxsize=2)
def scans_by_digit(held_out: bool) -> tuple[torch.Tensor, ...]:
    """Ten tensors (num, 8, 8) in [0, 1]: the scans of each digit, of one side of the split."""
    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    chosen = order[NUM_TRAIN_SCANS:] if held_out else order[:NUM_TRAIN_SCANS]
    images = torch.from_numpy(digits.images[chosen]).float() / 16
    labels = torch.from_numpy(digits.target[chosen])
    return tuple(images[labels == digit] for digit in range(10))


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> torch.Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def _draw_scans(digits: torch.Tensor, held_out: bool, generator: torch.Generator) -> torch.Tensor:
    """A random scan (B, 8, 8) for each of `digits` (B,)."""
    by_digit = scans_by_digit(held_out)
    counts = torch.tensor([len(scans) for scans in by_digit])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])
    pick = (torch.rand(len(digits), generator=generator) * counts[digits]).long()
    return torch.cat(by_digit)[starts[digits] + pick]


def _warp(scans: torch.Tensor, centres: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Ink (B, 32, 32) in [0, 1]: `scans` enlarged, jittered, moved to `centres` (B, 2) pixels."""
    num = len(scans)
    angle = _uniform((num,), math.radians(7), generator)
    shear = _uniform((num,), 0.12, generator)
    pixels_per_cell = 1.82 + _uniform((num, 2), 0.12, generator)
    # Output to input: undo the move, the rotation, the shear and the enlargement, in [-1, 1] units.
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack(
        [torch.stack([cos + shear * sin, sin - shear * cos], 1), torch.stack([-sin, cos], 1)], 1
    )
    linear = linear * (SIZE / _SCAN_SIZE / pixels_per_cell)[:, :, None]
    shift = -linear @ (centres * (2 / SIZE) - 1)[:, :, None]
    grid = F.affine_grid(torch.cat([linear, shift], 2), [num, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(scans[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
    return ((ink - 0.5) * _INK_SHARPNESS + 0.5).clamp(0, 1)


def render(
    attributes: torch.Tensor, generator: torch.Generator, held_out_scans: bool = False
) -> torch.Tensor:
    """Pictures (B, 3, 32, 32) in [-1, 1] of scenes (B, 6), with freshly drawn scans and jitter."""
    by_name = dict(zip(ATTRIBUTES, attributes.unbind(1), strict=True))
    num, relation = len(attributes), by_name["relation"]
    shade = 1 + _uniform((num, 3, 1), 0.06, generator)
    picture = BACKGROUND_RGB[by_name["background"]] * shade[:, 0]
    picture = picture[:, :, None, None].expand(num, 3, SIZE, SIZE)
    for place, name in enumerate("ab"):
        scans = _draw_scans(by_name[f"digit_{name}"], held_out_scans, generator)
        centres = _CENTRES[relation, place] + _WANDER[relation] * _uniform((num, 2), 1, generator)
        ink = _warp(scans, centres, generator)[:, None]
        colour = DIGIT_RGB[by_name[f"colour_{name}"]] * shade[:, place + 1]
        picture = picture * (1 - ink) + colour[:, :, None, None] * ink
    return picture.clamp(0, 1) * 2 - 1


def draw_scenes(pool: torch.Tensor, num: int, generator: torch.Generator) -> torch.Tensor:
    """`num` scenes (num, 6), drawn with replacement from `pool` (P, 6)."""
    return pool[torch.randint(len(pool), (num,), generator=generator)]


def evaluation_prompts(num: int, held_out: bool) -> list[str]:
    """The first `num` prompts of a fixed shuffle of the training or of the held-out scenes."""
    pool = split_scenes()[int(held_out)]
    if num > len(pool):
        raise FieldError("num_prompts", f"{num}: there are {len(pool)} such prompts")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return captions_of(pool[order[:num]])


def write_dataset(
    output: Path, num: int, seed: int, num_prompts: int = 1000, sidecars: bool = False
) -> None:
    """Write `num` training pictures, data.json that lists them, and two files of prompts.

    data.json holds {"keys", "image_paths" (relative to it), "prompts"}; prompts_train.txt and
    prompts_heldout.txt hold `num_prompts` evaluation prompts each, one a line. With `sidecars` the
    caption of x.png stands in x.txt too.
    """
    prompts = {
        name: evaluation_prompts(num_prompts, held_out)
        for name, held_out in (("train", False), ("heldout", True))
    }
    generator = torch.Generator().manual_seed(seed)
    attributes = draw_scenes(split_scenes()[0], num, generator)
    keys = [f"{index:06d}" for index in range(num)]
    paths = [f"images/{key}.png" for key in keys]
    (output / "images").mkdir(parents=True, exist_ok=True)
    for path, image in zip(paths, to_pil(render(attributes, generator)), strict=True):
        image.save(output / path)
    listing = {"keys": keys, "image_paths": paths, "prompts": captions_of(attributes)}
    (output / "data.json").write_text(json.dumps(listing))
    for path, prompt in zip(paths, listing["prompts"], strict=True) if sidecars else ():
        (output / path).with_suffix(".txt").write_text(f"{prompt}\n")
    for name, lines in prompts.items():
        (output / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Parse and write; returns the exit status: 2 for wrong input, said in one line."""
    parser = module_parser(
        "senseflow.tiny.pictures",
        "Write coloured-digit pictures with captions, and evaluation prompts.",
        "example: python -m senseflow.tiny.pictures --output data/tiny --num 4000 --seed 0",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--num",
        type=number(Annotated[int, Bounds(1, 10**6)]),
        default=4000,
        help="number of training pictures",
    )
    parser.add_argument(
        "--seed", type=number(Seed), default=0, help="seed of scenes, scans and jitter"
    )
    parser.add_argument(
        "--num_prompts", type=number(Count), default=1000, help="evaluation prompts per file"
    )
    parser.add_argument(
        "--sidecars", action="store_true", help="captions in x.txt beside x.png too"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        require_writable("--output", args.output)
        write_dataset(**vars(args))
        logger.info(
            "%s: %d pictures with captions; beside it prompts_train.txt and prompts_heldout.txt, "
            "%d prompts each",
            args.output / "data.json", args.num, args.num_prompts,
        )  # fmt: skip

    return exit_status(work, "the pictures are not all there")


if __name__ == "__main__":
    sys.exit(main())
