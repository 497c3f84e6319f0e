"""Z-Image: ZImagePipeline, a flow teacher with classifier-free guidance that counts from 0.

Its clock is the index before the scheduler's shift, as SD3.5's. Prompts are a user's turn of
Qwen3's chat template, and the network sees no padding.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.core.levels import even_times, one_shift, shifted
from senseflow.teachers.family import Sides
from senseflow.teachers.fields import Fields, Known, autoencoder, flow_scheduler
from senseflow.teachers.flow import SIDE, EvenFlowFamily, OneShiftFamily, aura_flow, flow_config
from senseflow.teachers.folder import base_config, name_of, vae_factor
from senseflow.teachers.published import FLUX_VAE, QWEN3_4B, Encoder, Published, Terms
from senseflow.teachers.z_image.original import ORIGINAL
from senseflow.teachers.z_image.prompts import CHAT

if TYPE_CHECKING:
    from senseflow.teachers.adapter import Networks

SHIFT, TURBO_SHIFT = 6.0, 3.0  # of the published schedulers, which are told apart by them
PATCH = 2
LENS = (1024, 512, 512)  # of the network's tables of positions: caption and frame, rows, columns
MULTIPLE = 32  # tokens to which the network pads a caption


@dataclass(frozen=True, eq=False)
class ZImage(OneShiftFamily, EvenFlowFamily):
    """Z-Image and its fine-tuned copies."""

    def unit(self, base: Path) -> int:
        """A patch of latents, in pixels."""
        return PATCH * vae_factor(base)

    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        """Multiples of a patch in pixels, as far as the tables of positions reach."""
        config = config or base_config(base, self.component)
        unit, (_, rows, columns) = self.unit(base), config.get("axes_lens", LENS)
        largest = min(rows, columns) * unit
        return Sides(unit, min(SIDE, largest), largest)

    def most_tokens(self, base: Path) -> int:
        """The image stands behind its prompt in the network's table of positions."""
        places = base_config(base, self.component).get("axes_lens", LENS)[0]
        # the first place is padding's, the last its own
        return int((places - 2) // MULTIPLE * MULTIPLE)

    def cautions(self, base: Path) -> list[str]:
        """Z-Image-Turbo is this pipeline's too, by its name or its scheduler's shift."""
        name, shift = name_of(base), flow_config(base)["shift"]
        if "turbo" in name.lower():
            told = "its name"
        elif shift == TURBO_SHIFT:
            told = f"its scheduler's shift {shift:g}"
        else:
            return []
        return [
            f"{base} is Z-Image-Turbo, by {told}: distilled to 8 steps and drawn without guidance, "
            "it has no way in many steps to be distilled, and guidance leads it astray. Z-Image "
            "itself is the teacher"
        ]

    def default_anchors(self, base: Path, num: int) -> list[float]:
        """The folder's own shift of equal steps; the published one gives four 1, .9474, .8571,
        .6667."""
        shift = float(flow_config(base)["shift"])
        return [shifted(u, shift) for u in even_times(num)]

    def comfyui(self, anchors: tuple[float, ...], guidance: float | None) -> str | None:
        """ComfyUI gives every Z-Image the shift of Turbo."""
        shift = one_shift(anchors)
        if shift is None:
            return None
        if math.isclose(shift, TURBO_SHIFT, abs_tol=1e-3):
            return (
                "ComfyUI's own shift for Z-Image, 3, is the trained one: no other node is needed."
            )
        return aura_flow(shift)

    def networks(self) -> "Networks":
        """Z-Image's adapter, transformer and blocks; imports diffusers, seconds."""
        from senseflow.teachers.z_image.adapter import NETWORKS

        return NETWORKS


TRANSFORMER = Fields(
    ("ZImageTransformer2DModel",),
    used="in_channels dim n_layers n_refiner_layers n_heads n_kv_heads norm_eps qk_norm "
    "cap_feat_dim rope_theta t_scale axes_dims axes_lens",
    known={
        "all_patch_size": Known(([2], (2,)), "Z-Image's pipeline asks for patches of 2 x 2", (2,)),
        "all_f_patch_size": Known(([1], (1,)), "an image is one frame", (1,)),
        "siglip_feat_dim": Known((None,), "it is Z-Image Omni's, which is shown images too"),
    },
    why=", and Z-Image's recipe distils a ZImageTransformer2DModel",
)
Z_IMAGE = ZImage(
    name="z_image",
    title="Z-Image",
    script="scripts_z_image/test_z_image_senseflow.py",
    pipeline_class="ZImagePipeline",
    network_class="ZImageTransformer2DModel",
    component="transformer",
    key_mark="all_x_embedder.",
    original=ORIGINAL,
    blocks=("ZImageTransformerBlock",),
    base_flag="--z_image_ckpt",
    config_flag="--transformer_config",
    teacher_steps=50,
    teacher_guidance=4.0,  # 5 where guidance counts from 1
    no_guidance=0.0,
    unguided=0.0,
    tokenizer="tokenizer",
    chat=CHAT,
    null_prompt="",
    fields={
        "transformer": TRANSFORMER,
        "vae": autoencoder(shift=True),
        "scheduler": flow_scheduler(dynamic=False),
    },
    published=Published(
        Terms("Tongyi-MAI/Z-Image", "apache-2.0"),
        num_parameters=6_154_908_736,
        denoiser=dict(
            _class_name="ZImageTransformer2DModel",
            all_patch_size=[2],
            all_f_patch_size=[1],
            in_channels=16,
            dim=3840,
            n_layers=30,
            n_refiner_layers=2,
            n_heads=30,
            n_kv_heads=30,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=2560,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[32, 48, 48],
            axes_lens=list(LENS),
        ),
        scheduler=dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=SHIFT),
        vae=FLUX_VAE,
        encoders=(Encoder("Qwen3Model", QWEN3_4B, "Qwen2Tokenizer", length=131_072),),
    ),
)
