"""From pictures to the pixels that Inception sees, and the crops and sizes the others share."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

INCEPTION_SIDE = 299


def centre_square(picture: Image.Image) -> Image.Image:
    """The largest square at the centre."""
    middle: Image.Image = center_crop(picture, min(picture.size))
    return middle


def square(picture: Image.Image, side: int | None) -> Image.Image:
    """The square at the centre, brought to `side` pixels with LANCZOS; None: left at its size."""
    cropped = centre_square(picture)
    return cropped.resize((side, side), Image.Resampling.LANCZOS) if side else cropped


def fid_pixels(picture: Image.Image, side: int | None) -> Tensor:
    """What FID-T's Inception sees, (3, 299, 299) float32 in [0, 255].

    DMD2's: the square at the centre, LANCZOS to `side`, then `clean_bicubic` to 299.
    """
    return clean_bicubic(square(picture, side), INCEPTION_SIDE)


def clean_bicubic(picture: Image.Image, side: int) -> Tensor:
    """Antialiased bicubic in float32, (3, side, side) in [0, 255] (Parmar et al. 2022)."""
    size = (side, side)
    channels = [
        np.asarray(channel.convert("F").resize(size, Image.Resampling.BICUBIC))
        for channel in picture.split()
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)


def patch_pixels(picture: Image.Image) -> Tensor:
    """What Patch FID-T's Inception sees: the centre (3, 299, 299) of the image, unresized.

    Raises ValueError for a smaller image.
    """
    if min(picture.size) < INCEPTION_SIDE:
        width, height = picture.size
        raise ValueError(
            f"{width}x{height} is smaller than the {INCEPTION_SIDE}x{INCEPTION_SIDE} crop of "
            "patch_fid_t"
        )
    array = np.array(center_crop(picture, INCEPTION_SIDE))
    return torch.from_numpy(array).permute(2, 0, 1).float()
