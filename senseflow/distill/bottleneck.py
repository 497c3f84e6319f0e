"""The adversary of DMD2: a classifier on the bottleneck of the fake score's UNet.

Its input is a latent diffused to a random t. It reads the output of the UNet's mid-block, so its
loss trains the encoder half of the fake score too (DMD2, Section 4.3).
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from senseflow.weights.meta import seeded

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class ClassifierHead(nn.Module):
    """Mid-block features (B, width, h, w) to logits (B, L); L is 1 at 1024 px.

    downsamplings: convolutions that halve the map, before one that takes 4 x 4 of it to a logit.
    """

    def __init__(self, width: int, downsamplings: int, norm_groups: int, seed: int) -> None:
        super().__init__()
        makers: list[Callable[[], nn.Module]] = []
        for stride, padding in [*[(2, 1)] * downsamplings, (4, 0)]:
            makers.append(partial(nn.Conv2d, width, width, 4, stride=stride, padding=padding))
            makers += [partial(nn.GroupNorm, norm_groups, width), nn.SiLU]
        self.draw = partial(seeded, seed, [*makers, partial(nn.Conv2d, width, 1, 1)])
        self.layers = nn.Sequential(*self.draw())

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, L) of the mid-block's features (B, width, h, w)."""
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d)
        logits: Tensor = self.layers(features.to(last.weight.dtype))  # as FSDP gathers it
        return logits.flatten(1)


def require_head(bottleneck: tuple[int, int, int], downsamplings: int, norm_groups: int) -> None:
    """Raise ValueError unless a `ClassifierHead` can read a bottleneck (C, h, w)."""
    width, height, columns = bottleneck
    if width % norm_groups:
        raise ValueError(
            f"adversarial.norm_groups {norm_groups} does not divide the bottleneck's {width} "
            "channels"
        )
    smallest = 4 * 2**downsamplings
    if min(height, columns) < smallest:
        raise ValueError(
            f"adversarial.downsamplings {downsamplings} needs a bottleneck of at least {smallest} "
            f"x {smallest}; at this train.resolution it is {height} x {columns}"
        )


def add_encoder_pass(unet: "UNet2DConditionModel") -> None:
    """Give a UNet, sharded or not, the method `encode`.

    The pass ends in the mid-block, so a sharded mid-block gathers no weights ahead: those of the up
    half would wait for a forward after the next step, stale by then.
    """
    unet.encode = MethodType(encode, unet)
    if isinstance(unet, FSDPModule):
        network = cast(nn.Module, unet)
        # FSDP2 gathers the root's weights for `forward` alone unless it is told of others.
        register_fsdp_forward_method(network, "encode")
        for part in network.get_submodule("mid_block").modules():
            if isinstance(part, FSDPModule):
                part.set_modules_to_forward_prefetch([])


def encode(
    unet: "UNet2DConditionModel",
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: dict[str, Any],
) -> Tensor:
    """The mid-block's output (B, C, h, w), through the UNet's own parts; its up half is not run.

    sample (B, C_latent, H, W), timestep (B,), encoder_hidden_states (B, L, D), and the pooled
    text_embeds (B, P) and time_ids (B, 6) of added_cond_kwargs: what the UNet's forward takes.
    Gradients flow to the sample and to the weights that are not frozen.
    """
    embedding = unet.time_embedding(unet.get_time_embed(sample, timestep))
    added = unet.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs)
    embedding = embedding if added is None else embedding + added
    states = unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
    features: Tensor = unet.conv_in(sample)
    for block in [*unet.down_blocks, unet.mid_block]:
        text = {"encoder_hidden_states": states} if reads_text(block) else {}
        output = block(features, embedding, **text)
        features = output[0] if isinstance(output, tuple) else output
    return features


def reads_text(block: nn.Module) -> bool:
    """Whether a UNet block has cross-attention, as diffusers itself asks."""
    return bool(getattr(block, "has_cross_attention", False))
