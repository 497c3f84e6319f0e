"""SD3.5 Medium and Large on the command line: StableDiffusion3Pipeline with a student inside."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.core.levels import SAME_SIGMA, SIGMAS
from senseflow.teachers.family import (
    Family,
    Sides,
    StockSampling,
    base_config,
    stated_length,
    vae_factor,
)
from senseflow.teachers.flow import make_scheduler, sample, stock_flow

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusion3Pipeline
    from torch import nn

ANCHORS = [1.0, 0.9, 0.75, 0.5]  # shift 3 of 1, .75, .5, .25
SIDE = 1024  # pixels
T5_LENGTH = 256  # the pipeline's default
NUM_TIMES = 1000  # of the scheduler


def sides(base: Path, config: dict[str, Any] | None) -> Sides:
    """Multiples of a patch in pixels, as far as the table of positions reaches."""
    config = config or base_config(base, "transformer")
    factor, patch = vae_factor(base), config.get("patch_size", 2)
    default = config["sample_size"] * factor if "sample_size" in config else SIDE
    places = config.get("pos_embed_max_size")
    return Sides(factor * patch, default, places and places * factor * patch)


def is_medium(base: Path) -> bool:
    """Medium's first blocks have dual attention; a base without its transformer may be either."""
    config = base_config(base, "transformer")
    return not config or bool(config.get("dual_attention_layers"))


def is_large(base: Path) -> bool:
    """Large has no dual attention."""
    return not base_config(base, "transformer").get("dual_attention_layers")


def t5_length(base: Path) -> int:
    """256 for SD3.5."""
    return stated_length(base / "tokenizer_3", T5_LENGTH)


def open_pipeline(
    base: Path, network: "nn.Module | None", dtype: "torch.dtype"
) -> "StableDiffusion3Pipeline":
    """The base's pipeline; with a network, the base's own transformer is not read."""
    from diffusers import StableDiffusion3Pipeline

    replaced = {} if network is None else {"transformer": network}
    return StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=dtype, **replaced)


def stock_sampling(anchors: tuple[float, ...]) -> StockSampling:
    """By the number of steps alone where a stretched shift gives the anchors, else by sigmas.

    StableDiffusion3Pipeline spaces the sigmas of its steps evenly from 1 to the least that its
    scheduler knows; the scheduler shifts them, and stretches 1 - sigma to end at `shift_terminal`.
    """
    from senseflow.teachers.schedulers import stock_sigmas

    terminal = anchors[-1] if len(anchors) > 1 else None
    by_number = {"num_inference_steps": len(anchors)}
    found = stock_flow(by_number, stretched_shift(anchors), terminal)
    made = stock_sigmas(found.changes, len(anchors))
    fits = all(abs(a - b) < SAME_SIGMA for a, b in zip(anchors, made, strict=True))
    return found if fits else stock_flow({"sigmas": list(anchors)})


def rounded(anchors: tuple[float, ...], levels: list[float]) -> list[float]:
    """The anchors among `levels` as that scheduler makes them."""
    from senseflow.teachers.schedulers import as_made, stock_sigmas

    stock = stock_sampling(anchors)
    if "sigmas" in stock.levels:
        return levels
    made = dict(zip(anchors, stock_sigmas(stock.changes, len(anchors)), strict=True))
    return as_made(levels, [made.get(level, level) for level in levels])


def stretched_shift(anchors: tuple[float, ...]) -> float:
    """The shift s that, stretched, gives the second anchor; the others follow where one shift
    makes them all.

    Step k of K - 1, q = k / (K - 1), lies at u = 1 - (1 - e) q, e = s / (N + s - 1) being the least
    sigma of N. The part of the way from 1 to the last anchor that it has gone is then
    g = q (1 - c) / (1 - c q), c = (s - 1) (N - 1) / (s (N + s - 1)), quadratic in s.
    """
    if len(anchors) < 3:
        return 1.0
    q, g = 1 / (len(anchors) - 1), (1 - anchors[1]) / (1 - anchors[-1])
    c, most = (q - g) / (q * (1 - g)), NUM_TIMES - 1
    half = (1 - c) * most
    root = half * half - 4 * c * most
    return 2 * most / (half + math.sqrt(root)) if root >= 0 else 1.0  # else no shift does it


SD35 = Family(
    name="sd35",
    title="SD3.5 Medium",
    script="scripts_sd35/test_senseflow_sd35.py",
    pipeline_class="StableDiffusion3Pipeline",
    network_class="SD3Transformer2DModel",
    component="transformer",
    is_this_size=is_medium,
    t5_length=t5_length,
    key_mark="pos_embed.proj.",
    blocks=("JointTransformerBlock",),
    base_flag="--sd35_ckpt",
    config_flag="--transformer_config",
    levels=SIGMAS,
    teacher_steps=40,
    teacher_guidance=4.5,
    default_anchors=lambda base: ANCHORS,
    sides=sides,
    make_scheduler=make_scheduler,
    open_pipeline=open_pipeline,
    sample=sample,
    stock_sampling=stock_sampling,
    rounded=rounded,
)

SD35_LARGE = dataclasses.replace(
    SD35,
    title="SD3.5 Large",
    script="scripts_sd35/test_senseflow_sd35_large.py",
    teacher_steps=50,
    teacher_guidance=3.5,
    is_this_size=is_large,
)
