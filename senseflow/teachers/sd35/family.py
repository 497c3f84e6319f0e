"""Stable Diffusion 3.5: StableDiffusion3Pipeline, a flow teacher with classifier-free guidance.

Its clock is the index before the scheduler's shift (3). Medium and Large are one architecture with
other configurations, and a family each.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.core.levels import SAME_SIGMA, even_times, one_shift, shifted
from senseflow.teachers.family import Sides, StockSampling
from senseflow.teachers.fields import Fields, autoencoder, flow_scheduler
from senseflow.teachers.flow import SIDE, OneShiftFamily
from senseflow.teachers.folder import TeacherSettings, base_config, vae_factor
from senseflow.teachers.published import (
    BIG_G,
    CLIP_L,
    FLUX_VAE,
    T5_XXL,
    Encoder,
    Published,
    Terms,
)
from senseflow.teachers.sd35.original import ORIGINAL

if TYPE_CHECKING:
    from senseflow.teachers.adapter import Networks

SHIFT = 3.0  # of the published schedulers
NUM_TIMES = 1000  # of the scheduler
MEDIUM_TITLE, LARGE_TITLE = "SD3.5 Medium", "SD3.5 Large"
DISTIL = {
    MEDIUM_TITLE: "exp_sd35/train_SD35_senseflow.sh",
    LARGE_TITLE: "exp_sd35/train_SD35_large_senseflow.sh",
}
NO_T5 = ("text_encoder_3", "tokenizer_3")  # as folders are saved without it


@dataclass(frozen=True, eq=False)
class SD35Family(OneShiftFamily):
    """SD3.5 in one of its sizes, Medium or Large, told apart by dual attention."""

    def unit(self, base: Path) -> int:
        """A patch of latents, in pixels."""
        return vae_factor(base) * int(base_config(base, self.component).get("patch_size", 2))

    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        """Multiples of a patch in pixels, as far as the table of positions reaches."""
        config = config or base_config(base, self.component)
        factor, patch = vae_factor(base), config.get("patch_size", 2)
        default = config["sample_size"] * factor if "sample_size" in config else SIDE
        places = config.get("pos_embed_max_size")
        return Sides(factor * patch, default, places and places * factor * patch)

    def model_of(self, base: Path) -> str | None:
        """By its blocks' normalisation and dual attention; None: there is no transformer."""
        config = base_config(base, self.component)
        if not config:
            return None
        if config.get("qk_norm") != "rms_norm":
            return "SD3 Medium of 2024 (its queries and keys are not normalised)"
        return MEDIUM_TITLE if config.get("dual_attention_layers") else LARGE_TITLE

    def require(self, settings: TeacherSettings) -> None:
        """Raise ValueError unless the settings fit a folder of this family, and of this size."""
        super().require(settings)
        found = self.model_of(settings.folder)
        if found in (None, self.title):
            return
        script = DISTIL.get(found)
        told = f"sh {script} distils it" if script else "no recipe distils it"
        raise ValueError(
            f"{settings.folder} holds {found}, this is the recipe of {self.title}: {told}"
        )

    def default_anchors(self, base: Path, num: int) -> list[float]:
        """The shift of equal steps; four are 1, .9, .75, .5."""
        return [shifted(u, SHIFT) for u in even_times(num)]

    def stock_sampling(self, anchors: tuple[float, ...]) -> StockSampling:
        """By the number of steps alone where a stretched shift gives the anchors, else by sigmas.

        StableDiffusion3Pipeline spaces the sigmas of its steps evenly from 1 to the least that its
        scheduler knows; the scheduler shifts them, and stretches 1 - sigma to `shift_terminal`.
        """
        from senseflow.teachers.schedulers import stock_sigmas

        terminal = anchors[-1] if len(anchors) > 1 else None
        by_number = {"num_inference_steps": len(anchors)}
        found = self.stock_flow(by_number, stretched_shift(anchors), terminal)
        made = stock_sigmas(found.changes, len(anchors))
        fits = all(abs(a - b) < SAME_SIGMA for a, b in zip(anchors, made, strict=True))
        return found if fits else self.stock_flow({"sigmas": list(anchors)})

    def rounded(self, anchors: tuple[float, ...], levels: list[float]) -> list[float]:
        """The anchors among `levels` as that scheduler makes them."""
        from senseflow.teachers.schedulers import as_made, stock_sigmas

        stock = self.stock_sampling(anchors)
        if "sigmas" in stock.levels:
            return levels
        made = dict(zip(anchors, stock_sigmas(stock.changes, len(anchors)), strict=True))
        return as_made(levels, [made.get(level, level) for level in levels])

    def comfyui(self, anchors: tuple[float, ...], guidance: float | None) -> str | None:
        """ComfyUI gives every SD3 the published shift."""
        shift = one_shift(anchors)
        if shift is None:
            return None
        if math.isclose(shift, SHIFT, abs_tol=1e-3):
            return "ComfyUI's own shift for SD3.5, 3, is the trained one: no other node is needed."
        return f"Between loader and sampler the node ModelSamplingSD3 with shift {shift:.4g}."

    def networks(self) -> "Networks":
        """SD3.5's adapter, transformer and blocks; imports diffusers, seconds."""
        from senseflow.teachers.sd35.adapter import NETWORKS

        return NETWORKS


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


