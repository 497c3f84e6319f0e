"""Crops and sizes against PIL's own operations and hand-made pictures."""

import numpy as np
import pytest
import torch
from image_folders import draw
from PIL import Image

from senseflow.evaluate.metrics.preprocess import clean_bicubic, fid_pixels, patch_pixels, square


def test_the_patch_is_the_centre_of_the_full_image():
    array = np.zeros((400, 599, 3), np.uint8)
    array[..., 0] = np.arange(400)[:, None] % 256
    array[..., 1] = np.arange(599)[None, :] % 256
    array[50:349, 150:449, 2] = 255  # (400 - 299) / 2 = 50.5, (599 - 299) / 2 = 150
    patch = patch_pixels(Image.fromarray(array))
    assert patch.shape == (3, 299, 299) and patch.dtype == torch.float32
    np.testing.assert_array_equal(patch.numpy().transpose(1, 2, 0), array[50:349, 150:449])


def test_a_patch_of_its_own_size_is_the_image():
    picture = draw(0, (299, 299))
    np.testing.assert_array_equal(
        patch_pixels(picture).numpy().transpose(1, 2, 0), np.array(picture)
    )


def test_a_smaller_image_has_no_patch():
    with pytest.raises(ValueError, match="300x298 is smaller than the 299x299 crop"):
        patch_pixels(draw(0, (300, 298)))


@pytest.mark.parametrize("size", [(640, 640), (700, 600), (320, 480)])
def test_fid_pixels_are_crop_lanczos_and_bicubic_of_each_channel(size):
    picture = draw(1, size)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cropped = picture.crop((left, top, left + side, top + side))
    at_512 = cropped.resize((512, 512), Image.Resampling.LANCZOS)
    expected = [
        np.array(
            Image.fromarray(np.array(at_512)[..., c].astype(np.float32), mode="F").resize(
                (299, 299), Image.Resampling.BICUBIC
            )
        ).clip(0, 255)
        for c in range(3)
    ]
    np.testing.assert_array_equal(fid_pixels(picture, 512).numpy(), np.stack(expected))


def test_bicubic_is_not_rounded_and_stays_in_range():
    array = np.zeros((64, 64, 3), np.uint8)
    array[:, 32:] = 255  # bicubic overshoots at the edge
    pixels = clean_bicubic(Image.fromarray(array), 51)
    assert pixels.min() == 0 and pixels.max() == 255
    assert (pixels != pixels.round()).any()


def test_without_a_size_the_square_is_not_resized():
    assert square(draw(2, (40, 30)), None).size == (30, 30)
    assert square(draw(2, (40, 30)), 16).size == (16, 16)
