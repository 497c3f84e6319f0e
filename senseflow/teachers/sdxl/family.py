"""SDXL on the command line: StableDiffusionXLPipeline with a student in the place of its UNet.

SenseFlow's and DMD2's students are sampled in one way.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.core.levels import TIMESTEPS
from senseflow.teachers.family import Family, Plan, Sides, StockSampling, base_config, vae_factor

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin, StableDiffusionXLPipeline
    from PIL import Image
    from torch import nn

ANCHORS: list[float] = [999, 749, 499, 249]
SIDE = 1024  # pixels
MULTIPLE = 8  # pixels: what the pipeline asks of a side
NUM_TIMES = 1000  # of the scheduler
NO_GUIDANCE = 0.0  # the pipeline then leaves out the unconditional half


def sides(base: Path, config: dict[str, Any] | None) -> Sides:
    """Multiples of 8 and of the VAE's factor."""
    config = config or base_config(base, "unet")
    factor = vae_factor(base)
    default = config["sample_size"] * factor if "sample_size" in config else SIDE
    return Sides(math.lcm(MULTIPLE, factor), default)


def make_scheduler(own: "SchedulerMixin", plan: Plan) -> "SchedulerMixin":
    """x0: LCM's; euler: the base's own for a teacher, DDIM with eta 0 for a student.

    Euler's steps in x / alpha over sigma / alpha are DDIM's; `leading` makes their first sample,
    scaled for the network, unit noise, as the student was trained.
    """
    from diffusers import EulerDiscreteScheduler

    from senseflow.teachers.schedulers import Float32LCMScheduler

    if plan.sampler == "x0":
        # Its "original" schedule is only there to warn of timesteps that are not on it.
        num = plan.steps if plan.levels is None else own.config["num_train_timesteps"]
        return Float32LCMScheduler.from_config(own.config, original_inference_steps=num)
    if plan.levels is None:
        return own
    return EulerDiscreteScheduler.from_config(
        own.config,
        timestep_spacing="leading",
        timestep_type="discrete",
        interpolation_type="linear",
        final_sigmas_type="zero",
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
    )


def open_pipeline(
    base: Path, network: "nn.Module | None", dtype: "torch.dtype"
) -> "StableDiffusionXLPipeline":
    """The base's pipeline; with a network, the base's own UNet is not read.

    A VAE that says `force_upcast` is read in float32. The pipeline itself casts such a VAE up from
    float16, after its weights were rounded, and leaves it in bfloat16.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    replaced = {} if network is None else {"unet": network}
    upcast = base_config(base, "vae").get("force_upcast", True)
    dtypes = {"default": dtype, "vae": torch.float32 if upcast else dtype}
    return StableDiffusionXLPipeline.from_pretrained(
        base, torch_dtype=dtypes, add_watermarker=False, **replaced
    )


def sample(
    pipeline: "StableDiffusionXLPipeline",
    prompts: list[str],
    generators: list["torch.Generator"],
    plan: Plan,
) -> list["Image.Image"]:
    """One batch through StableDiffusionXLPipeline's own call; CFG for a teacher alone."""
    images: list[Image.Image] = pipeline(
        prompts,
        height=plan.height,
        width=plan.width,
        num_inference_steps=plan.steps,
        timesteps=plan.levels,
        guidance_scale=NO_GUIDANCE if plan.guidance is None else plan.guidance,
        generator=generators,
        callback_on_step_end=_cast_for_vae,
    ).images
    return images


def _cast_for_vae(
    pipeline: "StableDiffusionXLPipeline",
    step: int,
    timestep: "torch.Tensor",
    tensors: dict[str, "torch.Tensor"],
) -> dict[str, "torch.Tensor"]:
    """The last latents in the VAE's type, which may be wider than the UNet's."""
    if step < pipeline.num_timesteps - 1:
        return {}
    return {"latents": tensors["latents"].to(pipeline.vae.dtype)}


def stock_sampling(anchors: tuple[float, ...]) -> StockSampling:
    """LCMScheduler's own steps where its grid of K equal stretches holds the anchors."""
    num = len(anchors)
    grid = [(num - step) * (NUM_TIMES // num) - 1 for step in range(num)]
    on_grid = list(anchors) == grid
    levels = {"num_inference_steps": num} if on_grid else {"timesteps": list(anchors)}
    changes = {"original_inference_steps": num if on_grid else NUM_TIMES}
    return StockSampling("LCMScheduler", changes, levels, NO_GUIDANCE)


SDXL = Family(
    name="sdxl",
    title="SDXL",
    script="scripts_sdxl/test_sdxl_senseflow.py",
    pipeline_class="StableDiffusionXLPipeline",
    network_class="UNet2DConditionModel",
    component="unet",
    key_mark="add_embedding.",
    blocks=("BasicTransformerBlock",),
    default_anchors=lambda base: ANCHORS,
    sides=sides,
    base_flag="--sdxl_ckpt",
    config_flag="--unet_config",
    levels=TIMESTEPS,
    teacher_steps=40,
    teacher_guidance=5.0,
    make_scheduler=make_scheduler,
    open_pipeline=open_pipeline,
    sample=sample,
    stock_sampling=stock_sampling,
)

SDXL_DMD2 = dataclasses.replace(SDXL, script="scripts_sdxl/test_sdxl_dmd2.py", method="DMD2")
