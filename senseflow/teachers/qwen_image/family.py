"""Qwen-Image: QwenImagePipeline, a flow teacher with classifier-free guidance.

Its clock is sigma. A student's steps are not the folder's: a schedule that depends on the size and
is stretched to end at sigma .02 gives four steps 1, .767, .456, .02, of which the last has nothing
left to do. They have the constant shift 3 of the public few-step students: 1, .9, .75, .5.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.core.levels import even_times, one_shift, shifted
from senseflow.teachers.family import Plan, Sides
from senseflow.teachers.fields import Fields, Known, flow_scheduler
from senseflow.teachers.flow import SIDE, EvenFlowFamily, aura_flow, flow_config
from senseflow.teachers.folder import TeacherSettings, name_of, vae_factor
from senseflow.teachers.published import Encoder, Published, Terms
from senseflow.teachers.qwen_image.latents import require_statistics
from senseflow.teachers.qwen_image.original import ORIGINAL
from senseflow.teachers.qwen_image.prompts import CHAT

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from senseflow.teachers.adapter import Networks

PATCH = 2
SHIFT = 3.0  # of students of a folder whose own depends on the size
DISTILLED = ("lightning", "flash", "turbo")  # in the names of its public students


@dataclass(frozen=True, eq=False)
class QwenImage(EvenFlowFamily):
    """Qwen-Image, also of 2512, and their fine-tuned copies."""

    def unit(self, base: Path) -> int:
        """A patch of latents, in pixels."""
        return PATCH * vae_factor(base)

    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        """Positions count from the middle, 4096 tokens each way, which no image reaches."""
        return Sides(self.unit(base), SIDE // 8 * vae_factor(base))

    def require_configs(self, base: Path) -> None:
        """Also that the VAE says how its latents are normalised."""
        super().require_configs(base)
        require_statistics(base)

    def cautions(self, base: Path) -> list[str]:
        """A student of few steps, by its name."""
        if not any(word in name_of(base).lower() for word in DISTILLED):
            return []
        return [
            f"{base} is distilled already, by its name: drawn in few steps without guidance, its "
            "predictions are right at those alone, and guidance leads it astray. Qwen-Image itself "
            "is the teacher"
        ]

    def shift(self, settings: TeacherSettings, num: int) -> float:
        """One shift, at every size and for every number of steps."""
        return shift_of(settings.folder)

    def default_anchors(self, base: Path, num: int) -> list[float]:
        """That shift of equal steps; four are 1, .9, .75, .5."""
        return [shifted(u, shift_of(base)) for u in even_times(num)]

    def make_scheduler(
        self, own: "FlowMatchEulerDiscreteScheduler", plan: Plan
    ) -> "FlowMatchEulerDiscreteScheduler":
        """As of any flow family; one step is not stretched, which diffusers makes 0 / 0."""
        made = super().make_scheduler(own, plan)
        if plan.steps == 1:
            made.register_to_config(shift_terminal=None)
        return made

    def guided(self, guidance: float, num: int) -> dict[str, Any]:
        """The pipeline guides against a prompt that it is given alone."""
        against = {"negative_prompt": [self.null_prompt] * num} if guidance > self.unguided else {}
        return super().guided(guidance, num) | against

    def comfyui(self, anchors: tuple[float, ...], guidance: float | None) -> str | None:
        """A flow of one shift, told sigma from 1 to 0."""
        shift = one_shift(anchors)
        return None if shift is None else aura_flow(shift)

    def networks(self) -> "Networks":
        """Qwen-Image's adapter, transformer and blocks; imports diffusers, seconds."""
        from senseflow.teachers.qwen_image.adapter import NETWORKS

        return NETWORKS


def shift_of(folder: Path) -> float:
    """The shift of a student's sigmas: the folder's own where that is constant."""
    config = flow_config(folder)
    return SHIFT if config["use_dynamic_shifting"] else float(config["shift"])


