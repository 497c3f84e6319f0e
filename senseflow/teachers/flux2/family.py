"""FLUX.2-klein-base: Flux2KleinPipeline, a flow teacher with classifier-free guidance.

Its clock is sigma. 4B and 9B are one architecture with other configurations. FLUX.2-dev has another
pipeline, a Mistral in place of Qwen3 and an embedded guidance, and is no teacher here.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import read_json
from senseflow.core.levels import even_times, shifted
from senseflow.teachers.family import Sides
from senseflow.teachers.fields import Fields, Known, autoencoder, flow_scheduler
from senseflow.teachers.flow import EvenFlowFamily, flow_config
from senseflow.teachers.flux2.original import ORIGINAL
from senseflow.teachers.flux2.prompts import CHAT
from senseflow.teachers.folder import INDEX, TeacherSettings, vae_factor
from senseflow.teachers.published import QWEN3_4B, Encoder, Published, Terms

if TYPE_CHECKING:
    from senseflow.teachers.adapter import Networks

PATCH = 2  # of the VAE's latents, each way
DEFAULT = 128  # of them, each way, in a picture whose size is not said: 1024 pixels
LARGE = 4300  # tokens, above which the number of steps does not count


@dataclass(frozen=True, eq=False)
class Flux2(EvenFlowFamily):
    """FLUX.2-klein-base, 4B and 9B, and their fine-tuned copies."""

    def unit(self, base: Path) -> int:
        """Latents are patched 2 x 2."""
        return PATCH * vae_factor(base)

    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        """Positions are computed, not looked up: any size."""
        return Sides(self.unit(base), DEFAULT * vae_factor(base))

    def cautions(self, base: Path) -> list[str]:
        """That a folder is of a model which is distilled already."""
        if not read_json(base / INDEX).get("is_distilled"):
            return []
        return [
            f"{base} is distilled already (is_distilled in its {INDEX}): as in its pipeline no "
            "scale guides it, dmd.guidance and isg.guidance have no effect, and its predictions "
            "are right at its own few steps alone. FLUX.2-klein-base is the teacher that was not "
            "distilled"
        ]

    def latent_shape(self, settings: TeacherSettings) -> tuple[int, int, int]:
        """Patches of the VAE's latents."""
        channels, height, width = self.posterior_shape(settings)
        return channels * PATCH**2, height // PATCH, width // PATCH

    def shift(self, settings: TeacherSettings, num: int) -> float:
        """The pipeline's own, which depends on the image and on the number of steps."""
        unit = self.unit(settings.folder)
        height, width = (side // unit for side in settings.resolution)
        return shift_of(settings.folder, height * width, num)

    def default_anchors(self, base: Path, num: int) -> list[float]:
        """The pipeline's own steps at its default size; four are 1, .9674, .9081, .7672."""
        shift = shift_of(base, (DEFAULT // PATCH) ** 2, num)
        return [shifted(u, shift) for u in even_times(num)]

    def comfyui(self, anchors: tuple[float, ...], guidance: float | None) -> str | None:
        """Not looked up."""
        said = ", ".join(f"{anchor:.4g}" for anchor in anchors)
        return (
            f"Which scheduler of ComfyUI gives the trained sigmas, {said}, is not known here: hand "
            "them to a custom sampler."
        )

    def networks(self) -> "Networks":
        """klein's adapter, transformer and blocks; imports diffusers, seconds."""
        from senseflow.teachers.flux2.adapter import NETWORKS

        return NETWORKS


def shift_of(folder: Path, tokens: int, num: int) -> float:
    """The shift of sigma in a folder's pipeline, for so many tokens of an image and steps."""
    config = flow_config(folder)
    if not config["use_dynamic_shifting"]:
        return float(config["shift"])
    mu = empirical_mu(tokens, num)
    return math.exp(mu) if config["time_shift_type"] == "exponential" else mu


def empirical_mu(tokens: int, num: int) -> float:
    """The mu of `num` steps: of two lines, fitted at 10 and at 200 steps, what lies between.

    compute_empirical_mu of diffusers' pipeline_flux2_klein.py, whose numbers these are. It takes
    no curve from the scheduler's config.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > LARGE:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (num - 200)


TRANSFORMER = Fields(
    ("Flux2Transformer2DModel",),
    used="in_channels out_channels num_layers num_single_layers attention_head_dim "
    "num_attention_heads joint_attention_dim timestep_guidance_channels mlp_ratio "
    "axes_dims_rope rope_theta eps",
    known={
        "patch_size": Known((1,), "klein's pipeline makes the patches itself", 1),
        "guidance_embeds": Known(
            (False,),
            "klein is guided by a second forward, and its pipeline feeds no guidance: FLUX.2-dev, "
            "whose guidance is an embedding, is no teacher here",
            True,
        ),
    },
    why=", and FLUX.2's recipe distils a Flux2Transformer2DModel",
)
KL = autoencoder(shift=False)
VAE = Fields(
    ("AutoencoderKLFlux2",),
    used="down_block_types up_block_types block_out_channels decoder_block_out_channels "
    "layers_per_block act_fn latent_channels norm_num_groups use_quant_conv use_post_quant_conv "
    "mid_block_add_attention batch_norm_eps",
    idle="sample_size batch_norm_momentum",
    known={
        "in_channels": KL.known["in_channels"],
        "out_channels": KL.known["out_channels"],
        "patch_size": Known(([2, 2], (2, 2)), "klein's pipeline makes patches of 2 x 2", (2, 2)),
    },
    why=", and FLUX.2's recipe encodes with an AutoencoderKLFlux2",
)
CURVE = "base_shift max_shift base_image_seq_len max_image_seq_len"  # of FLUX.1; not klein's
DYNAMIC = flow_scheduler(dynamic=True)
SCHEDULER = replace(
    DYNAMIC, used="shift use_dynamic_shifting time_shift_type", idle=f"{DYNAMIC.idle} {CURVE}"
)
FLUX2 = Flux2(
    name="flux2",
    title="FLUX.2-klein-base",
    script="scripts_flux2/test_flux2_klein_senseflow.py",
    pipeline_class="Flux2KleinPipeline",
    network_class="Flux2Transformer2DModel",
    component="transformer",
    key_mark="double_stream_modulation_img.linear.",
    original=ORIGINAL,
    blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    base_flag="--flux2_ckpt",
    config_flag="--dit_config",
    teacher_steps=50,
    teacher_guidance=4.0,
    packing=PATCH**2,
    fields={"transformer": TRANSFORMER, "vae": VAE, "scheduler": SCHEDULER},
    tokenizer="tokenizer",
    chat=CHAT,
    null_prompt="",
    published=Published(
        Terms("black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0"),
        num_parameters=3_875_544_576,
        denoiser=dict(
            _class_name="Flux2Transformer2DModel",
            patch_size=1,
            in_channels=128,
            num_layers=5,
            num_single_layers=20,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=7680,
            mlp_ratio=3.0,
            axes_dims_rope=[32, 32, 32, 32],
            rope_theta=2000,
            guidance_embeds=False,
        ),
        scheduler=dict(
            _class_name="FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True
        ),
        vae=dict(
            _class_name="AutoencoderKLFlux2",
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=32,
            norm_num_groups=32,
            sample_size=1024,
            batch_norm_eps=1e-4,
        ),
        encoders=(Encoder("Qwen3ForCausalLM", QWEN3_4B, "Qwen2TokenizerFast", length=131072),),
        settings=dict(is_distilled=False),
    ),
)
