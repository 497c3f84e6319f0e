"""FLUX on the command line: FluxPipeline with a student in the place of its transformer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.sampling.plan import ROOT, Family, Plan

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline
    from PIL import Image
    from torch import nn


def size_multiple(base: Path) -> int:
    """The VAE's factor times two: latents are packed 2 x 2."""
    blocks = json.loads((base / "vae" / "config.json").read_text())["block_out_channels"]
    return 2 * 2 ** (len(blocks) - 1)


def fit_config(config: dict[str, Any], has_guidance: bool) -> dict[str, Any]:
    """The teacher's config for weights that may have dropped the guidance embedding."""
    return {**config, "guidance_embeds": has_guidance}


def open_pipeline(base: Path, network: "nn.Module | None", dtype: "torch.dtype") -> "FluxPipeline":
    """The base's pipeline; with a network, the base's own transformer is not read."""
    from diffusers import FluxPipeline

    replaced = {} if network is None else {"transformer": network}
    return FluxPipeline.from_pretrained(base, torch_dtype=dtype, **replaced)


def sample(
    pipeline: "FluxPipeline", prompts: list[str], generators: list["torch.Generator"], plan: Plan
) -> list["Image.Image"]:
    """One batch through FluxPipeline's own call."""
    return pipeline(
        prompts,
        height=plan.height,
        width=plan.width,
        num_inference_steps=plan.steps,
        sigmas=plan.sigmas,
        guidance_scale=plan.guidance,
        max_sequence_length=plan.max_sequence_length,
        generator=generators,
    ).images


FLUX = Family(
    name="flux",
    title="FLUX.1-dev",
    pipeline_class="FluxPipeline",
    component="transformer",
    base_flag="--flux_ckpt",
    config_flag="--dit_config",
    default_config=ROOT / "exp_flux" / "flux-wo-guidance-embed" / "transformer" / "config.json",
    size_multiple=size_multiple,
    fit_config=fit_config,
    open_pipeline=open_pipeline,
    sample=sample,
)
