"""Qwen-Image: the adapter and the networks of a QwenImagePipeline folder.

A flow teacher with classifier-free guidance, after which every token has the length that the
prompt's own prediction gave it. Its VAE is one of videos, of which an image is the first frame.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageDecoder3d,
    QwenImageMidBlock,
    QwenImageResample,
    QwenImageResidualBlock,
    QwenImageUpBlock,
)
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from senseflow.common.devices import to_device
from senseflow.core.guidance import guide
from senseflow.teachers.adapter import CfgAdapter, Networks, Norms
from senseflow.teachers.encoded import Conditioning, Posterior
from senseflow.teachers.qwen_image.latents import require_statistics
from senseflow.teachers.qwen_image.prompts import CHAT, TEMPLATE
from senseflow.teachers.text_encoders import TextEncoder, qwen_tokenizer

PIECE = re.compile(r"<\|\w+\|>| ?\w+|[^\w ]")  # of the template: a token each


def tokenizer(length: int) -> Qwen2Tokenizer:
    """Qwen's, with the letter a and the words of the template."""
    made = qwen_tokenizer(length)
    made.add_tokens(list(dict.fromkeys(PIECE.findall(TEMPLATE))))
    return made


QWEN2_5_VL = TextEncoder(
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLDecoderLayer,
    tokenizer,
    unasked=("lm_head", "model.visual"),
)


class QwenImageAdapter(CfgAdapter):
    """A Qwen-Image teacher without its transformer."""

    pipeline_class = QwenImagePipeline
    component = "transformer"
    text_encoders = (QWEN2_5_VL,)
    vae_class = AutoencoderKLQwenImage
    decoder_blocks = (QwenImageResidualBlock, QwenImageResample)
    decoder_stages = (QwenImageMidBlock, QwenImageUpBlock)
    decoder_norms: ClassVar[Norms] = {
        QwenImageResidualBlock: (("norm1", "nonlinearity"), ("norm2", "nonlinearity")),
        QwenImageDecoder3d: (("norm_out", "nonlinearity"),),
    }

    @classmethod
    def pipeline_around(cls, folder: Path, networks: dict[str, nn.Module], **settings: Any) -> Any:
        """As of any family, with a VAE whose latents can be normalised, and a tokenizer that reads
        the template as the pipeline assumes."""
        require_statistics(folder)
        pipeline = super().pipeline_around(folder, networks, **settings)
        head, dropped = CHAT.head(pipeline.tokenizer), pipeline.prompt_template_encode_start_idx
        if head != dropped:
            raise ValueError(
                f"{folder / 'tokenizer'} reads what the template has before a prompt as {head} "
                f"tokens, of which the pipeline drops {dropped}: it is another model's tokenizer"
            )
        return pipeline

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Qwen2.5-VL's last states of a prompt and of what the template has behind it."""
        pipeline, length = self.pipeline, self.settings.max_sequence_length
        pipeline.tokenizer.padding_side = "right"  # or left: no token looks ahead, to padding
        states, mask = CHAT.encode(pipeline.text_encoder, pipeline.tokenizer, prompts, length)
        return Conditioning(states, mask=mask)

    @staticmethod
    @torch.no_grad()
    def posterior_of(vae: Any, images: Tensor) -> Posterior:
        """Of videos of one frame."""
        found = vae.encode(images.to(vae.dtype)[:, :, None]).latent_dist
        return Posterior.of(found.mean[:, :, 0], found.std[:, :, 0])

    def decode(self, latents: Tensor) -> Tensor:
        """The only frame (B, 3, H, W) of a video, float32, about [-1, 1]; differentiable.

        By the VAE's own decoder: its `decode` clamps, and no gradient leaves what is saturated.
        """
        vae = self.pipeline.vae
        frames = self.denormalise(latents).to(vae.dtype)[:, :, None]
        images: Tensor = vae.decoder(vae.post_quant_conv(frames))
        return images[:, :, 0].float()

    def normalise(self, encoded: Tensor) -> Tensor:
        """Less the mean of each channel, over its deviation."""
        mean, std = statistics(self.pipeline.vae, encoded.device)
        return (encoded - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = statistics(self.pipeline.vae, latents.device)
        return latents * std + mean

    def guide(self, uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        """uncond + scale (cond - uncond), each token of it as long as that of cond."""
        wanted, guided = pack(cond), pack(guide(uncond, cond, scale))
        lengths = [vector_norm(tokens, dim=-1, keepdim=True) for tokens in (wanted, guided)]
        return unpack(guided * (lengths[0] / lengths[1]), *cond.shape[2:])

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v at (x_t, t), float32, of prompts cut to the longest of them.

        Time goes through the pipeline's own dtype, step for step; no mask where none is padded.
        """
        assert cond.mask is not None
        dtype, (num, _, height, width) = self.compute_dtype, x_t.shape
        longest = max(cond.lengths)
        is_padded = min(cond.lengths) < longest
        output: Tensor = network(
            hidden_states=pack(x_t).to(dtype),
            encoder_hidden_states=cond.prompt_embeds[:, :longest].to(dtype),
            encoder_hidden_states_mask=(
                to_device(cond.mask[:, :longest], x_t.device) if is_padded else None
            ),
            timestep=t.to(dtype) / 1000,  # the module multiplies by 1000 itself
            img_shapes=[[(1, height // 2, width // 2)]] * num,
            return_dict=False,
        )[0]
        return unpack(output.float(), height, width)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): each 2 x 2 patch is a token."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h/2 * w/2, 4 C) -> (B, C, h, w), the inverse of `pack`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, C, 1, 1) of the VAE's latents, as its config has them."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
    mean, std = to_device(values, device).view(2, 1, -1, 1, 1)
    return mean, std


def blocks_of(network: QwenImageTransformer2DModel) -> list[nn.Module]:
    """The units of sharding, of activation checkpointing and of compilation."""
    return [*network.transformer_blocks]


NETWORKS = Networks(QwenImageAdapter, QwenImageTransformer2DModel, blocks_of, blocks_of)
