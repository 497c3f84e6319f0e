"""Folders of pictures as sampling leaves them; light, because ranks import it too."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

PROMPTS = [f"a {colour} fox" for colour in ("red", "blue", "green", "white", "black")]


def draw(number: int, size: tuple[int, int] = (340, 340)) -> Image.Image:
    """A picture of its own for each number: noise over a gradient; size is width, height."""
    random = np.random.default_rng(number)
    slope = np.linspace(*random.random((2, 3)) * 175, size[0])[None]
    noise = random.integers(0, 80, (size[1], size[0], 3))
    return Image.fromarray((noise + slope).astype(np.uint8))


def write_images(
    folder: Path,
    prompts: list[str] = PROMPTS,
    start: int = 0,
    sidecars: bool = True,
    size: tuple[int, int] = (340, 340),
) -> Path:
    """A folder as sampling leaves it, with its grid."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(prompts):
        file = folder / f"{index:05d}_{prompt.replace(' ', '-')}.png"
        draw(start + index, size).save(file)
        if sidecars:
            told = {"prompt": prompt, "index": index, "seed": start + index}
            file.with_suffix(".json").write_text(json.dumps(told))
    draw(99, (20, 20)).save(folder / "grid.png")
    return folder


def write_seeds(folder: Path, num_seeds: int = 3, prompts: list[str] = PROMPTS) -> Path:
    """seed_0/, seed_1/, ..."""
    for seed in range(num_seeds):
        write_images(folder / f"seed_{seed}", prompts, start=100 * seed)
    return folder


def pictures(folder: Path) -> list[Image.Image]:
    """In the order of their names."""
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob("0*.png"))]
