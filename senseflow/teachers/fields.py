"""What becomes of every field of the configs in a teacher's folder. Light: reads JSON.

A field of a class of diffusers is used: by the family, or by the class itself, which is built from
its config; or it is idle: it changes nothing of what is distilled; or it is known at some values
alone, and a folder with another one is refused. `tests/teachers/test_teacher_fields.py` holds these
tables to the signatures of the diffusers that is installed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from senseflow.common.files import read_json


@dataclass(frozen=True)
class Known:
    """The values of a field that are computed as the teacher's own pipeline computes them."""

    values: tuple[Any, ...]
    why: str  # no other, and what is to be done
    default: Any = None  # of the class, for a config that does not say


@dataclass(frozen=True)
class Fields:
    """All fields of the classes that a part of a pipeline may be of."""

    classes: tuple[str, ...]  # in diffusers
    used: str  # names with spaces between them; so is idle
    idle: str = ""
    known: Mapping[str, Known] = field(default_factory=dict)
    why: str = ""  # no other class
    file: str = "config.json"

    def require_class(self, folder: Path) -> dict[str, Any]:
        """The config of a part's folder; raises ValueError for another class's."""
        file = folder / self.file
        config = read_json(file)
        name = config.get("_class_name", self.classes[0])
        if name not in self.classes:
            raise ValueError(f"{file} is of the class {name}{self.why}")
        return config

    def require(self, folder: Path) -> None:
        """Raise ValueError for another class's config, and for values that are not known."""
        config = self.require_class(folder)
        for name, known in self.known.items():
            value = config.get(name, known.default)
            if value not in known.values:
                raise ValueError(
                    f"{folder / self.file}: {name} is {json.dumps(value)}: {known.why}"
                )


def autoencoder(shift: bool) -> Fields:
    """The fields of a VAE. shift: whether the family's pipeline adds its shift_factor."""
    rgb = "images have 3 channels"
    channelwise = "the pipeline of this teacher scales all channels of its latents alike"
    of_shift = Known((None, 0, 0.0), "the pipeline of this teacher adds none to its latents")
    return Fields(
        ("AutoencoderKL",),
        used="down_block_types up_block_types block_out_channels layers_per_block act_fn "
        "latent_channels norm_num_groups scaling_factor force_upcast use_quant_conv "
        "use_post_quant_conv mid_block_add_attention" + (" shift_factor" if shift else ""),
        idle="sample_size",  # of tiles, which are not used
        known={
            "in_channels": Known((3,), rgb, 3),
            "out_channels": Known((3,), rgb, 3),
            "latents_mean": Known((None,), channelwise),
            "latents_std": Known((None,), channelwise),
            **({} if shift else {"shift_factor": of_shift}),
        },
        why=", and the recipes encode with an AutoencoderKL",
    )


def flow_scheduler(dynamic: bool) -> Fields:
    """The fields of a flow teacher's scheduler. dynamic: whether its shift may be."""
    own_steps = (
        "it spaces the teacher's own steps, and a student's are its anchors: to distil this "
        "teacher, say {} in a copy of that file"
    )
    curve = "base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type"
    return Fields(
        ("FlowMatchEulerDiscreteScheduler",),
        used="shift" + (f" use_dynamic_shifting {curve}" if dynamic else ""),
        # whether a step is stochastic is the sampler's to say
        idle="stochastic_sampling" + ("" if dynamic else f" {curve}"),
        known={
            "num_train_timesteps": Known((1000,), "this teacher's times are of 1000 steps", 1000),
            "invert_sigmas": Known((False,), "this teacher's sigmas fall from 1 to 0", False),
            "shift_terminal": Known((None,), own_steps.format("null")),
            **{
                f"use_{kind}_sigmas": Known((False,), own_steps.format("false"), False)
                for kind in ("karras", "exponential", "beta")
            },
            **(
                {}
                if dynamic
                else {
                    "use_dynamic_shifting": Known(
                        (False,), "this teacher has one shift, not a dynamic one", False
                    )
                }
            ),
        },
        why=", and the recipes of flow teachers read a FlowMatchEulerDiscreteScheduler",
        file="scheduler_config.json",
    )


UNET = Fields(
    ("UNet2DConditionModel",),
    used="sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift "
    "down_block_types up_block_types only_cross_attention block_out_channels layers_per_block "
    "downsample_padding mid_block_scale_factor act_fn norm_num_groups norm_eps "
    "cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block "
    "attention_head_dim num_attention_heads dual_cross_attention use_linear_projection "
    "addition_time_embed_dim upcast_attention resnet_time_scale_shift resnet_skip_time_act "
    "resnet_out_scale_factor time_embedding_type time_embedding_dim time_embedding_act_fn "
    "timestep_post_act conv_in_kernel conv_out_kernel projection_class_embeddings_input_dim "
    "attention_type mid_block_only_cross_attention cross_attention_norm",
    # of class labels and of another addition_embed_type
    idle="class_embeddings_concat addition_embed_type_num_heads",
    known={
        "mid_block_type": Known(
            ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
            "the recipes shard a UNet with a mid-block",
            "UNetMidBlock2DCrossAttn",
        ),
        "dropout": Known((0,), "networks that learn draw nothing at random within", 0),
        "encoder_hid_dim": Known((None,), "SDXL's prompts go in as they are encoded"),
        "encoder_hid_dim_type": Known((None,), "SDXL's prompts go in as they are encoded"),
        "class_embed_type": Known((None,), "SDXL takes no class labels"),
        "num_class_embeds": Known((None,), "SDXL takes no class labels"),
        "addition_embed_type": Known(
            ("text_time",), "SDXL takes a pooled prompt and sizes (text_time)"
        ),
        "time_cond_proj_dim": Known(
            (None,), "a UNet with embedded guidance is a distilled one, and no teacher"
        ),
    },
    why=", and SDXL's recipes distil a UNet2DConditionModel",
)

VP_SCHEDULER = Fields(
    (
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler"),
        *("DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
        *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
        *("DEISMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        *("LCMScheduler", "TCDScheduler"),
    ),
    used="beta_start beta_end beta_schedule trained_betas",
    # of the steps between the levels, which are the teacher's own sampler's
    idle="clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value "
    "set_alpha_to_one steps_offset timestep_spacing variance_type skip_prk_steps "
    "use_karras_sigmas use_exponential_sigmas use_beta_sigmas interpolation_type sigma_min "
    "sigma_max final_sigmas_type solver_order algorithm_type solver_type lower_order_final "
    "euler_at_final use_lu_lambdas lambda_min_clipped predict_x0 disable_corrector solver_p "
    "original_inference_steps timestep_scaling "
    # of flow sigmas
    "flow_shift use_dynamic_shifting time_shift_type shift_terminal",
    known={
        "num_train_timesteps": Known((1000,), "SDXL's clock has 1000 steps", 1000),
        "prediction_type": Known(
            ("epsilon",), "the SDXL recipes distil teachers that predict epsilon", "epsilon"
        ),
        "rescale_betas_zero_snr": Known(
            (False,),
            "its schedule ends at zero signal, where a prediction of noise says nothing of the "
            "image",
            False,
        ),
        "use_flow_sigmas": Known(
            (False,), "it is a flow's, and SDXL's recipes distil teachers of DDPM's schedule", False
        ),
        "timestep_type": Known(
            ("discrete",), "the network is told a noise level (EDM), where SDXL is told a step",
            "discrete",
        ),
    },
    why=", whose noise levels are not those of DDPM's schedule (beta_start, beta_end), which the "
    "SDXL recipes distil",
    file="scheduler_config.json",
)  # fmt: skip
