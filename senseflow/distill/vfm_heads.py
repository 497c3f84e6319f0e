"""The adversary of SenseFlow: trainable heads on a frozen vision foundation model.

D(x, c, r) = h(f_VFM(x), c, r), the discriminator of the paper's adversarial objective (Eq. 15):
f_VFM is a frozen DINOv2 tapped at several depths (`FrozenBackbone`), c the CLIP feature of the
prompt (`PromptEncoder`), r the DINOv2 features of a real image, and h one head per tap (`Heads`),
the only trained part. Losses and weights live elsewhere; this module ends at the logits.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from senseflow.distill.head_layers import LocalBatchNorm, Residual, SpectralConv
from senseflow.weights.meta import seeded

COMMON_DIM = 64
"""Channels in which class map, text and reference meet; the logit is their product's sum."""


class FrozenBackbone(nn.Module):
    """A frozen DINOv2-shaped ViT that turns images into feature maps at several depths.

    The parameters never get gradients and the mode is always eval, so gradients flow to the images
    alone (wrap the call in `torch.no_grad` where none are wanted).

    Args:
        name: a timm name such as `vit_large_patch14_dinov2.lvd142m`, or `local-dir:PATH`, a folder
            with timm's config.json and the weights.
        taps: blocks whose outputs are features, ascending. The input of block 0 always comes first.
        checkpoint: a local .safetensors or .pth for `name`; without it timm finds the weights.
        random_seed: random weights from this seed, and nothing is loaded (for tests and planning).
        dtype: of the weights, the computation and the features.

    Raises:
        ValueError: the model is no ViT with a CLS token, a tap does not exist, or the arguments
            name two sources of weights.
    """

    mean: Tensor  # (3, 1, 1), of the images it was trained on; std likewise
    std: Tensor

    def __init__(
        self,
        name: str,
        taps: Sequence[int],
        checkpoint: str | Path | None = None,
        random_seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        vit = create_vit(name, checkpoint, random_seed, dtype)
        if list(taps) != sorted(set(taps)) or not 0 <= min(taps) <= max(taps) < len(vit.blocks):
            raise ValueError(
                f"taps must ascend within 0..{len(vit.blocks) - 1} for {name}, got {list(taps)}"
            )
        # an identity in front makes the input of block 0 one more intermediate; what lies behind
        # the last tap is never run
        vit.blocks = nn.Sequential(nn.Identity(), *vit.blocks[: max(taps) + 1])
        vit.norm = nn.Identity()
        self.vit = vit.requires_grad_(False)
        self.indices = [0] + [tap + 1 for tap in taps]
        self.width: int = vit.embed_dim
        self.dtype = dtype
        config = cast(dict[str, Any], vit.pretrained_cfg)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)
        self.eval()

    @property
    def num_features(self) -> int:
        """How many feature maps a call returns: the taps and the embedding."""
        return len(self.indices)

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in eval mode whatever the parent module asks for."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract the features of images (B, 3, H, W) in [-1, 1] at their native size.

        Height and width are cropped at the centre to multiples of the patch (1024 -> 1022 for 14),
        and the position table is resized to that grid.

        Returns:
            `num_features` maps (B, width, h, w), shallow to deep; the CLS token is added to every
            patch token.
        """
        images = (_crop_to_multiple(images.float(), self.vit.patch_embed.patch_size) + 1) / 2
        images = ((images - self.mean) / self.std).to(self.dtype)
        outputs = self.vit.forward_intermediates(
            images, indices=self.indices, return_prefix_tokens=True, intermediates_only=True
        )
        pairs = cast(list[tuple[Tensor, Tensor]], outputs)
        # the CLS token is the first of the prefix; registers, if any, follow it and are left out
        return [patches + prefix[:, 0, :, None, None] for patches, prefix in pairs]


def create_vit(
    name: str, checkpoint: str | Path | None, random_seed: int | None, dtype: torch.dtype
) -> VisionTransformer:
    """Build the ViT through timm, with exactly one source of weights."""
    if checkpoint is not None and (random_seed is not None or ":" in name):
        raise ValueError(f"{name}: checkpoint {checkpoint} is a second source of weights")
    overlay = None if checkpoint is None else {"file": str(checkpoint)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_seed or 0)
        vit = timm.create_model(
            name,
            pretrained=random_seed is None,
            pretrained_cfg_overlay=overlay,
            num_classes=0,
            dynamic_img_size=True,
            dtype=dtype,
        )
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise ValueError(f"{name} is not a vision transformer with a CLS token")
    return vit


def _crop_to_multiple(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Crop (..., H, W) at the centre to the largest multiple of the patch in each direction."""
    (height, width), (patch_height, patch_width) = images.shape[-2:], patch_size
    top, left = height % patch_height, width % patch_width
    if height < patch_height or width < patch_width:
        raise ValueError(f"images of {height}x{width} are smaller than a patch {patch_size}")
    rows = slice(top // 2, top // 2 + height - top)
    return images[..., rows, left // 2 : left // 2 + width - left]


class PromptEncoder(nn.Module):
    """A frozen CLIP text tower that turns prompts into unit vectors.

    Args:
        name: an open_clip name such as `ViT-L-14`, or `local-dir:PATH`, a folder with
            open_clip_config.json and the weights.
        checkpoint: for a name, one of open_clip's tags (`openai`) or a local weights file.
        quick_gelu: the activation the weights were trained with. None follows the tag or the
            folder's config; for a file it must be said where the name exists with both.
        random_seed: random weights from this seed, and nothing is loaded (for tests and planning).

    Raises:
        ValueError: no or two sources of weights, or the activation of a file is not known.
        RuntimeError: from open_clip, the weights could not be loaded.
    """

    def __init__(
        self,
        name: str = "ViT-L-14",
        checkpoint: str | None = "openai",
        quick_gelu: bool | None = None,
        random_seed: int | None = None,
    ) -> None:
        super().__init__()
        needs_checkpoint = ":" not in name and random_seed is None
        if (checkpoint is not None) != needs_checkpoint:
            raise ValueError(
                f"{name}: need one source of weights, got {checkpoint=} {random_seed=}"
            )
        if quick_gelu is None:
            quick_gelu = checkpoint is not None and _trained_with_quick_gelu(name, checkpoint)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random_seed or 0)
            clip = open_clip.create_model(
                name,
                pretrained=checkpoint,
                load_weights=random_seed is None,
                require_pretrained=random_seed is None,
                device=torch.get_default_device(),
                force_quick_gelu=quick_gelu,
                force_custom_text=True,  # the text tower as a module of its own
            )
        self.text = clip.text.requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.dim: int = self.text.output_dim
        self.eval()

    def train(self, mode: bool = True) -> "PromptEncoder":
        """Stay in eval mode whatever the parent module asks for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Tensor:
        """Encode prompts to (B, dim) float32 of unit length, without gradient."""
        tokens = self.tokenizer(prompts).to(self.text.positional_embedding.device)
        return F.normalize(self.text(tokens).float(), dim=-1)


def _trained_with_quick_gelu(name: str, checkpoint: str) -> bool:
    """Look up the activation of a tag; open_clip only warns where name and tag disagree."""
    tag = open_clip.get_pretrained_cfg(name, checkpoint)
    if not tag and f"{name}-quickgelu" in open_clip.list_models():
        raise ValueError(f"{name} from {checkpoint}: say quick_gelu, true for OpenAI's weights")
    return bool(tag.get("quick_gelu", False))


def _activated(width: int, kernel: int, virtual_batch: int) -> nn.Sequential:
    """Spectral convolution - local batch norm - leaky ReLU."""
    return nn.Sequential(
        SpectralConv(width, width, kernel),
        LocalBatchNorm(width, virtual_batch),
        nn.LeakyReLU(0.2, inplace=True),
    )


def _common_map(width: int, virtual_batch: int) -> nn.Sequential:
    """The trunk, width wide and ending at an eighth of the map's size, then 1x1 to COMMON_DIM.

    The strided convolutions stand bare: every activation is in the first layer and the residual
    blocks. On small inputs the last map is 1x1, where a norm over one sample would erase it.
    """
    return nn.Sequential(
        _activated(width, 1, virtual_batch),
        SpectralConv(width, width, 3, stride=2),
        Residual(_activated(width, 3, virtual_batch)),
        SpectralConv(width, width, 3, stride=2),
        Residual(_activated(width, 3, virtual_batch)),
        SpectralConv(width, width, 3, stride=2),
        SpectralConv(width, COMMON_DIM, 1),
    )


class Head(nn.Module):
    """The discriminator of one tap: class map times condition, condition = text + reference.

    Args:
        width: channels of the backbone's features.
        text_dim: length of the prompt features.
        reference: whether a second trunk reads the features of a reference image.
        virtual_batch: of the local batch norms.
    """

    def __init__(self, width: int, text_dim: int, reference: bool, virtual_batch: int = 1) -> None:
        super().__init__()
        self.virtual_batch = virtual_batch
        self.class_map = _common_map(width, virtual_batch)
        self.text = nn.Linear(text_dim, COMMON_DIM)
        self.reference = _common_map(width, virtual_batch) if reference else None

    def forward(self, features: Tensor, text: Tensor, reference: Tensor | None) -> Tensor:
        """Judge every place of the features' map.

        Args:
            features: (B, width, h, w).
            text: (b, text_dim), b dividing B: conditions are repeated, so that [real, fake] of the
                same prompts run the reference's trunk once.
            reference: (b, width, h, w) if the head was built with one, otherwise None.

        Returns:
            (B, L) float32 logits, L = ceil(h / 8) ceil(w / 8).

        Raises:
            ValueError: a reference is missing or superfluous, or b does not divide B.
        """
        if (reference is None) != (self.reference is None):
            raise ValueError("pass a reference exactly where the head is built with one")
        if features.shape[0] % text.shape[0]:
            raise ValueError(f"{text.shape[0]} conditions do not divide {features.shape[0]} images")
        # (b, COMMON_DIM, 1, 1), in float32 under FSDP's bfloat16 parameters too
        condition = F.linear(text.float(), self.text.weight.float(), self.text.bias.float())
        condition = condition[:, :, None, None]
        if reference is not None and self.reference is not None:
            condition = condition + self.reference(reference).float()
        condition = condition.repeat(features.shape[0] // text.shape[0], 1, 1, 1)
        class_map = self._class_map(features, len(text)).float()  # (B, COMMON_DIM, h/8, w/8)
        product = class_map * condition
        return product.sum(1).flatten(1) / math.sqrt(COMMON_DIM)

    def _class_map(self, features: Tensor, num: int) -> Tensor:
        """The class map; virtual batches never mix real and fake, which come `num` at a time."""
        if self.virtual_batch == 1:
            whole: Tensor = self.class_map(features)
            return whole
        with parametrize.cached():  # one spectral norm, so one power iteration, for all parts
            return torch.cat([self.class_map(part) for part in features.split(num)])


class Heads(nn.Module):
    """One head per tap: all that the discriminator trains.

    Eight heads of width 1024 with text features of 768 and a reference hold 773,391,872
    parameters (386,892,800 without a reference): shard them, one unit per head.

    The mode matters to spectral norm alone: each forward in train mode is one power iteration. The
    heads stay in eval mode, so that the generator's turn leaves no trace, and `power_iteration`
    moves the norms where the heads themselves are stepped; for results that do not depend on
    accumulation, with the first micro-batch of a step only.

    Args:
        num_taps: how many heads.
        width, text_dim, reference, virtual_batch: as in `Head`.
        seed: of the initial weights, so that all ranks start from the same heads; the global
            generator is left as it was. Build on the CPU or the meta device; `draw` makes the heads
            with their weights again, one after the other, to fill those of the meta device.
        dtype: of the convolutions; the features are cast to it. Weights stay float32.
    """

    def __init__(
        self,
        num_taps: int,
        width: int,
        text_dim: int,
        reference: bool = True,
        virtual_batch: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        make = partial(Head, width, text_dim, reference, virtual_batch)
        self.draw = partial(seeded, seed, [make] * num_taps)
        self.heads = nn.ModuleList(self.draw())
        self.norms = [module for module in self.modules() if isinstance(module, _SpectralNorm)]

    @contextmanager
    def power_iteration(self, moving: bool = True) -> Iterator[None]:
        """Let the norms move in a forward, or not; the other 700 modules are not walked through."""
        for norm in self.norms:
            norm.training = moving
        try:
            yield
        finally:
            for norm in self.norms:
                norm.training = False

    def forward(
        self, features: list[Tensor], text: Tensor, references: list[Tensor] | None
    ) -> Tensor:
        """Concatenate the logits of all heads, shallow to deep: (B, sum of L), float32.

        Args:
            features: one map (B, width, h, w) per head, as `FrozenBackbone` returns them.
            text: (b, text_dim) prompt features, b dividing B (see `Head`).
            references: one map (b, width, h, w) per head, of the image paired with each prompt or
                of another one (the caller decides), or None for heads built without.
        """
        features = [maps.to(self.dtype) for maps in features]
        references = references and [maps.to(self.dtype) for maps in references]
        per_head: Sequence[Tensor | None] = references or [None] * len(self.heads)
        return torch.cat(
            [
                head(maps, text, reference)
                for head, maps, reference in zip(self.heads, features, per_head, strict=True)
            ],
            dim=1,
        )
