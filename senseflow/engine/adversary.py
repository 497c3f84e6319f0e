"""The adversary of a configuration: frozen networks, and heads sharded on their device."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from torch import nn

from senseflow.common.ranks import Ranks
from senseflow.common.weights_files import words_of
from senseflow.config.config import Config
from senseflow.config.sections import AdversarialConfig, PathsConfig
from senseflow.config.teacher import torch_dtype
from senseflow.distill.adversaries import (
    BottleneckAdapter,
    BottleneckDiscriminator,
    VFMDiscriminator,
)
from senseflow.distill.bottleneck import ClassifierHead, add_encoder_pass
from senseflow.distill.state import Discriminator
from senseflow.distill.vfm_features import LOCAL, FrozenBackbone, PromptEncoder
from senseflow.distill.vfm_heads import (
    Heads,
    Layers,
    no_power_iterations,
    text_layer_of,
    widths_of,
)
from senseflow.engine.disk import HostGroup
from senseflow.engine.initial import Initial, heads_of, reader
from senseflow.engine.inputs import Inputs, bottleneck_of
from senseflow.engine.parallel import keep_parameters_in, recompute, shard
from senseflow.optim.trained import Trained
from senseflow.weights.filling import fill_shards
from senseflow.weights.lora import Role
from senseflow.weights.meta import in_turn
from senseflow.weights.stored import Stored

if TYPE_CHECKING:
    from senseflow.teachers.adapter import Adapter

logger = logging.getLogger(__name__)


def build_discriminator(
    inputs: Inputs, adapter: "Adapter", fake_score: nn.Module, ranks: Ranks, initial: Initial
) -> Discriminator | None:
    """The adversary of the configuration, its heads sharded; None when it has none.

    CLIP is not loaded where a cache knows what it says of prompts.
    """
    config = inputs.config
    if config.adversarial.in_use == "vfm":
        return build_vfm(config, ranks, initial, inputs.cache.text_dim)
    if config.adversarial.in_use == "bottleneck":
        shape = bottleneck_of(inputs)
        return build_bottleneck(config, shape, adapter, fake_score, ranks, initial)
    return None


def build_vfm(
    config: Config, ranks: Ranks, initial: Initial, text_dim: int | None = None
) -> VFMDiscriminator:
    """Frozen DINOv2 and CLIP text (none with `text_dim`), and sharded heads."""
    settings, paths = config.adversarial, config.paths
    named = paths.dinov2 if text_dim else f"{paths.dinov2} and CLIP's {paths.clip}"
    logger.info("reading the discriminator's %s", named)
    backbone, prompt_encoder = load_frozen(config, text_dim)
    if config.parallel.activation_checkpointing:
        recompute([*backbone.vit.blocks], every=1)  # L_adv goes back through all of them
    if prompt_encoder:
        prompt_encoder, text_dim = prompt_encoder.to(ranks.device), prompt_encoder.dim
    assert text_dim
    with torch.device("meta"), no_power_iterations():
        heads = Heads(
            num_taps=backbone.num_features,
            width=backbone.width,
            text_dim=text_dim,
            reference=settings.reference != "none",
            layers=layers_of(settings),
            seed=config.train.seed,
            dtype=torch_dtype(config.precision.heads),
        ).eval()
    keep_parameters_in(heads, torch_dtype(config.precision.head_masters))
    offload = config.parallel.offload == "heads"
    # 773 M parameters at width 1024 and their moments: too many for every rank to hold.
    shard(heads, [*heads.heads], ranks.mesh, heads.dtype, offload, prefetch=False)
    fill_heads(heads, in_turn("heads", heads.draw()), ranks, initial, offload)
    return VFMDiscriminator(
        backbone.to(ranks.device),
        prompt_encoder,
        _trained(heads, config),
    )


def fetch_frozen(config: Config, text_dim: int | None) -> None:
    """Have on this node's disk what the adversary's frozen networks are named by: of names that
    stand for files elsewhere, timm and open_clip fetch these. Raises ValueError."""
    paths = config.paths
    far = paths.dinov2_weights is None and not paths.dinov2.startswith(LOCAL)
    if text_dim is None and not paths.clip.startswith(LOCAL):
        far |= "/" not in (paths.clip_weights or "/")
    if far:
        logger.info("looking for the discriminator's networks, which may have to be fetched")
        load_frozen(config, text_dim)


def load_frozen(
    config: Config, text_dim: int | None
) -> tuple[FrozenBackbone, PromptEncoder | None]:
    """DINOv2 and CLIP's text tower (None with `text_dim`) in host memory; raises ValueError."""
    settings, paths = config.adversarial, config.paths
    frozen_dtype = torch_dtype(config.precision.compute)
    try:
        backbone = FrozenBackbone(
            paths.dinov2, settings.taps, checkpoint=paths.dinov2_weights, dtype=frozen_dtype
        )
        return backbone, None if text_dim else load_clip(paths)
    except (RuntimeError, OSError, UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"paths.dinov2 ({paths.dinov2}, {paths.dinov2_weights}) or paths.clip ({paths.clip}, "
            f"{paths.clip_weights}) cannot be loaded: {words_of(error)}"
        ) from error