LARGE = Published(
    Terms.of_hub("stabilityai/stable-diffusion-3.5-large", "stabilityai-ai-community"),
    num_parameters=8_056_627_520,
    denoiser=dict(
        _class_name="SD3Transformer2DModel",
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=38,
        attention_head_dim=64,
        num_attention_heads=38,
        joint_attention_dim=4096,
        caption_projection_dim=2432,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
    scheduler=dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=SHIFT),
    vae=FLUX_VAE | dict(scaling_factor=1.5305, shift_factor=0.0609),
    encoders=(
        Encoder("CLIPTextModelWithProjection", CLIP_L),
        Encoder("CLIPTextModelWithProjection", BIG_G),
        T5_XXL,
    ),
)
MEDIUM = replace(
    LARGE,
    terms=Terms.of_hub("stabilityai/stable-diffusion-3.5-medium", "stabilityai-ai-community"),
    num_parameters=2_243_171_520,
    denoiser=LARGE.denoiser
    | dict(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=list(range(13)),
    ),
)
TRANSFORMER = Fields(
    ("SD3Transformer2DModel",),
    used="sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads "
    "joint_attention_dim caption_projection_dim pooled_projection_dim out_channels "
    "pos_embed_max_size dual_attention_layers qk_norm",
    why=", and SD3.5's recipes distil an SD3Transformer2DModel",
)
SD35 = SD35Family(
    name="sd35",
    title=MEDIUM_TITLE,
    script="scripts_sd35/test_senseflow_sd35.py",
    pipeline_class="StableDiffusion3Pipeline",
    network_class="SD3Transformer2DModel",
    component="transformer",
    key_mark="pos_embed.proj.",
    original=ORIGINAL,
    blocks=("JointTransformerBlock",),
    base_flag="--sd35_ckpt",
    config_flag="--transformer_config",
    teacher_steps=40,
    teacher_guidance=4.5,
    published=MEDIUM,
    tokenizer="tokenizer_3",
    longest_prompt=256,  # the pipeline's default
    null_prompt="",
    optional=NO_T5,
    widths={
        "joint_attention_dim": (("text_encoder_3", "d_model"),),
        "pooled_projection_dim": (
            ("text_encoder", "projection_dim"),
            ("text_encoder_2", "projection_dim"),
        ),
    },
    fields={
        "transformer": TRANSFORMER,
        "vae": autoencoder(shift=True),
        "scheduler": flow_scheduler(dynamic=False),
    },
)
SD35_LARGE = replace(
    SD35,
    title=LARGE_TITLE,
    script="scripts_sd35/test_senseflow_sd35_large.py",
    teacher_steps=50,
    teacher_guidance=3.5,
    published=LARGE,
)
