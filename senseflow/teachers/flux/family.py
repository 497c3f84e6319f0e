"""FLUX on the command line: FluxPipeline with a student in the place of its transformer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import ROOT
from senseflow.core.levels import SIGMAS, one_shift, shifted
from senseflow.teachers.family import Family, Sides, StockSampling, stated_length, vae_factor
from senseflow.teachers.flow import make_scheduler, sample, stock_flow

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline
    from torch import nn

SIDE = 1024  # pixels
T5_LENGTH = 512


def sides(base: Path, config: dict[str, Any] | None) -> Sides:
    """Multiples of the VAE's factor times two: latents are packed 2 x 2."""
    return Sides(2 * vae_factor(base), SIDE)


def default_anchors(base: Path) -> list[float]:
    """FluxPipeline's own four steps at 1024 x 1024: 1, .9045, .7595, .5128."""
    from senseflow.teachers.schedulers import own_sigmas

    return own_sigmas(json.loads((base / "scheduler" / "scheduler_config.json").read_text()))


def t5_length(base: Path) -> int:
    """512 for FLUX.1-dev."""
    return stated_length(base / "tokenizer_2", T5_LENGTH)


def takes_guidance(config: dict[str, Any]) -> bool:
    """Students may have kept the teacher's guidance embedding."""
    return bool(config.get("guidance_embeds"))


def fit_config(config: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """The teacher's config for weights that may have dropped the guidance embedding."""
    return {**config, "guidance_embeds": any("guidance_embedder." in key for key in keys)}


def open_pipeline(base: Path, network: "nn.Module | None", dtype: "torch.dtype") -> "FluxPipeline":
    """The base's pipeline; with a network, the base's own transformer is not read."""
    from diffusers import FluxPipeline

    replaced = {} if network is None else {"transformer": network}
    return FluxPipeline.from_pretrained(base, torch_dtype=dtype, **replaced)


def stock_sampling(anchors: tuple[float, ...]) -> StockSampling:
    """FluxPipeline spaces its sigmas from 1 to 1/K, at any size, and its scheduler shifts them."""
    shift = one_shift(anchors)
    if shift is None:
        return stock_flow({"sigmas": list(anchors)})
    return stock_flow({"num_inference_steps": len(anchors)}, shift)


def rounded(anchors: tuple[float, ...], levels: list[float]) -> list[float]:
    """Sigmas as that scheduler's float32 shift makes them."""
    shift = one_shift(anchors)
    if shift is None:
        return levels
    from senseflow.teachers.schedulers import as_made, stock_sigmas

    times = [shifted(sigma, 1 / shift) for sigma in levels]
    return as_made(levels, stock_sigmas({"shift": shift}, times))


FLUX = Family(
    name="flux",
    title="FLUX.1-dev",
    script="scripts_flux/test_flux_senseflow.py",
    pipeline_class="FluxPipeline",
    network_class="FluxTransformer2DModel",
    component="transformer",
    key_mark="single_transformer_blocks.",
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    base_flag="--flux_ckpt",
    config_flag="--dit_config",
    levels=SIGMAS,
    teacher_steps=50,
    teacher_guidance=3.5,
    default_anchors=default_anchors,
    sides=sides,
    make_scheduler=make_scheduler,
    open_pipeline=open_pipeline,
    sample=sample,
    t5_length=t5_length,
    last_config=ROOT / "exp_flux" / "flux-wo-guidance-embed" / "transformer" / "config.json",
    takes_guidance=takes_guidance,
    fit_config=fit_config,
    stock_sampling=stock_sampling,
    rounded=rounded,
)