def heads_as_trained(inputs: Inputs, folder: Path, initial: Initial, host: HostGroup) -> Inputs:
    """The inputs with the text layer that the heads were trained with, of the run's own checkpoint
    or of what it begins with, whatever the configuration says; on rank 0 it is said. Raises
    ValueError for maps of another width than the configuration's."""
    adversary = inputs.config.adversarial
    if adversary.in_use != "vfm":
        return inputs
    own, begun = host.on_main(lambda: heads_of(folder)), initial.get("discriminator")
    known = own or ({key: begun.read(key).shape for key in begun.keys} if begun else {})
    source = folder if own else inputs.config.paths.initial
    if widths := widths_of(known):
        width, natural = widths
        if width != (adversary.head_width or natural):
            raise ValueError(
                f"adversarial.head_width {adversary.head_width or 'null'}: the heads of {source} "
                f"are {width} wide; say adversarial.head_width={width}, or name another run"
            )
    layer = text_layer_of(known) or adversary.text_layer
    if host.is_main and layer != adversary.text_layer:
        logger.info(
            "adversarial.text_layer: %s, not %s: the heads of %s go on as they were trained",
            *(layer, adversary.text_layer, source),
        )
    elif host.is_main and layer == "linear":
        logger.info(
            "adversarial.text_layer: linear, the plain layer, which files have that do not name "
            "one; the release's is equalized"
        )
    adversary = replace(adversary, text_layer=layer)
    return replace(inputs, config=replace(inputs.config, adversarial=adversary))


def layers_of(settings: AdversarialConfig) -> Layers:
    """What the layers of the heads are."""
    return Layers(
        settings.virtual_batch, settings.text_layer, settings.spectral_norm, settings.head_width
    )


def check_backbone(config: Config) -> None:
    """Raise ValueError for a backbone of another kind, taps that it has not and images smaller than
    its patch; nothing is loaded."""
    name, size = config.paths.dinov2, config.train.resolution
    if name.startswith("hf-hub:"):
        return  # known when timm has fetched it
    try:
        with torch.device("meta"):
            backbone = FrozenBackbone(name, config.adversarial.taps, random_seed=0)
    except (ValueError, RuntimeError) as error:  # the latter for a tag that timm does not know
        raise ValueError(f"paths.dinov2 {name}: {error}") from error
    patch = backbone.vit.patch_embed.patch_size
    if any(side < p for side, p in zip(size, patch, strict=True)):
        raise ValueError(f"train.resolution {list(size)} is below a patch of {name}, {list(patch)}")


def load_clip(paths: PathsConfig) -> PromptEncoder:
    """The frozen CLIP text tower that encodes the discriminator's prompts."""
    return PromptEncoder(paths.clip, paths.clip_weights, paths.clip_quick_gelu)


def build_bottleneck(
    config: Config,
    shape: tuple[int, int, int],
    adapter: "Adapter",
    fake_score: nn.Module,
    ranks: Ranks,
    initial: Initial,
) -> BottleneckDiscriminator:
    """DMD2's head, sharded, and the encoder pass of the fake score that feeds it."""
    settings, seed = config.adversarial, config.train.seed
    with torch.device("meta"):
        head = ClassifierHead(shape[0], settings.downsamplings, settings.norm_groups, seed)
    keep_parameters_in(head, torch_dtype(config.precision.head_masters))
    offload = config.parallel.offload == "heads"
    shard(head, [], ranks.mesh, torch_dtype(config.precision.heads), offload)
    fill_heads(head, in_turn("layers", head.draw()), ranks, initial, offload)
    add_encoder_pass(fake_score.base.network if isinstance(fake_score, Role) else fake_score)
    return BottleneckDiscriminator(
        cast(BottleneckAdapter, adapter),
        _trained(head, config),
    )


def _trained(heads: nn.Module, config: Config) -> Trained:
    settings, compiled = config.optimizer, config.parallel.compiled
    own = replace(settings, states=settings.head_states or settings.states)
    return Trained.build(heads, settings.discriminator_lr, own, compiled)


def fill_heads(
    heads: nn.Module,
    drawn: Callable[[str], Stored],
    ranks: Ranks,
    initial: Initial,
    offload: bool,
) -> None:
    """Heads of the initial run if it had any, else as drawn; offload: as `shard` was told."""
    known = initial.get("discriminator")
    read = reader(known, heads, drawn) if known else drawn
    fill_shards(heads, read, ranks.device, offload)
