"""A made-up family of teachers, as a user would add one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.core.levels import even_times, shifted
from senseflow.core.path import FlowPath
from senseflow.teachers.adapter import Networks
from senseflow.teachers.family import Sides, StockSampling
from senseflow.teachers.flow import FlowFamily
from senseflow.teachers.folder import TeacherSettings, vae_factor
from senseflow.teachers.published import FLUX_VAE, Encoder, Published, Terms


@dataclass(frozen=True, eq=False)
class MadeUpFamily(FlowFamily):
    """The shift of its sigmas falls with the number of steps."""

    def unit(self, base: Path) -> int:
        return 2 * vae_factor(base)

    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        return Sides(self.unit(base), 32)

    def path(self, settings: TeacherSettings) -> FlowPath:
        return FlowPath()

    def shift(self, settings: TeacherSettings, num: int) -> float:
        return 1 + 8 / num

    def default_anchors(self, base: Path, num: int) -> list[float]:
        return [shifted(u, 1 + 8 / num) for u in even_times(num)]

    def stock_sampling(self, anchors: tuple[float, ...]) -> StockSampling:
        return self.stock_flow({"sigmas": list(anchors)})

    def networks(self) -> Networks:
        from senseflow.teachers.made_up.adapter import NETWORKS

        return NETWORKS


MADE_UP = MadeUpFamily(
    name="made_up",
    title="Made Up",
    script="scripts_made_up/test_made_up.py",
    pipeline_class="MadeUpPipeline",
    network_class="SD3Transformer2DModel",
    component="transformer",
    key_mark="pos_embed.proj.",
    blocks=("JointTransformerBlock",),
    base_flag="--made_up_ckpt",
    config_flag="--transformer_config",
    teacher_steps=8,
    teacher_guidance=4.0,
    no_guidance=0.0,
    unguided=0.0,
    tokenizer="tokenizer",
    null_prompt="",
    published=Published(
        Terms("nobody/made-up", "mit"),
        num_parameters=1,
        denoiser=dict(
            _class_name="SD3Transformer2DModel",
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=12,
        ),
        scheduler=dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0),
        vae=FLUX_VAE
        | dict(
            block_out_channels=[8, 8],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
        encoders=(
            Encoder(
                "T5EncoderModel",
                dict(model_type="t5", d_model=64, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
                "T5Tokenizer",
                length=16,
            ),
        ),
    ),
)
