"""The discriminator's frozen networks at toy size: a DINOv2-shaped ViT and a CLIP text tower.

The ViT learns to read all attributes from its CLS token, and from its patch tokens to read the
digit they belong to and to fill in masked patches, so that both carry what a discriminator can
use. The text tower learns to match captions to features of pictures. timm and open_clip load the
folders by their `local-dir:` names.
"""

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from senseflow.tiny.captions import ATTRIBUTES, NUM_CLASSES, captions_of, split_scenes
from senseflow.tiny.fitting import fit
from senseflow.tiny.judge import augment, cross_entropy
from senseflow.tiny.pictures import BACKGROUND_RGB, SIZE, draw_scenes, render
from senseflow.tiny.text import CLIP_LENGTH, WIDTH, new_clip_tokenizer

PATCH = 4
MASK_SHARE = 0.4
NUM_READ, NUM_FILLED, VIT_LEARNING_RATE = 48, 16, 1.5e-3
CLIP_BATCH_SIZE, CLIP_LEARNING_RATE = 256, 2e-3
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ARCHITECTURE = "vit_small_patch14_dinov2"
_VIT_ARGUMENTS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": 6,
    "num_heads": 4,
    "init_values": 1.0,
    "num_classes": 0,
}


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as DINOv2 takes them: [0, 1], then ImageNet's mean and deviation."""
    mean, std = (torch.tensor(c)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images + 1) / 2 - mean) / std


