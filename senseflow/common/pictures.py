"""Tensors as pictures and labelled strips of them, and files that are whole or not there."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from senseflow.common.files import naming

MIN_SIDE = 96  # small pictures are enlarged so that labels can be read
LABEL_HEIGHT = 16


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] as 8-bit pictures."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(level.numpy()) for level in levels.permute(0, 2, 3, 1).cpu()]


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) float32 in [-1, 1]."""
    array = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return array.permute(2, 0, 1).float() / 127.5 - 1


def save_whole(picture: Image.Image, file: Path) -> None:
    """Write a PNG, and its folder, so that it appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with naming(file):
            picture.save(partial, format="PNG")
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def labelled_grid(columns: dict[str, Tensor]) -> Image.Image:
    """One column per name, one row per sample; each value is (B, 3, H, W) in [-1, 1]."""
    rows = max(len(images) for images in columns.values())
    height, width = next(iter(columns.values())).shape[-2:]
    scale = max(1, -(-MIN_SIDE // min(height, width)))
    height, width = height * scale, width * scale
    sheet = Image.new("RGB", (width * len(columns), LABEL_HEIGHT + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (label, images) in enumerate(columns.items()):
        draw.text((x * width + 3, 2), label, fill="black")
        for y, picture in enumerate(to_pil(images)):
            tile = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (x * width, LABEL_HEIGHT + y * height))
    return sheet
