"""Tensors as pictures, and pictures as files that are whole or not there."""

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] as 8-bit pictures."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(level.numpy()) for level in levels.permute(0, 2, 3, 1).cpu()]


def save_whole(picture: Image.Image, file: Path) -> None:
    """Write a PNG, and its folder, so that it appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        picture.save(partial, format="PNG")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
