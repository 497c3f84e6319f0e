"""The embedded Qwen-Image teacher: flow matching with captions dropped, guided by CFG.

Its autoencoder is one of videos, of which an image is the only frame; its Qwen2.5-VL is asked
through the template of the pipeline, every word of which is a token.
"""

from typing import Any

import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from senseflow.teachers.qwen_image.adapter import PIECE, pack, statistics, unpack
from senseflow.teachers.qwen_image.family import QWEN_IMAGE, SHIFT
from senseflow.teachers.qwen_image.prompts import CHAT, TEMPLATE
from senseflow.tiny.lesson import Learner, flow_at, without_dropped
from senseflow.tiny.text import WIDTH, ChatText, new_qwen_tokenizer
from senseflow.tiny.vae import Kind

QWEN_IMAGE_LENGTH = 15  # a caption of ten words, and what the template has behind it
HEAD = 34  # tokens of the template before it, which the pipeline drops
# a student's own clock, and one step of the teacher's, which diffusers would make 0 / 0
STUDENT = {"use_dynamic_shifting": False, "shift": SHIFT, "shift_terminal": None}
ONE_STEP = {"shift_terminal": None}
LATENT_SHAPE = (16, 32)  # of one sample, as the pipeline takes it: 4 x 4 patches of 2 x 2 x 8


def new_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, of the caption words and those of the template."""
    tokenizer = new_qwen_tokenizer(HEAD + QWEN_IMAGE_LENGTH)
    tokenizer.add_tokens(list(dict.fromkeys(PIECE.findall(TEMPLATE))))
    return tokenizer


def new_qwen2_5_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained one of two layers; its vision tower, which nobody asks, is as small as it
    gets."""
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


class QwenImageLearner(Learner):
    """An untrained Qwen-Image transformer with its text encoder."""

    text: ChatText

    def __init__(self) -> None:
        super().__init__()
        tokenizer = new_tokenizer()
        self.text = ChatText(CHAT, tokenizer, new_qwen2_5_vl(tokenizer))
        self.network = QwenImageTransformer2DModel(
            in_channels=LATENT_SHAPE[1],
            out_channels=8,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        self.empty = self.text.tokenize([str(QWEN_IMAGE.null_prompt)])

    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """Latents (B, 8, 8, 8) of images (B, 3, 32, 32), each channel by its own statistics."""
        mean, std = statistics(vae, images.device)
        latents: Tensor = (posterior_of(vae, images).mode() - mean) / std
        return latents

    def loss(
        self, x_0: Tensor, eps: Tensor, u: Tensor, ids: list[Tensor], dropped: Tensor
    ) -> Tensor:
        """Flow matching, (eps - x_0) against the velocity."""
        sigma, x_t = flow_at(x_0, eps, u)
        (num, _, height, width), ids = x_t.shape, without_dropped(ids, self.empty, dropped)
        velocity = self.network(
            hidden_states=pack(x_t),
            encoder_hidden_states=self.text(ids),
            encoder_hidden_states_mask=self.text.seen(ids),
            timestep=sigma,
            img_shapes=[[(1, height // 2, width // 2)]] * num,
            return_dict=False,
        )[0]
        return F.mse_loss(unpack(velocity, height, width), eps - x_0)

    def pipeline(self, vae: AutoencoderKLQwenImage) -> QwenImagePipeline:
        """With the published schedule."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE.published.scheduler)
        return QwenImagePipeline(
            scheduler=scheduler, vae=vae, transformer=self.network, **self.text.components()
        )


def new_qwen_vae() -> AutoencoderKLQwenImage:
    """An untrained one with downsampling 4 and eight channels."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=8,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )


def posterior_of(vae: Any, images: Tensor) -> DiagonalGaussianDistribution:
    """Of images (B, 3, H, W), as of the only frame of videos: (B, C, h, w)."""
    return DiagonalGaussianDistribution(
        vae.encode(images[:, :, None]).latent_dist.parameters[:, :, 0]
    )


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """The only frame, as the decoder has it: the class's own `decode` clamps."""
    image: Tensor = vae.decoder(vae.post_quant_conv(latents[:, :, None]))[:, :, 0]
    return image


def note_statistics(vae: Any, latents: Tensor) -> None:
    """Mean and deviation of each channel."""
    mean, std = (
        [round(value, 4) for value in of.tolist()]
        for of in (latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    )
    vae.register_to_config(latents_mean=mean, latents_std=std)


QWEN_VAE = Kind(new_qwen_vae, posterior_of, decoded, note_statistics)
