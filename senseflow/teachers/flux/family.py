"""FLUX.1: FluxPipeline, a flow teacher whose guidance is an embedding.

Its clock is sigma. The student drops the guidance embedding, unless it is a LoRA.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import ROOT
from senseflow.core.levels import one_shift
from senseflow.teachers.family import Sides
from senseflow.teachers.fields import Fields, Known, autoencoder, flow_scheduler
from senseflow.teachers.flow import SHIFTS, SIDE, EvenFlowFamily, flow_config
from senseflow.teachers.flux.original import ORIGINAL
from senseflow.teachers.folder import TeacherSettings, vae_factor
from senseflow.teachers.published import CLIP_L, FLUX_VAE, T5_XXL, Encoder, Published, Terms

if TYPE_CHECKING:
    from senseflow.teachers.adapter import Networks


@dataclass(frozen=True, eq=False)
class Flux(EvenFlowFamily):
    """FLUX.1-dev and its fine-tuned copies."""

    def unit(self, base: Path) -> int:
        """Latents are packed 2 x 2."""
        return 2 * vae_factor(base)

    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        """Positions are computed, not looked up: any size."""
        return Sides(self.unit(base), SIDE)

    def require_student(self, settings: TeacherSettings) -> None:
        """A LoRA student keeps the guidance embedding, and is fed a constant."""
        if settings.lora is None:
            return
        if settings.linked or settings.fold_guidance is not None:
            raise ValueError(
                "lora.rank: a LoRA student keeps the guidance embedding; say null for "
                "paths.flux_wo_guidance_embed and student.fold_guidance"
            )
        if settings.guidance is None:
            raise ValueError(
                "student.guidance is missing: the constant that a LoRA student's guidance "
                "embedding is fed, such as 3.5"
            )

    def shift(self, settings: TeacherSettings, num: int) -> float:
        """The scheduler's own at any number of steps; with dynamic shifting it grows with the
        image."""
        from senseflow.core.anchors import dynamic_mu, exponential_shift

        config, unit = flow_config(settings.folder), self.unit(settings.folder)
        if not config["use_dynamic_shifting"]:
            return float(config["shift"])
        mu = dynamic_mu(
            (settings.resolution[0] // unit) * (settings.resolution[1] // unit),
            config["base_image_seq_len"],
            config["max_image_seq_len"],
            config["base_shift"],
            config["max_shift"],
        )
        return exponential_shift(mu) if config["time_shift_type"] == "exponential" else mu

    def default_anchors(self, base: Path, num: int) -> list[float]:
        """FluxPipeline's own steps at 1024 x 1024; four are 1, .9045, .7595, .5128."""
        from senseflow.teachers.schedulers import own_sigmas

        config = flow_config(base)
        return own_sigmas({name: config[name] for name in SHIFTS}, num)

    def takes_guidance(self, config: dict[str, Any]) -> bool:
        """Students may have kept the teacher's guidance embedding."""
        return bool(config.get("guidance_embeds"))

    def fit_config(self, config: dict[str, Any], keys: list[str]) -> dict[str, Any]:
        """The teacher's config for weights that may have dropped the guidance embedding."""
        guided = any(mark in key for key in keys for mark in ("guidance_embedder.", "guidance_in."))
        return {**config, "guidance_embeds": guided}

    def comfyui(self, anchors: tuple[float, ...], guidance: float | None) -> str | None:
        """ComfyUI tells the kinds of FLUX by their guidance embedding."""
        shift = one_shift(anchors)
        if shift is None:
            return None
        mu = f"{math.log(shift):.4g}"
        node = (
            f"the node ModelSamplingFlux with max_shift and base_shift both {mu} (the shift e^{mu} "
            f"= {shift:.4g} at every size)"
        )
        if guidance is not None:
            return f"The node FluxGuidance with {guidance:g}, and {node}."
        return (
            "A FLUX without guidance embedding is taken for Schnell, whose shift is 1: between "
            f"loader and sampler put {node}. Not ModelSamplingSD3: it feeds the network 1000 sigma "
            "in place of sigma."
        )

    def networks(self) -> "Networks":
        """FLUX's adapter, transformer and blocks; imports diffusers, seconds."""
        from senseflow.teachers.flux.adapter import NETWORKS

        return NETWORKS


TRANSFORMER = Fields(
    ("FluxTransformer2DModel",),
    used="in_channels out_channels num_layers num_single_layers attention_head_dim "
    "num_attention_heads joint_attention_dim pooled_projection_dim guidance_embeds axes_dims_rope",
    known={"patch_size": Known((1,), "FLUX's pipeline packs the patches itself", 1)},
    why=", and FLUX's recipe distils a FluxTransformer2DModel",
)
FLUX = Flux(
    name="flux",
    title="FLUX.1-dev",
    script="scripts_flux/test_flux_senseflow.py",
    pipeline_class="FluxPipeline",
    network_class="FluxTransformer2DModel",
    component="transformer",
    key_mark="single_transformer_blocks.0.norm.",
    original=ORIGINAL,
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    base_flag="--flux_ckpt",
    config_flag="--dit_config",
    teacher_steps=50,
    teacher_guidance=3.5,
    embeds_guidance=True,
    packing=4,
    widths={
        "joint_attention_dim": (("text_encoder_2", "d_model"),),
        "pooled_projection_dim": (("text_encoder", "hidden_size"),),
    },
    fields={
        "transformer": TRANSFORMER,
        "vae": autoencoder(shift=True),
        "scheduler": flow_scheduler(dynamic=True),
    },
    tokenizer="tokenizer_2",
    published=Published(
        Terms.of_hub("black-forest-labs/FLUX.1-dev", "flux-1-dev-non-commercial-license"),
        num_parameters=11_901_408_320,
        denoiser=dict(
            _class_name="FluxTransformer2DModel",
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=[16, 56, 56],
        ),
        scheduler=dict(
            _class_name="FlowMatchEulerDiscreteScheduler",
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
        ),
        vae=FLUX_VAE,
        encoders=(Encoder("CLIPTextModel", CLIP_L), T5_XXL),
    ),
    last_config=ROOT / "exp_flux" / "flux-wo-guidance-embed" / "transformer" / "config.json",
)
