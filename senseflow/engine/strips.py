"""Image strips: what an iteration computed, side by side, with labels."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

MIN_SIDE = 96  # small pictures are enlarged so that labels can be read
LABEL_HEIGHT = 16


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to a picture."""
    array = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


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
        for y, image in enumerate(images):
            tile = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (x * width, LABEL_HEIGHT + y * height))
    return sheet


def save_picture(picture: Image.Image, file: Path) -> None:
    """Write a PNG that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name("." + file.name)
    picture.save(partial, format="PNG")
    partial.rename(file)
