"""Differentiable augmentation of the discriminator's images: colour, translation, cutout.

The policy of DiffAugment (Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN
Training"). The random numbers are an argument, so a caller draws them as a function of seed,
iteration and sample, and real and fake images can share or differ in them as it likes.
"""

import torch
from torch import Tensor

NUM_UNIFORMS = 7
"""Uniform numbers per sample: brightness, saturation, contrast, the translation's row and column,
the cutout's row and column."""
TRANSLATION = 0.125  # at most, as a share of the height or width
CUTOUT = 0.2  # its side, as a share of the height or width


def diff_augment(images: Tensor, uniforms: Tensor) -> Tensor:
    """Each image with its own colour change, translation and cutout, not clamped.

    images: (B, 3, H, W) in [-1, 1]; gradients flow through them. uniforms: (B, NUM_UNIFORMS) in
    [0, 1), one row per image; 0.5 leaves a colour unchanged. Pixels moved in from outside and
    pixels cut out are 0, which is mid-grey.
    """
    assert uniforms.shape == (images.shape[0], NUM_UNIFORMS), uniforms.shape
    brightness, saturation, contrast, *geometry = uniforms.unbind(1)  # each (B,)
    return _move_and_cut(_colour(images, brightness, saturation, contrast), *geometry)


def _colour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness by U(-.5, .5), saturation times U(0, 2), contrast times U(.5, 1.5)."""
    brightness, saturation, contrast = (
        u.to(images.dtype).view(-1, 1, 1, 1) for u in (brightness, saturation, contrast)
    )
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)  # (B, 1, H, W)
    images = (images - grey) * (2 * saturation) + grey
    level = images.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (images - level) * (contrast + 0.5) + level


def _move_and_cut(
    images: Tensor, move_row: Tensor, move_col: Tensor, cut_row: Tensor, cut_col: Tensor
) -> Tensor:
    """Translate by whole pixels, zeros coming in, then zero a square that the border may clip."""
    height, width = images.shape[-2:]
    rows, inside_rows = _shifted_index(height, move_row)  # (B, H)
    cols, inside_cols = _shifted_index(width, move_col)  # (B, W)
    source = (rows[:, :, None] * width + cols[:, None, :]).flatten(1)  # (B, H * W)
    flat = images.flatten(2)
    moved = flat.gather(2, source[:, None].expand_as(flat)).view_as(images)

    inside = inside_rows[:, :, None] & inside_cols[:, None, :]  # (B, H, W)
    cut = _cut_span(height, cut_row)[:, :, None] & _cut_span(width, cut_col)[:, None, :]
    return moved * (inside & ~cut)[:, None].to(images.dtype)


def _shifted_index(length: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where each output pixel of one axis reads from, and whether that lies inside: (B, length)."""
    limit = int(length * TRANSLATION + 0.5)
    shift = _integer(u, 2 * limit + 1) - limit  # (B,), -limit .. limit
    index = torch.arange(length, device=u.device) + shift[:, None]
    return index.clamp(0, length - 1), (index >= 0) & (index < length)


def _cut_span(length: int, u: Tensor) -> Tensor:
    """Which pixels of one axis the cutout covers: (B, length) booleans."""
    size = int(length * CUTOUT + 0.5)
    # an even cutout may also be centred on the border length itself, as an odd one on length - 1
    start = _integer(u, length + 1 - size % 2) - size // 2  # (B,)
    offset = torch.arange(length, device=u.device) - start[:, None]
    return (offset >= 0) & (offset < size)


def _integer(u: Tensor, count: int) -> Tensor:
    """Map uniforms in [0, 1) to integers 0 .. count - 1, equally likely."""
    # Just below 1, float32 rounds u * count up to count.
    return (u.float() * count).long().clamp_(0, count - 1)
