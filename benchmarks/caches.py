"""What a cache of prompts and latents takes and saves at full size, counted without weights.

    python -m benchmarks.caches [--recipe NAME] [--output FILE.md]

The encoders of `benchmarks.full_size`, at 1024 x 1024, one sample. Bytes are those of a row of
the cache. TFLOP are counted on fake tensors; those saved per iteration weigh the VAE's encoding
with the share of iterations that begin from an image, below the top anchor, and CLIP's with the
share of anchors at which the discriminator plays. GiB are of the text encoders' weights, CLIP's
included, in the types a run holds them in.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import fake, fake_adapter, no_weights, write_folder
from senseflow.common.files import ROOT
from senseflow.config.config import Config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES, Recipe
from senseflow.config.teacher import teacher_settings
from senseflow.core.adversarial import omega
from senseflow.distill.vfm_features import PromptEncoder
from senseflow.teachers import text_encoders

COLUMNS = (
    "recipe",
    "bytes per prompt",
    "bytes per image",
    "TFLOP per prompt",
    "TFLOP per image",
    "TFLOP saved per iteration",
    "text encoders, GiB",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def count(mode: FakeTensorMode, work: partial) -> float:
    """TFLOP of a call."""
    with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def row_of(recipe: Recipe, folder: Path) -> str:
    """One recipe's line."""
    config = load_recipe(recipe, ROOT / recipe.config, [f"paths.pretrained_model={folder}"])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with patch.object(text_encoders, "component_weights", no_weights):
        adapter = fake_adapter(recipe, teacher_settings(config), mode)
    with mode, torch.no_grad():
        cond = adapter.encode_prompts(["a"])
        image = torch.empty(1, 3, *config.train.resolution)
        std = torch.empty(recipe.family.posterior_shape(teacher_settings(config)))
    prompt = count(mode, partial(adapter.encode_prompts, ["a"]))
    encode = count(mode, partial(adapter.encode_images, image))
    encoders = [v for k, v in adapter.pipeline.components.items() if k.startswith("text_encoder")]
    stored, clip = num_bytes(*cond.tensors.values()), 0.0
    if config.adversarial.in_use == "vfm":
        with torch.device("meta"):
            encoder = PromptEncoder(config.paths.clip, None, random_seed=0)
        clip = count(mode, partial(fake(encoder, mode), ["a"]))
        stored += 4 * encoder.dim
        encoders.append(encoder)
    draws = 2 if config.data.separate_real else 1
    saved = draws * prompt + encodings(config) * encode
    saved += clip * discriminator_share(recipe, config)
    weights = sum(num_bytes(*encoder.parameters()) for encoder in encoders if encoder) / 2**30
    return (
        f"| {recipe.name} | {stored:,} | {2 * std.nbytes:,} | {prompt + clip:.2f} | {encode:.2f} | "
        f"{saved:.2f} | {weights:.2f} |"
    )


def encodings(config: Config) -> float:
    """VAE encodings per iteration: of the student's input, and of real samples drawn apart."""
    below = fmean((steps - 1) / steps for steps in config.anchors.walks)
    clean = (1 - config.backward_simulation.probability) * below
    return clean + (config.adversarial.in_use == "bottleneck")


def discriminator_share(recipe: Recipe, config: Config) -> float:
    """The share of anchors at which omega is not 0."""
    settings, power = teacher_settings(config), config.adversarial.omega_power
    path = recipe.family.path(settings)
    anchors = recipe.family.anchors(settings, config.anchors.times)
    walks = [torch.tensor(anchors.of_walk(steps).times) for steps in config.anchors.walks]
    return fmean(float((omega(path, tau, power) > 0).float().mean()) for tau in walks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, help="(all)")
    parser.add_argument("--output", type=Path, help="markdown file to write the table to")
    args = parser.parse_args()
    lines = [HEADER]
    for name in [args.recipe] if args.recipe else RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), RECIPES[name])
            lines.append(row_of(RECIPES[name], Path(folder)))
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
