"""Z-Image: the adapter and the networks of a ZImagePipeline folder.

The network is told 1 - sigma, its output is x_0 - eps, and prompts reach it as lists of tokens
without padding: it pads each of them to a multiple of 32 with a token that it has learnt, and an
image's positions begin where its own prompt ends.
"""

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn

from senseflow.core.guidance import guide
from senseflow.teachers.adapter import CfgAdapter, Networks
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.text_encoders import QWEN3
from senseflow.teachers.z_image.prompts import CHAT


class ZImageAdapter(CfgAdapter):
    """A Z-Image teacher without its transformer."""

    pipeline_class = ZImagePipeline
    component = "transformer"
    text_encoders = QWEN3

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Qwen3's states of a user's turn; which of them are tokens is known on the host.

        The pipeline's own `encode_prompt` cuts padding off on the device, and waits for it.
        """
        pipeline, length = self.pipeline, self.settings.max_sequence_length
        pipeline.tokenizer.padding_side = "right"  # or left: no token looks ahead, to padding
        states, mask = CHAT.encode(pipeline.text_encoder, pipeline.tokenizer, prompts, length)
        return Conditioning(states, mask=mask)

    def guide(self, uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        """The pipeline's own guidance, which is off at 0: cond + scale (cond - uncond)."""
        return guide(cond, uncond, -scale)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v at (x_t, t), float32, of lists of images (C, 1, h, w) and of prompts (L_i, D)."""
        dtype = self.compute_dtype
        _, sigma = self.path.alpha_sigma(t)
        prompts = zip(cond.prompt_embeds.to(dtype), cond.lengths, strict=True)
        output = network(
            list(x_t.to(dtype)[:, :, None]),
            (1000 - 1000 * sigma) / 1000,  # float32, as the pipeline counts it
            [embeds[:length] for embeds, length in prompts],
            return_dict=False,
        )[0]
        return -torch.stack(output)[:, :, 0].float()


def blocks_of(network: ZImageTransformer2DModel) -> list[nn.Module]:
    """The units of sharding, of activation checkpointing and of compilation."""
    return [*network.noise_refiner, *network.context_refiner, *network.layers]


NETWORKS = Networks(ZImageAdapter, ZImageTransformer2DModel, blocks_of, blocks_of)