class Pretext(nn.Module):
    """The heads that teach the ViT, thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(WIDTH, sum(NUM_CLASSES.values()))
        self.digit = nn.Linear(WIDTH, NUM_CLASSES["digit_a"])
        self.ink = nn.Linear(WIDTH, PATCH * PATCH)
        self.fill_in = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def logits(self, cls_token: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits per attribute from the CLS token (B, 64)."""
        logits: torch.Tensor = self.classify(cls_token)
        return torch.split(logits, list(NUM_CLASSES.values()), dim=1)

    def patch_loss(self, tokens: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each digit, read from the mean of the patch tokens of its half.

        The halves are left and right, or top and bottom; tokens (B, N, 64), attributes (B, 6).
        """
        maps = self.digit(tokens).unflatten(1, (math.isqrt(tokens.shape[1]), -1))
        # (B, rows, columns, 10)
        above = (attributes[:, -1] == 1)[:, None, None, None]
        maps = torch.where(above, maps.transpose(1, 2), maps)
        halves = [half.mean((1, 2)) for half in maps.chunk(2, dim=2)]
        losses = [F.cross_entropy(half, attributes[:, i]) for i, half in enumerate(halves)]
        return torch.stack(losses).mean()

    def ink_loss(self, tokens: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of ink or background, pixel by pixel; ink is (B, 1, 32, 32) in [0, 1]."""
        target = F.unfold(ink, PATCH, stride=PATCH).transpose(1, 2)  # (B, 64, 16)
        return F.binary_cross_entropy_with_logits(self.ink(tokens), target)

    def filling_loss(
        self, tokens: torch.Tensor, images: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Error on masked patches; tokens (B, 64, W), images (B, 3, 32, 32), mask (B, 1, 8, 8)."""
        target = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)  # (B, 64, 48)
        error: torch.Tensor = (self.fill_in(tokens) - target).square().mean(2)
        return (error * mask.flatten(1)).sum() / mask.sum()


def ink_of(images: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    """Where `images` (B, 3, 32, 32) in [-1, 1] are not background: (B, 1, 32, 32) in [0, 1]."""
    background = BACKGROUND_RGB[attributes[:, ATTRIBUTES.index("background")]][:, :, None, None]
    difference = ((images + 1) / 2 - background).abs().amax(1, keepdim=True)
    return (3 * difference - 0.3).clamp(0, 1)


def wave_positions(grid: int = SIZE // PATCH) -> torch.Tensor:
    """A start for position embeddings, (1, 1 + grid^2, 64): sines and cosines of row and column."""
    frequencies = torch.arange(1, WIDTH // 4 + 1) * (math.pi / 2 / grid)
    waves = torch.arange(grid)[:, None] * frequencies  # (8, 16)
    waves = torch.cat([waves.sin(), waves.cos()], 1)
    rows = waves[:, None].expand(grid, grid, -1)
    patches = torch.cat([rows, rows.transpose(0, 1)], 2).flatten(0, 1)
    return torch.cat([torch.zeros(1, WIDTH), 0.5 * patches])[None]


def new_vit() -> VisionTransformer:
    """An untrained timm DINOv2 architecture of 0.3 M parameters: patch 4, width 64, 6 blocks."""
    vit = timm.create_model(_ARCHITECTURE, **_VIT_ARGUMENTS)
    assert isinstance(vit, VisionTransformer) and vit.pos_embed is not None
    vit.pos_embed.data.copy_(wave_positions())
    return vit


def train_vit(iterations: int, seed: int) -> tuple[VisionTransformer, dict[str, float]]:
    """A trained ViT, and the accuracies of its CLS token on held-out scenes of held-out scans."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vit, heads, scenes = new_vit(), Pretext(), split_scenes()[0]
    grid = SIZE // PATCH

    def loss_of(_: int) -> torch.Tensor:
        attributes = draw_scenes(scenes, NUM_READ + NUM_FILLED, generator)
        images = render(attributes, generator)
        noisy = augment(images, generator)
        mask = torch.rand(len(images), 1, grid, grid, generator=generator).lt(MASK_SHARE).float()
        mask[:NUM_READ] = 0
        visible = 1 - F.interpolate(mask, scale_factor=PATCH, mode="nearest")
        tokens = vit.forward_features(normalise(noisy) * visible)
        whole, masked = tokens.split([NUM_READ, NUM_FILLED])
        read = attributes[:NUM_READ]
        reading = cross_entropy(heads.logits(whole[:, 0]), read)
        filling = heads.filling_loss(masked[:, 1:], images[NUM_READ:], mask[NUM_READ:])
        ink = heads.ink_loss(whole[:, 1:], ink_of(images, attributes)[:NUM_READ])
        return reading + heads.patch_loss(whole[:, 1:], read) + ink + filling

    _, loss = fit(loss_of, [vit, heads], iterations, VIT_LEARNING_RATE, "dinov2")
    scenes = draw_scenes(split_scenes()[1], 1000, generator)
    with torch.no_grad():
        tokens = vit.forward_features(normalise(render(scenes, generator, held_out_scans=True)))
    read = torch.stack([logits.argmax(1) for logits in heads.logits(tokens[:, 0])], 1)
    rates = (read == scenes).double().mean(0)
    return vit, {"loss": loss} | dict(zip(ATTRIBUTES, rates.tolist(), strict=True))


def save_vit(vit: nn.Module, folder: Path) -> None:
    """Write a folder for `timm.create_model("local-dir:...", pretrained=True)`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": _ARCHITECTURE,
        "num_classes": 0,
        "num_features": WIDTH,
        "model_args": _VIT_ARGUMENTS,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "fixed_input_size": True,
            "num_classes": 0,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "license": "apache-2.0",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(vit.state_dict(), folder / "model.safetensors")


def write_clip_config(folder: Path) -> None:
    """The tokenizer and open_clip's description; its image tower is as small as one can be."""
    tokenizer = new_clip_tokenizer()
    tokenizer.save_pretrained(folder)
    towers = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": SIZE,
            "patch_size": 8,
            "width": 32,
            "layers": 1,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": CLIP_LENGTH,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "local",
            "width": WIDTH,
            "heads": 4,
            "layers": 2,
        },
    }
    preprocess = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    config = {"model_cfg": towers, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train_clip(
    vit: VisionTransformer, iterations: int, seed: int, folder: Path
) -> dict[str, float]:
    """Train a CLIP whose text tower matches features of the frozen `vit`, and write it to `folder`.

    The picture's side of the match is the ViT's CLS token through a linear map: open_clip's own
    image tower stays untrained, since nothing uses it. The figure is how often a caption finds its
    picture among 256 held-out ones.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_clip_config(folder)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    clip.visual.requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    project = nn.Linear(WIDTH, WIDTH)
    scenes, held_out = split_scenes()

    def match(chosen: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            cls_token = vit.forward_features(normalise(render(chosen, generator)))[:, 0]
        text = clip.encode_text(tokenizer(captions_of(chosen)), normalize=True)
        seen = F.normalize(project(cls_token), dim=1)
        logits: torch.Tensor = clip.logit_scale.exp() * text @ seen.T
        return logits

    def loss_of(_: int) -> torch.Tensor:
        logits = match(draw_scenes(scenes, CLIP_BATCH_SIZE, generator))
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    _, loss = fit(loss_of, [clip, project], iterations, CLIP_LEARNING_RATE, "clip")
    with torch.no_grad():
        logits = match(held_out[torch.randperm(len(held_out), generator=generator)[:256]])
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    found = (logits.argmax(1) == torch.arange(256)).double().mean().item()
    return {"loss": loss, "caption_finds_picture": found}
