"""The embedded SDXL teacher: noise prediction on the VP path, zeros for a dropped caption, CFG."""

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from senseflow.tiny.lesson import Learner
from senseflow.tiny.pictures import SIZE
from senseflow.tiny.text import CLIP_WIDTHS, SDXLText

TIME_ID_WIDTH = 8
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, crop, target size


def new_scheduler() -> EulerDiscreteScheduler:
    """The scheduler of SDXL's base, with its noise schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        timestep_spacing="leading",
        steps_offset=1,
    )


class SDXLLearner(Learner):
    """An untrained SDXL UNet with its two text encoders."""

    abar: Tensor  # (1000,), alpha^2

    def __init__(self) -> None:
        super().__init__()
        self.text = SDXLText()
        self.network = UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),  # numbers of heads, as in SDXL's own config
            cross_attention_dim=sum(CLIP_WIDTHS),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + CLIP_WIDTHS[1],
        )
        self.register_buffer("abar", new_scheduler().alphas_cumprod.clone(), persistent=False)

    def loss(
        self, x_0: Tensor, eps: Tensor, u: Tensor, ids: list[Tensor], dropped: Tensor
    ) -> Tensor:
        """Noise prediction on the VP path."""
        t = (u * len(self.abar)).long()
        abar = self.abar[t][:, None, None, None]
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
        prompt_embeds, pooled = self.text(ids)
        added = {
            # as SDXL's pipeline has it: no caption is zeros, not the encoding of ""
            "text_embeds": pooled.masked_fill(dropped[:, None], 0),
            "time_ids": torch.tensor([TIME_IDS], dtype=torch.float32).expand(len(t), 6),
        }
        output = self.network(
            x_t,
            t,
            encoder_hidden_states=prompt_embeds.masked_fill(dropped[:, None, None], 0),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return F.mse_loss(output, eps)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
        """With the autoencoder in SDXL's form; no caption is zeros, as in the lesson."""
        return StableDiffusionXLPipeline(
            scheduler=new_scheduler(),
            vae=with_quant_convs(vae),
            unet=self.network,
            **self.text.components(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )


def with_quant_convs(vae: AutoencoderKL) -> AutoencoderKL:
    """The common autoencoder in SDXL's form: 1x1 convolutions about the latent, and no shift.

    SDXL scales its latents but does not shift them; the convolutions subtract the shift and add it
    again, exactly.
    """
    config = {**vae.config, "use_quant_conv": True, "use_post_quant_conv": True}
    sdxl_vae = AutoencoderKL.from_config({**config, "shift_factor": None})
    channels, shift = vae.config.latent_channels, vae.config.shift_factor
    state = vae.state_dict()
    for name, num, offset in (
        ("quant_conv", 2 * channels, -shift),
        ("post_quant_conv", channels, shift),
    ):
        state[f"{name}.weight"] = torch.eye(num)[:, :, None, None]
        state[f"{name}.bias"] = torch.zeros(num)
        state[f"{name}.bias"][:channels] = offset
    sdxl_vae.load_state_dict(state)
    return sdxl_vae.eval()
