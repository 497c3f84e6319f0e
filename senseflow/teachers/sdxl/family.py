"""SDXL: StableDiffusionXLPipeline, a UNet that predicts noise on the variance preserving path.

Its clock is the integer step. Guidance is classifier-free, against zeros for no prompt. SenseFlow's
and DMD2's students are sampled in one way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import read_json
from senseflow.core.levels import TIMESTEPS
from senseflow.teachers.family import Family, Plan, Sides, StockSampling
from senseflow.teachers.fields import UNET, VP_SCHEDULER, autoencoder
from senseflow.teachers.folder import (
    INDEX,
    TeacherSettings,
    base_config,
    vae_factor,
)
from senseflow.teachers.published import (
    BIG_G,
    CLIP_L,
    HUB,
    SDXL_VAE,
    Encoder,
    Published,
    Terms,
)
from senseflow.teachers.sdxl.original import ORIGINAL, layer_name

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionXLPipeline
    from PIL import Image
    from torch import nn

    from senseflow.core.anchors import Anchors
    from senseflow.core.path import Path as NoisePath
    from senseflow.core.path import VPPath
    from senseflow.teachers.adapter import Networks

NAME = "stabilityai/stable-diffusion-xl-base-1.0"
SIDE = 1024  # pixels
MULTIPLE = 8  # pixels: what the pipeline asks of a side
NUM_TIMES = 1000  # of the scheduler
NUM_SIZES = 6  # original and target size, and where it was cropped
BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")  # a teacher's noise schedule
LEAST_ABAR = 1e-4  # of the last step; below it x_0 cannot be read off a prediction of noise


@dataclass(frozen=True, eq=False)
class SDXLFamily(Family):
    """SDXL base and its fine-tuned copies."""

    def unit(self, base: Path) -> int:
        """The UNet takes latents one by one."""
        return vae_factor(base)

    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        """Multiples of 8 and of the VAE's factor."""
        config = config or base_config(base, self.component)
        factor = vae_factor(base)
        default = config["sample_size"] * factor if "sample_size" in config else SIDE
        return Sides(math.lcm(MULTIPLE, factor), default)

    def bottleneck(self, settings: TeacherSettings) -> tuple[int, int, int]:
        """(C, h, w) of the mid-block's output; each level but the first halves the latents."""
        widths = read_json(settings.folder / "unet" / "config.json")["block_out_channels"]
        _, height, width = self.latent_shape(settings)
        halved = 2 ** (len(widths) - 1)
        return widths[-1], -(-height // halved), -(-width // halved)

    def require_configs(self, base: Path) -> None:
        """Its UNet takes SDXL's six numbers of sizes too, which an SDXL refiner's does not."""
        super().require_configs(base)
        file = base / self.component / "config.json"
        config, clip = read_json(file), base_config(base, "text_encoder_2")
        width, each = (
            config.get(name)
            for name in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        )
        if width != NUM_SIZES * (each or 0) + clip.get("projection_dim", 512):
            raise ValueError(
                f"{file}: projection_class_embeddings_input_dim is {width}, which is not that of "
                f"{NUM_SIZES} sizes (each addition_time_embed_dim, {each}) and text_encoder_2's "
                "pooled prompt: it is no SDXL base"
            )

    def schedule(self, base: Path) -> dict[str, Any]:
        """The noise schedule of the base's scheduler."""
        config = read_json(base / "scheduler" / "scheduler_config.json")
        return {name: config[name] for name in BETAS if config.get(name) is not None}

    def require_scheduler(self, base: Path) -> None:
        """A student's steps are on its teacher's noise schedule, which must be SDXL's kind."""
        VP_SCHEDULER.require(base / "scheduler")

    def path(self, settings: TeacherSettings) -> "VPPath":
        """The noise schedule of the folder's scheduler; raises ValueError for one of another kind,
        or whose last step leaves nothing of the image."""
        from senseflow.core.path import VPPath

        self.require_scheduler(settings.folder)
        file = settings.folder / "scheduler" / "scheduler_config.json"
        abar = alphas_cumprod(file, read_json(file))
        if abar[-1] < LEAST_ABAR:
            raise ValueError(
                f"{file}: its schedule ends at zero signal, where a prediction of noise says "
                "nothing of the image"
            )
        return VPPath(abar)

    def anchors(self, settings: TeacherSettings, times: tuple[float, ...]) -> "Anchors":
        """The integer steps themselves."""
        from senseflow.core.anchors import Anchors
        from senseflow.core.path import VPPath

        if settings.shift is not None:
            raise ValueError(
                f"anchors.shift {settings.shift:g}: SDXL's steps have no shift; say null"
            )
        if any(t != int(t) for t in times):
            raise ValueError(f"anchors.times {list(times)}: SDXL's are whole steps")
        return Anchors(times, end=VPPath.clean)

    def sampled_at(self, path: "NoisePath", anchors: "Anchors") -> tuple[float, ...]:
        """The integer steps themselves."""
        return anchors.times

    def kohya_names(self, base: Path) -> Callable[[str], str]:
        """The authors' names: InvokeAI reads no others, ComfyUI of diffusers' but a part."""
        return partial(layer_name, config=base_config(base, self.component))

    def default_anchors(self, base: Path, num: int) -> list[float]:
        """LCM's grid; four are 999, 749, 499, 249."""
        return lcm_grid(num)

    def stock_sampling(self, anchors: tuple[float, ...]) -> StockSampling:
        """LCMScheduler's own steps where its grid of K equal stretches holds the anchors."""
        num = len(anchors)
        on_grid = list(anchors) == lcm_grid(num)
        levels = {"num_inference_steps": num} if on_grid else {"timesteps": list(anchors)}
        changes = {"original_inference_steps": num if on_grid else NUM_TIMES}
        return StockSampling("LCMScheduler", changes, levels, self.no_guidance)

    def comfyui(self, anchors: tuple[float, ...], guidance: float | None) -> str | None:
        """ComfyUI's sampler `lcm` takes LCM's steps."""
        if "timesteps" in self.stock_sampling(anchors).levels:
            return None
        return "That samples at the trained timesteps; no other node is needed."

    def networks(self) -> "Networks":
        """SDXL's adapter, UNet and blocks; imports diffusers, seconds."""
        from senseflow.teachers.sdxl.adapter import NETWORKS

        return NETWORKS

    def null_prompt_of(self, base: Path) -> str | None:
        """None where no prompt is zeros; else its encoding is that of ""."""
        zeros = read_json(base / INDEX).get("force_zeros_for_empty_prompt", True)
        return None if zeros else ""

    def open_pipeline(
        self, base: Path, network: "Callable[[], nn.Module] | None", dtype: "torch.dtype"
    ) -> "DiffusionPipeline":
        """The base's pipeline; network: reads what draws in place of the base's own UNet.

        A VAE that says `force_upcast` is read in float32. The pipeline itself casts such a VAE up
        from float16, after its weights were rounded, and leaves it in bfloat16.
        """
        import torch

        upcast = base_config(base, "vae").get("force_upcast", True)
        vae_dtype = torch.float32 if upcast else dtype
        return self.networks().adapter.read_pipeline(
            base, network, dtype, vae_dtype, add_watermarker=False
        )

    def make_scheduler(self, own: "SchedulerMixin", plan: Plan) -> "SchedulerMixin":
        """x0: LCM's, and cps at its timesteps; euler: the base's own for a teacher, DDIM with eta 0
        for a student.

        Euler's steps in x / alpha over sigma / alpha are DDIM's; `leading` makes their first
        sample, scaled for the network, unit noise, as the student was trained.
        """
        from diffusers import EulerDiscreteScheduler

        from senseflow.teachers.schedulers import Float32LCMScheduler, VPCpsScheduler

        if plan.sampler == "euler" and plan.levels is None:
            return own
        # Of the base's own the schedule alone: how it clips or spaces its steps is not a student's.
        betas = {name: own.config[name] for name in BETAS}
        if plan.sampler == "euler":
            return EulerDiscreteScheduler(**betas, timestep_spacing="leading")
        # Its "original" schedule is only there to warn of timesteps that are not on it.
        num = plan.steps if plan.levels is None else NUM_TIMES
        if plan.eta is not None:
            return VPCpsScheduler(**betas, original_inference_steps=num).with_eta(plan.eta)
        return Float32LCMScheduler(**betas, original_inference_steps=num)

    def sample(
        self,
        pipeline: "DiffusionPipeline",
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
            guidance_scale=self.no_guidance if plan.guidance is None else plan.guidance,
            generator=generators,
            callback_on_step_end=_cast_for_vae,
        ).images
        return images


def lcm_grid(num: int) -> list[float]:
    """The last steps of `num` equal stretches of the clock, noisy to clean."""
    return [(num - step) * (NUM_TIMES // num) - 1 for step in range(num)]


def alphas_cumprod(file: Path, config: dict[str, Any]) -> "torch.Tensor":
    """abar_t (T,) of a scheduler's config, as diffusers' own schedulers make it, float32.

    Raises ValueError, naming its file, for one that leaves a beta to its class: classes differ.
    """
    import torch

    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        if len(betas) != NUM_TIMES:
            raise ValueError(f"{file}: trained_betas holds {len(betas)} numbers, not {NUM_TIMES}")
        return torch.cumprod(1.0 - betas, dim=0)
    if missing := [name for name in BETAS[:3] if config.get(name) is None]:
        raise ValueError(f"{file} does not say {', '.join(missing)}: the teacher's noise schedule")
    start, end, kind = (config[name] for name in BETAS[:3])
    if kind == "linear":
        betas = torch.linspace(start, end, NUM_TIMES, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, NUM_TIMES, dtype=torch.float32) ** 2
    else:
        raise ValueError(f"{file}: beta_schedule {kind} is neither linear nor scaled_linear")
    # In float32, as the sampler's own scheduler: training and sampling then share every level.
    return torch.cumprod(1.0 - betas, dim=0)


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


SDXL = SDXLFamily(
    name="sdxl",
    title="SDXL",
    script="scripts_sdxl/test_sdxl_senseflow.py",
    pipeline_class="StableDiffusionXLPipeline",
    network_class="UNet2DConditionModel",
    component="unet",
    key_mark="add_embedding.",
    original=ORIGINAL,
    blocks=("BasicTransformerBlock",),
    base_flag="--sdxl_ckpt",
    config_flag="--unet_config",
    teacher_steps=40,
    teacher_guidance=5.0,
    published=Published(
        Terms(NAME, "openrail++", None, f"{HUB}/{NAME}/blob/main/LICENSE.md"),
        num_parameters=2_567_463_684,
        denoiser=dict(
            _class_name="UNet2DConditionModel",
            sample_size=128,
            in_channels=4,
            out_channels=4,
            block_out_channels=[320, 640, 1280],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            layers_per_block=2,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
        scheduler=dict(
            _class_name="EulerDiscreteScheduler",
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=SDXL_VAE,
        encoders=(Encoder("CLIPTextModel", CLIP_L), Encoder("CLIPTextModelWithProjection", BIG_G)),
        settings=dict(force_zeros_for_empty_prompt=True, add_watermarker=False),
    ),
    levels=TIMESTEPS,
    data="latents",
    widths={
        "cross_attention_dim": (("text_encoder", "hidden_size"), ("text_encoder_2", "hidden_size"))
    },
    fields={"unet": UNET, "vae": autoencoder(shift=False), "scheduler": VP_SCHEDULER},
    no_guidance=0.0,
    seeds_every_step=True,
)
