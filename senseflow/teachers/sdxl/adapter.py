"""SDXL: the adapter and the networks of a StableDiffusionXLPipeline folder.

SDXL predicts noise on the variance preserving path; its clock is the integer step. Guidance is
classifier-free, and no prompt is zeros (embeddings and pooled), or the encoding of "" where the
folder says so, with the same time ids. The time ids are the run's resolution as original and
target size, uncropped: what the pipeline says by default where a student is sampled.
"""

from typing import Any, cast

import torch
from diffusers import StableDiffusionXLPipeline, Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from senseflow.teachers.adapter import CfgAdapter, Networks, device_of
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.text_encoders import CLIP, PROJECTED_CLIP


class SDXLAdapter(CfgAdapter):
    """An SDXL teacher without its UNet."""

    pipeline_class = StableDiffusionXLPipeline
    component = "unet"
    text_encoders = (CLIP, PROJECTED_CLIP)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Both CLIPs' penultimate states side by side, and the second's projection as pooled."""
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=device_of(self.pipeline), do_classifier_free_guidance=False
        )
        return Conditioning(prompt_embeds, pooled)

    def null(self, cond: Conditioning) -> Conditioning:
        """Zeros, as SDXL has for an empty prompt, but for folders with a null prompt."""
        return super().null(cond) if self.empty else cond.map(torch.zeros_like)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """eps at (x_t, t), float32; the size conditions are those of an uncropped image."""
        sample, timestep, states, added = self._inputs(x_t, t, cond)
        output: Tensor = network(
            sample, timestep, states, added_cond_kwargs=added, return_dict=False
        )[0]
        return output.float()

    def bottleneck(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The mid-block's output (B, C, h, w) at (x_t, t), of a network with `add_encoder_pass`."""
        features: Tensor = cast(Any, network).encode(*self._inputs(x_t, t, cond))
        return features.float()

    def _inputs(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Any, ...]:
        """A UNet's sample, timestep, encoder_hidden_states and added_cond_kwargs."""
        assert cond.pooled is not None
        dtype = self.compute_dtype
        height, width = self.settings.resolution
        time_ids = torch.zeros(
            len(x_t), 6, dtype=dtype, device=x_t.device
        )  # no host copy to wait for
        time_ids[:, 0::4] = height  # original and target
        time_ids[:, 1::4] = width
        added = {"text_embeds": cond.pooled.to(dtype), "time_ids": time_ids}
        # The whole step whose noise level x_t has: t is drawn between steps.
        return x_t.to(dtype), t.round(), cond.prompt_embeds.to(dtype), added


def blocks_of(network: UNet2DConditionModel) -> list[nn.Module]:
    """The units of sharding: every UNet block, and in it every stack of transformer blocks.

    A UNet block of SDXL holds up to 1.2 G parameters, a stack of transformer blocks 0.35 G, and
    what is left of a block 0.15 G: less is gathered at once, in parameters and in gradients.
    """
    blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
    return [unit for block in blocks for unit in (block, *modules_of(block, Transformer2DModel))]


def repeated_of(network: UNet2DConditionModel) -> list[nn.Module]:
    """The units of recomputation and of compilation: residual and transformer blocks."""
    return modules_of(network, ResnetBlock2D, BasicTransformerBlock)


def modules_of(network: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """All modules of these classes in a network."""
    return [module for module in network.modules() if isinstance(module, kinds)]


NETWORKS = Networks(SDXLAdapter, UNet2DConditionModel, blocks_of, repeated_of)
