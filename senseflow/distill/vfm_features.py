"""What SenseFlow's discriminator sees, frozen: DINO's features of images, CLIP's of prompts.

In D(x, c, r) = h(f_VFM(x), c, r), the discriminator of the paper's adversarial objective (Eq. 15),
f_VFM is a frozen DINOv2 or DINOv3 tapped at several depths (`FrozenBackbone`), c the CLIP feature
of the prompt (`PromptEncoder`) and r f_VFM of a real image. What learns is h, in
`senseflow.distill.vfm_heads`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from senseflow.common.devices import to_device
from senseflow.common.files import read_json

LOCAL = "local-dir:"  # before a folder, in timm's names
MODULES = ("vision_transformer", "eva")  # of timm, with DINOv2 and DINOv3
ASKED = (
    "a DINOv2 or DINOv3 is asked for, such as vit_large_patch14_dinov2.lvd142m, or local-dir:FOLDER"
)


class FrozenBackbone(nn.Module):
    """A frozen ViT, DINOv2 or DINOv3, that turns images into feature maps at several depths.

    The parameters never get gradients and the mode is always eval, so gradients flow to the images
    alone.

    name: a timm name such as `vit_large_patch14_dinov2.lvd142m`, or `local-dir:PATH`, a folder with
    timm's config.json and the weights. taps: blocks whose outputs are features, ascending; the
    input of block 0 always comes first. checkpoint: a local .safetensors or .pth for `name`;
    without it timm finds the weights. random_seed: random weights, and nothing is loaded (for tests
    and planning). dtype: of the weights, the computation and the features.
    Raises ValueError for a model of another kind (`create_vit`), a tap that does not exist, and two
    sources of weights.
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
                f"adversarial.taps must ascend within 0..{len(vit.blocks) - 1}, got {list(taps)}"
            )
        # what lies behind the last tap is never run
        vit.prune_intermediate_layers(list(taps), prune_norm=True)
        # in front, so that the input of block 0 is one more intermediate
        vit.blocks = nn.Sequential(_Passing(), *vit.blocks)
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
        """Features of images (B, 3, H, W) in [-1, 1]: `num_features` maps (B, width, h, w), shallow
        to deep, the CLS token added to every patch token.

        At the images' own size, cropped at the centre to multiples of the patch (1024 -> 1022 for
        14, 1024 for 16); timm resizes DINOv2's position table to that grid, and turns DINOv3's
        rotary positions by it.
        """
        # Normalised in float32: bfloat16 hardly tells the 256 levels of a pixel apart.
        images = (_crop_to_multiple(images.float(), self.vit.patch_embed.patch_size) + 1) / 2
        images = ((images - self.mean) / self.std).to(self.dtype)
        outputs = self.vit.forward_intermediates(
            images, indices=self.indices, return_prefix_tokens=True, intermediates_only=True
        )
        pairs = cast(list[tuple[Tensor, Tensor]], outputs)
        # the CLS token is the first of the prefix; registers, if any, follow it and are left out
        return [patches + prefix[:, 0, :, None, None] for patches, prefix in pairs]


class _Passing(nn.Module):
    """A block that does nothing; DINOv3's are also told rotary positions."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x


def create_vit(
    name: str, checkpoint: str | Path | None, random_seed: int | None, dtype: torch.dtype
) -> VisionTransformer | Eva:
    """Build the ViT through timm, with exactly one source of weights.

    Of class VisionTransformer, as DINOv2, or Eva, as DINOv3, with a CLS token; raises ValueError
    for any other, and where every block has rotary positions of its own.
    """
    architecture = architecture_of(name)
    # hf-hub: is known when timm has fetched it
    if ":" not in architecture and not timm.models.is_model_in_modules(architecture, MODULES):
        raise ValueError(f"{architecture} is none of timm's vision transformers: {ASKED}")
    if checkpoint is not None and (random_seed is not None or ":" in name):
        raise ValueError(f"{name}: checkpoint {checkpoint} is a second source of weights")
    overlay = None if checkpoint is None else {"file": str(checkpoint)}
    # Initial weights are drawn even where others are loaded: the run's generator stays put.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_seed or 0)
        vit = timm.create_model(
            name,
            pretrained=random_seed is None,
            pretrained_cfg_overlay=overlay,
            num_classes=0,
            # Positions are those of the image's grid; the image is not resized to a table's.
            dynamic_img_size=True,
            dtype=dtype,
        )
    if not isinstance(vit, VisionTransformer | Eva) or vit.cls_token is None:
        raise ValueError(f"{name}, a {type(vit).__name__}, has no CLS token to read: {ASKED}")
    if isinstance(vit, Eva) and vit.rope_mixed:
        raise ValueError(f"{name} has rotary positions of each block's own: {ASKED}")
    return vit


def architecture_of(name: str) -> str:
    """What timm calls the model of a name or folder; raises ValueError for a folder of none."""
    if not name.startswith(LOCAL):
        return name
    config = Path(name.removeprefix(LOCAL)) / "config.json"
    architecture = read_json(config).get("architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"{config} names no architecture: it is no config of timm")
    return architecture


def _crop_to_multiple(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Crop (..., H, W) at the centre to the largest multiple of the patch in each direction."""
    (height, width), (patch_height, patch_width) = images.shape[-2:], patch_size
    top, left = height % patch_height, width % patch_width
    if height < patch_height or width < patch_width:
        raise ValueError(f"images of {height}x{width} are smaller than a patch {patch_size}")
    # Not padded: that would add a row of tokens no image fills (74 x 74 at 1024 px).
    rows = slice(top // 2, top // 2 + height - top)
    return images[..., rows, left // 2 : left // 2 + width - left]


class PromptEncoder(nn.Module):
    """A frozen CLIP text tower that turns prompts into unit vectors.

    name: an open_clip name such as `ViT-L-14`, or `local-dir:PATH`, a folder with
    open_clip_config.json and the weights. checkpoint: for a name, one of open_clip's tags
    (`openai`) or a local weights file. quick_gelu: the activation the weights were trained with;
    None follows the tag or the folder's config, for a file it must be said where the name exists
    with both. random_seed: random weights, and nothing is loaded (for tests and planning).
    Raises ValueError for no or two sources of weights and an activation that is not known;
    open_clip raises RuntimeError for weights that cannot be loaded.
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
        tokens = to_device(self.tokenizer(prompts), self.text.positional_embedding.device)
        return F.normalize(self.text(tokens).float(), dim=-1)


def _trained_with_quick_gelu(name: str, checkpoint: str) -> bool:
    """Look up the activation of a tag; open_clip only warns where name and tag disagree."""
    tag = open_clip.get_pretrained_cfg(name, checkpoint)
    if not tag and f"{name}-quickgelu" in open_clip.list_models():
        raise ValueError(f"{name} from {checkpoint}: say quick_gelu, true for OpenAI's weights")
    return bool(tag.get("quick_gelu", False))
