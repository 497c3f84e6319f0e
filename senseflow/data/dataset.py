"""The data set that a path stands for."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from senseflow.common.tables import PROMPTS_ALONE, has_prompts_alone
from senseflow.data.json_images import JsonImages
from senseflow.data.latents_lmdb import DATA, LatentsLmdb, LatentsScaling
from senseflow.data.prompt_list import PromptList

DataSet = JsonImages | LatentsLmdb | PromptList


def open_dataset(
    path: Path,
    resolution: tuple[int, int],
    latent_shape: tuple[int, int, int],
    *,
    crop: Literal["center", "random"] = "center",
    seed: int = 0,
    max_unreadable: int = 100,
    latents_scaling: Callable[[], LatentsScaling],
    latents_scaled: bool | None = None,
) -> DataSet:
    """Images, latents or prompts alone, by what `path` is; nothing but lists, shapes and a few rows
    is read.

    resolution, crop, seed: of images. latent_shape (C, h, w), latents_scaling: the teacher's, which
    stored latents must fit; the latter is asked for latents alone, for it reads the VAE's weights.
    latents_scaled: see LatentsLmdb.
    Raises ValueError saying what was found and what is expected.
    """
    if path.is_dir() and (path / DATA).is_file():
        return LatentsLmdb(path, latent_shape, latents_scaling(), latents_scaled, max_unreadable)
    if path.suffix == ".json" and not path.is_dir():
        return JsonImages(path, resolution, crop, seed, max_unreadable)
    if has_prompts_alone(path) and path.is_file():
        return PromptList(path, max_unreadable)
    raise ValueError(
        f"data set {path} {_describe(path)}; expected a .json file with keys, image_paths and "
        f"prompts, the folder of an LMDB of latents (with {DATA}), or prompts alone "
        f"({', '.join(PROMPTS_ALONE)})"
    )


def _describe(path: Path) -> str:
    if not path.exists():
        return "does not exist"
    if path.name == DATA:
        return "is the file inside an LMDB: name its folder"
    if path.is_file():
        return f"is a file of the type {path.suffix or 'none'}"
    names = sorted(f.name for f in path.iterdir())
    if any(name.endswith(".pt") for name in names):
        return "is a folder of .pt files: convert them with `python -m senseflow.data.convert`"
    if lists := [name for name in names if name.endswith(".json")]:
        return f"is a folder: name a file in it, such as {lists[0]}"
    return f"is a folder with {', '.join(names[:5]) or 'nothing'} in it"
