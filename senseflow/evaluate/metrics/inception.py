"""Inception-v3 as TensorFlow published it in 2015, whose pool features FID is defined on."""

import argparse
import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from senseflow.evaluate.metrics.checkpoints import fill, read_tensors, reading
from senseflow.evaluate.metrics.metric import Extractor, Machine, Metric
from senseflow.evaluate.metrics.preprocess import fid_pixels, patch_pixels

KINDS = (
    "TensorFlow's Inception (weights-inception-2015-12-05-6726825d.pth, or the TorchScript "
    "inception-2015-12-05.pt)"
)
MODEL = "Inception-v3 (TensorFlow, 2015-12-05), pool features"


def fid_metric(args: argparse.Namespace) -> Metric[Extractor]:
    """FID-T: whole images, resized as DMD2 does."""
    side = args.fid_resize or None

    def open_it(machine: Machine) -> Extractor:
        resized = f", LANCZOS to {side}" if side else ""
        return Extractor(
            f"centre square{resized}, clean-fid's bicubic to 299",
            lambda picture: fid_pixels(picture, side),
            load_inception(args.inception).to(machine.device),
        )

    return Metric("fid_t", MODEL, [args.inception], {"resize": side}, open_it)


def patch_fid_metric(args: argparse.Namespace) -> Metric[Extractor]:
    """Patch FID-T: the centre crop of the full image."""

    def open_it(machine: Machine) -> Extractor:
        network = load_inception(args.inception).to(machine.device)
        return Extractor("centre crop of 299x299, no resize", patch_pixels, network)

    return Metric("patch_fid_t", MODEL, [args.inception], {}, open_it)


class Inception(nn.Module):
    """Pool features (B, D) float32, D = 2048, of pixels (B, 3, 299, 299) in [0, 255].

    The pixels have been resized by `preprocess`; nothing in here resizes them.
    """

    place: Tensor

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("place", torch.empty(0), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, 2048) float32 of pixels (B, 3, H, W) in [0, 255]."""
        pixels = pixels.to(self.place.device, torch.float32)
        features: Tensor = self.layers((pixels - 128) / 128)
        return features.flatten(1).float()


def load_inception(file: Path) -> Inception:
    """From torch-fidelity's weights or a TorchScript module with `layers`; told by the content.

    Raises ValueError naming the file for anything else.
    """
    if is_torchscript(file):
        with reading(file):
            module = torch.jit.load(str(file), map_location="cpu").eval()
        children = dict(module.named_children())
        if "layers" not in children:
            raise ValueError(f"{file} is TorchScript without `layers`: want {KINDS}")
        return Inception(children["layers"])
    state = read_tensors(file)
    network = _Unfilled("inception", ["2048"], _nothing())
    fill(lambda: nn.Module.load_state_dict(network, state, strict=False), network, file, KINDS)
    layers = list(network.children())[:-1]  # in their order; the last is the classifier
    assert isinstance(layers[-1], nn.AdaptiveAvgPool2d)
    return Inception(nn.Sequential(*layers).eval())


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
