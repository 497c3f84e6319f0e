"""FLUX.2-klein: the adapter and the networks of a diffusers Flux2KleinPipeline folder.

A flow teacher with classifier-free guidance; no prompt is the encoding of "". Its latents are
patches: 2 x 2 of the VAE's become 4 C channels, which the running statistics of the VAE's batch
normalisation then bring to about unit deviation. No mask: padded tokens are attended, as there.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from senseflow.teachers.adapter import CfgAdapter, Networks
from senseflow.teachers.encoded import Conditioning, Posterior
from senseflow.teachers.flux2.prompts import CHAT
from senseflow.teachers.text_encoders import QWEN3


class Flux2Adapter(CfgAdapter):
    """A FLUX.2-klein teacher without its transformer; its latents are (B, 4 C, h/2, w/2)."""

    pipeline_class = Flux2KleinPipeline
    component = "transformer"
    text_encoders = QWEN3
    vae_class = AutoencoderKLFlux2

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Three hidden states of Qwen3, side by side."""
        pipeline, length = self.pipeline, self.settings.max_sequence_length
        states, _ = CHAT.encode(pipeline.text_encoder, pipeline.tokenizer, prompts, length)
        return Conditioning(states)

    def draw_latents(self, posterior: Posterior, eps: Tensor) -> Tensor:
        """The posterior's mode, whatever eps: so the pipeline encodes images."""
        return self.normalise(posterior.mean)

    def normalise(self, encoded: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 4 C, h/2, w/2)."""
        return normalised(self.pipeline.vae, encoded)

    def denormalise(self, latents: Tensor) -> Tensor:
        """(B, 4 C, h/2, w/2) -> (B, C, h, w), the inverse of `normalise`."""
        mean, std = statistics(self.pipeline.vae)
        return pixel_shuffle(latents * std + mean, 2)

    def guide(self, uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        """Classifier-free guidance; a distilled folder's pipeline ignores the scale."""
        distilled = self.pipeline.config.is_distilled
        return cond if distilled else super().guide(uncond, cond, scale)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v at (x_t, t), float32; time goes through the pipeline's own dtype, step for step."""
        dtype, (_, _, rows, columns) = self.compute_dtype, x_t.shape
        output: Tensor = network(
            hidden_states=x_t.flatten(2).transpose(1, 2).to(dtype),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            timestep=t.to(dtype) / 1000,  # the module multiplies by 1000 itself
            img_ids=position_ids(rows, columns, 1, x_t.device),
            txt_ids=position_ids(1, 1, cond.prompt_embeds.shape[1], x_t.device),
            return_dict=False,
        )[0]
        return output.float().transpose(1, 2).reshape(x_t.shape)


def normalised(vae: Any, encoded: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 4 C, h/2, w/2): patches first, then the statistics of patches."""
    mean, std = statistics(vae)
    return (pixel_unshuffle(encoded, 2) - mean) / std


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, 4 C, 1, 1), float32, that the VAE's batch normalisation kept."""
    mean, var = (s.float().view(1, -1, 1, 1) for s in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(var + vae.config.batch_norm_eps)


def position_ids(rows: int, columns: int, words: int, device: torch.device) -> Tensor:
    """(rows columns words, 4): 0, row, column and place among the words of each token."""
    axes = [torch.arange(num, device=device) for num in (1, rows, columns, words)]
    return torch.cartesian_prod(*axes)


def blocks_of(network: Flux2Transformer2DModel) -> list[nn.Module]:
    """The units of sharding, of activation checkpointing and of compilation."""
    return [*network.transformer_blocks, *network.single_transformer_blocks]


NETWORKS = Networks(Flux2Adapter, Flux2Transformer2DModel, blocks_of, blocks_of)