EDITS = "it is of the network that edits images or draws them in layers"
TRANSFORMER = Fields(
    ("QwenImageTransformer2DModel",),
    used="in_channels out_channels num_layers attention_head_dim num_attention_heads "
    "joint_attention_dim axes_dims_rope",
    known={
        "patch_size": Known((2,), "Qwen-Image's pipeline makes patches of 2 x 2", 2),
        "guidance_embeds": Known((False,), "Qwen-Image is guided by a second forward", False),
        "zero_cond_t": Known((False,), EDITS, False),
        "use_additional_t_cond": Known((False,), EDITS, False),
        "use_layer3d_rope": Known((False,), EDITS, False),
    },
    why=", and Qwen-Image's recipe distils a QwenImageTransformer2DModel",
)
VAE = Fields(
    ("AutoencoderKLQwenImage",),
    used="base_dim z_dim dim_mult num_res_blocks attn_scales temperal_downsample latents_mean "
    "latents_std",
    known={
        "input_channels": Known((3,), "images have 3 channels", 3),
        "dropout": Known((0,), "a VAE draws nothing at random within", 0),
    },
    why=", and Qwen-Image's recipe encodes with an AutoencoderKLQwenImage",
)
DYNAMIC = flow_scheduler(dynamic=True)
CURVE = "base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type shift_terminal"
SCHEDULER = replace(
    DYNAMIC,
    used="shift use_dynamic_shifting",
    idle=f"{DYNAMIC.idle} {CURVE}",  # of the teacher's own steps
    known={name: known for name, known in DYNAMIC.known.items() if name not in CURVE},
)
QWEN_IMAGE = QwenImage(
    name="qwen_image",
    title="Qwen-Image",
    script="scripts_qwen_image/test_qwen_image_senseflow.py",
    pipeline_class="QwenImagePipeline",
    network_class="QwenImageTransformer2DModel",
    component="transformer",
    key_mark="txt_norm.",
    original=ORIGINAL,
    blocks=("QwenImageTransformerBlock",),
    base_flag="--qwen_image_ckpt",
    config_flag="--transformer_config",
    teacher_steps=50,
    teacher_guidance=4.0,
    guidance_key="true_cfg_scale",
    packing=PATCH**2,
    output_packing=1,  # the network makes patches of what its config calls out_channels
    tokenizer="tokenizer",
    chat=CHAT,
    longest_allowed=1024,
    null_prompt=" ",  # the customary one: the pipeline has none of its own
    widths={"joint_attention_dim": (("text_encoder", "hidden_size"),)},
    fields={"transformer": TRANSFORMER, "vae": VAE, "scheduler": SCHEDULER},
    published=Published(
        Terms("Qwen/Qwen-Image", "apache-2.0"),
        num_parameters=20_430_401_088,
        denoiser=dict(
            _class_name="QwenImageTransformer2DModel",
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=60,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=3584,
            guidance_embeds=False,
            axes_dims_rope=[16, 56, 56],
        ),
        scheduler=dict(
            _class_name="FlowMatchEulerDiscreteScheduler",
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=dict(
            _class_name="AutoencoderKLQwenImage",
            base_dim=96,
            z_dim=16,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_scales=[],
            temperal_downsample=[False, True, True],
        ),
        encoders=(
            Encoder(
                "Qwen2_5_VLForConditionalGeneration",
                dict(
                    model_type="qwen2_5_vl",
                    hidden_size=3584,
                    intermediate_size=18944,
                    num_hidden_layers=28,
                    num_attention_heads=28,
                    num_key_value_heads=4,
                    rms_norm_eps=1e-6,
                    rope_theta=1000000.0,
                    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
                    max_position_embeddings=128000,
                    vocab_size=152064,
                    vision_config=dict(hidden_size=1280, out_hidden_size=3584),
                ),
                "Qwen2Tokenizer",
                length=131072,
            ),
        ),
    ),
)
