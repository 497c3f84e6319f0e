"""Inception-v3 as TensorFlow published it in 2015, whose pool features FID is defined on."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from senseflow.distill.scorers.metric import centre_crop, fill, read_tensors, reading, square

INCEPTION_SIDE = 299
KINDS = (
    "TensorFlow's Inception (weights-inception-2015-12-05-6726825d.pth, or the TorchScript "
    "inception-2015-12-05.pt)"
)


def open_inception(file: Path, device: torch.device) -> Callable[[Tensor, list[str]], Tensor]:
    """Pool features (B, 2048) float32 of pixels (B, 3, 299, 299) in [0, 255]; of prompts, nothing.

    The pixels are what `fid_pixels` and `patch_pixels` make: nothing in here resizes them. Raises
    ValueError as `load_layers` does.
    """
    layers = load_layers(file).to(device)

    def features(pixels: Tensor, prompts: list[str]) -> Tensor:
        scaled = (pixels.to(device, torch.float32) - 128) / 128  # its own scaling, not / 127.5 - 1
        found: Tensor = layers(scaled)
        return found.flatten(1).float()

    return features


def load_layers(file: Path) -> nn.Module:
    """The network in torch-fidelity's weights or in TorchScript with `layers`, told by the content.

    Raises ValueError naming the file for anything else.
    """
    if is_torchscript(file):
        with reading(file):
            module = torch.jit.load(str(file), map_location="cpu").eval()
        children = dict(module.named_children())
        if "layers" not in children:
            raise ValueError(f"{file} is TorchScript without `layers`: want {KINDS}")
        found: nn.Module = children["layers"]
        return found
    state = read_tensors(file)
    network = _Unfilled("inception", ["2048"], _nothing())
    fill(lambda: nn.Module.load_state_dict(network, state, strict=False), network, file, KINDS)
    layers = list(network.children())[:-1]  # in their order; the last is the classifier
    assert isinstance(layers[-1], nn.AdaptiveAvgPool2d)
    return nn.Sequential(*layers).eval()


def is_torchscript(file: Path) -> bool:
    """Whether a file is an archive with code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _nothing() -> io.BytesIO:
    stream = io.BytesIO()
    torch.save({}, stream)
    stream.seek(0)
    return stream


class _Unfilled(FeatureExtractorInceptionV3):
    """torch-fidelity's network without weights.

    It can only be built with some, and reads them as a pickle that may run code: it gets none.
    """

    def load_state_dict(self, *_: object) -> None:
        """Leave it as it is."""


def fid_pixels(picture: Image.Image, side: int | None) -> Tensor:
    """What FID-T's Inception sees, (3, 299, 299) float32 in [0, 255].

    DMD2's: the square at the centre, LANCZOS to `side`, then `clean_bicubic` to 299.
    """
    return clean_bicubic(square(picture, side), INCEPTION_SIDE)


def clean_bicubic(picture: Image.Image, side: int) -> Tensor:
    """Antialiased bicubic in float32, (3, side, side) in [0, 255] (Parmar et al. 2022)."""
    size = (side, side)
    channels = [  # each in mode F: of a picture in RGB, PIL would round to 8 bits
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
    array = np.array(centre_crop(picture, INCEPTION_SIDE))
    return torch.from_numpy(array).permute(2, 0, 1).float()
