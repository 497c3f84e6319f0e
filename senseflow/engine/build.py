"""From sources of networks to sharded networks on a device, and back to a diffusers folder."""

from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from senseflow.distill import Discriminator, Distillation
from senseflow.engine.checkpoint import export_student
from senseflow.engine.config import Config, Dtype
from senseflow.engine.optim import Trained
from senseflow.engine.parallel import Ranks, fill_shards, shard
from senseflow.models.vfm_discriminator import FrozenBackbone, Heads, PromptEncoder
from senseflow.sampling.student import StudentCard, base_fingerprint, write_card


class NetworkSource(Protocol):
    """A network on the meta device, where its weights are read, and its units of sharding."""

    network: nn.Module

    def read(self, key: str) -> torch.Tensor: ...

    def blocks(self) -> list[nn.Module]: ...


def torch_dtype(name: Dtype) -> torch.dtype:
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def build_network(source: NetworkSource, config: Config, ranks: Ranks) -> nn.Module:
    """Shard a network on the meta device, then read its weights into the shards."""
    network = source.network
    if config.parallel.activation_checkpointing and any(
        p.requires_grad for p in network.parameters()
    ):
        network.enable_gradient_checkpointing()
    shard(network, source.blocks(), ranks.mesh, torch_dtype(config.precision.compute))
    fill_shards(network, source.read, ranks.device)
    return network


def build_discriminator(config: Config, ranks: Ranks) -> Discriminator | None:
    """Frozen DINOv2 and CLIP text, and sharded heads; None when its weight is 0."""
    if config.adversarial.weight == 0:
        return None
    settings, paths = config.adversarial, config.paths
    frozen_dtype = torch_dtype(config.precision.compute)
    backbone = FrozenBackbone(
        paths.dinov2, settings.taps, checkpoint=paths.dinov2_weights, dtype=frozen_dtype
    )
    prompt_encoder = PromptEncoder(paths.clip, paths.clip_weights, paths.clip_quick_gelu)
    heads = Heads(
        num_taps=backbone.num_features,
        width=backbone.width,
        text_dim=prompt_encoder.dim,
        reference=settings.reference != "none",
        virtual_batch=settings.virtual_batch,
        seed=config.train.seed,
        dtype=torch_dtype(config.precision.heads),
    )
    heads.to(ranks.device).eval()
    shard(heads, heads.heads, ranks.mesh, heads.dtype)
    return Discriminator(
        backbone.to(ranks.device),
        prompt_encoder.to(ranks.device),
        Trained.build(heads, config.optimizer.discriminator_lr, config.optimizer),
    )


def export(
    parts: Distillation, source: NetworkSource, ranks: Ranks, iteration: int, folder: Path
) -> None:
    """Write the generator as a diffusers folder with a card of how it is to be sampled."""
    config = parts.config
    dtype = torch_dtype(config.precision.compute)
    base = Path(config.paths.pretrained_model)
    card = StudentCard(
        family="flux",
        anchors=tuple(t / 1000 for t in parts.anchors.times),
        height=config.train.resolution[0],
        width=config.train.resolution[1],
        guidance=None,
        max_sequence_length=config.data.max_sequence_length,
        base_name=base.name,
        base_fingerprint=base_fingerprint(base / "transformer"),
        iteration=iteration,
    )
    describe = partial(write_card, card=card)
    export_student(parts.generator.network, source.network, folder, dtype, ranks, describe)
