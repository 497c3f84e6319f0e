"""FID-T and Patch FID-T against torchmetrics and torch-fidelity on the same features.

Crops and sizes against PIL's own operations and hand-made pictures.
"""

import math

import numpy as np
import pytest
import torch
from image_folders import PROMPTS, draw, pictures, write_images
from metric_parts import RandomInception, error_of, save_torchscript_inception, score, value
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from senseflow.distill.scorers.metric import square
from senseflow.evaluate.metrics.frechet import FeatureStatistics, frechet_distance
from senseflow.evaluate.metrics.inception import (
    clean_bicubic,
    fid_pixels,
    open_inception,
    patch_pixels,
)

MANY = [f"prompt {number}" for number in range(16)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images, reference, and a small Inception of 12 features."""
    base = tmp_path_factory.mktemp("fid")
    images = write_images(base / "student", MANY)
    reference = write_images(base / "teacher", MANY, start=50)
    return images, reference, save_torchscript_inception(base / "inception.pt")


class Features(torch.nn.Module):
    """What the TorchScript's own layers make of pixels in [0, 255]."""

    num_features = 12

    def __init__(self, file):
        super().__init__()
        self.layers = torch.jit.load(str(file)).layers

    def forward(self, pixels):
        return self.layers((pixels - 128) / 128).flatten(1)


def at_299(picture):
    """FID-T's preprocessing of a square picture, with PIL alone."""
    array = np.array(picture.resize((512, 512), Image.Resampling.LANCZOS)).astype(np.float32)
    channels = [
        np.array(Image.fromarray(array[..., c]).resize((299, 299), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def patch(picture):
    """Patch FID-T's of a picture of 340 x 340; half of the 41 pixels left over is 20.5."""
    array = np.array(picture)[20:319, 20:319]
    return torch.from_numpy(array).permute(2, 0, 1).float()


@pytest.mark.parametrize(("metric", "preprocess"), [("fid_t", at_299), ("patch_fid_t", patch)])
def test_they_agree_with_torchmetrics_and_torch_fidelity(folders, tmp_path, metric, preprocess):
    images, reference, inception = folders
    ours = value(
        images, tmp_path / "r.json",
        "--metrics", metric, "--reference", reference, "--inception", inception,
    )  # fmt: skip
    pixels = [torch.stack([preprocess(p) for p in pictures(f)]) for f in (images, reference)]
    network = Features(inception)
    theirs = FrechetInceptionDistance(feature=network)
    features = []
    with torch.no_grad():
        for batch, real in zip(pixels, (False, True), strict=True):
            features.append(network(batch))
            theirs.update(batch, real=real)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-4)
    statistics = [fid_features_to_statistics(f.double()) for f in features]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)
    assert ours == pytest.approx(next(iter(fidelity.values())), rel=1e-4)


def test_a_folder_is_at_no_distance_from_itself(folders, tmp_path):
    images, _, inception = folders
    flags = ("--metrics", "fid_t", "patch_fid_t", "--reference", images, "--inception", inception)
    for entry in score(images, tmp_path / "r.json", *flags):
        assert abs(entry["value"]) < 1e-6


def test_the_order_of_images_does_not_matter(folders, tmp_path):
    images, reference, inception = folders
    turned = write_images(tmp_path / "turned", MANY[::-1])
    for number, file in enumerate(sorted(turned.glob("0*.png"))):
        draw(len(MANY) - 1 - number).save(file)
    flags = ("--metrics", "fid_t", "--reference", reference, "--inception", inception)
    first = value(images, tmp_path / "a.json", *flags)
    again = value(turned, tmp_path / "b.json", *flags, "--batch_size", 7)
    assert again == pytest.approx(first, rel=1e-6)


def test_a_shifted_gaussian_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T  # covariance 1
    scale, shift = torch.tensor([1, 2, 3, 0.5, 1, 1]).double(), torch.arange(6).double()
    distance = frechet_distance(
        FeatureStatistics.of(white), FeatureStatistics.of(white * scale + shift)
    )
    expected = 55 + sum((s - 1) ** 2 for s in scale.tolist())  # |m|^2 + sum of (s1 - s2)^2
    assert distance == pytest.approx(expected, rel=1e-9)


def test_published_weights_give_torch_fidelitys_own_features(tmp_path):
    network = RandomInception()
    file = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), file)
    pixels = torch.randint(0, 256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (theirs,) = network(pixels.to(torch.uint8))
        ours = open_inception(file, pixels.device)(pixels, [])
    assert ours.shape == (2, 2048) and theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs)


def test_too_few_images_are_said(folders, tmp_path, capsys):
    _, _, inception = folders
    few = write_images(tmp_path / "few", PROMPTS)
    teacher = write_images(tmp_path / "teacher", PROMPTS, start=30)
    (entry,) = score(
        few, tmp_path / "r.json",
        "--metrics", "fid_t", "--reference", teacher, "--inception", inception,
    )  # fmt: skip
    assert entry["num_images"] == 5 and entry["num_features"] == 12 and not entry["full_rank"]
    assert math.isfinite(entry["value"])
    assert "5 images of" in entry["notes"][0] and "in 12 features" in entry["notes"][0]
    assert entry["notes"][0] in capsys.readouterr().err


def test_enough_images_have_a_covariance_of_full_rank(folders, tmp_path):
    images, reference, inception = folders
    flags = ("--metrics", "fid_t", "--reference", reference, "--inception", inception)
    (entry,) = score(images, tmp_path / "r.json", *flags)
    assert entry["full_rank"] and entry["notes"] == [] and entry["num_reference"] == 16


def test_weights_of_another_model_are_named(folders, tmp_path, capsys):
    images, reference, _ = folders
    flags = ("--metrics", "fid_t", "--reference", reference, "--inception")
    other = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(3)}, other)
    said = error_of(capsys, images, tmp_path / "r.json", *flags, other)
    assert "other.pth" in said and "Conv2d_1a_3x3" in said and "conv.weight" in said
    torch.save(torch.nn.Linear(2, 2), other)  # a pickled module, which could run code
    assert "other.pth" in error_of(capsys, images, tmp_path / "r.json", *flags, other)
    other.write_bytes(b"PK\x03\x04 half a file")
    assert "other.pth" in error_of(capsys, images, tmp_path / "r.json", *flags, other)
    torch.jit.script(torch.nn.Sequential(torch.nn.ReLU())).save(str(other))
    said = error_of(capsys, images, tmp_path / "r.json", *flags, other)
    assert "TorchScript without `layers`" in said


def test_a_small_image_has_no_patch_and_is_named(folders, tmp_path, capsys):
    _, _, inception = folders
    images = write_images(tmp_path / "small", size=(256, 256))
    flags = ("--metrics", "patch_fid_t", "--reference", images, "--inception", inception)
    said = error_of(capsys, images, tmp_path / "r.json", *flags)
    assert "00000_a-red-fox.png: 256x256 is smaller than the 299x299 crop" in said


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
