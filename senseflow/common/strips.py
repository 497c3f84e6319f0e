"""Image strips: what an iteration computed, side by side, with labels."""

from PIL import Image, ImageDraw
from torch import Tensor

from senseflow.common.pictures import to_pil

MIN_SIDE = 96  # small pictures are enlarged so that labels can be read
LABEL_HEIGHT = 16


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
