"""How far apart the images of one prompt are over several seeds: LPIPS, or cosine of embeddings."""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from senseflow.distill.vfm_heads import create_vit
from senseflow.evaluate.metrics.checkpoints import digest_of, fill, read_tensors, reading
from senseflow.evaluate.metrics.clip_scores import LOCAL, Clip, describe, find_source
from senseflow.evaluate.metrics.metric import Comparer, Machine, Metric
from senseflow.evaluate.metrics.preprocess import square

Net = Literal["alex", "vgg"]
LPIPS_NETS: dict[Net, Any] = {
    "alex": torchvision.models.alexnet,
    "vgg": torchvision.models.vgg16,
}


def cosine_distances(embeddings: Tensor) -> Tensor:
    """1 - cos of every two of (S, D), in the order of itertools.combinations."""
    units = F.normalize(embeddings.double(), dim=-1)
    first, second = zip(*combinations(range(len(units)), 2), strict=True)
    return 1 - (units[list(first)] * units[list(second)]).sum(-1)


def clip_diversity(args: argparse.Namespace) -> Metric[Comparer]:
    """Cosine distances of CLIP's image embeddings, preprocessed as for the CLIP score."""
    source = find_source(args.clip_model, args.clip_weights, args.clip_quick_gelu, "--clip")
    side = args.clip_resize or None

    def open_it(machine: Machine) -> Comparer:
        clip = Clip(source, machine)
        transform = image_transform_v2(clip.config, is_train=False)
        return Comparer(
            f"centre square{f', LANCZOS to {side}' if side else ''}, {describe(clip.config)}",
            lambda picture: transform(square(picture, side)),
            lambda pixels: cosine_distances(clip.images(pixels)),
        )

    settings = {"resize": side, **source.settings}
    return Metric("diversity_clip", source.model, [source.weights], settings, open_it)


def dinov2_diversity(args: argparse.Namespace) -> Metric[Comparer]:
    """Cosine distances of DINOv2's CLS token after the last norm."""
    name, weights, side = args.dinov2, args.dinov2_weights, args.dinov2_size
    file = find_dinov2(name, weights)

    def open_it(machine: Machine) -> Comparer:
        with reading(file):
            vit = create_vit(name, None if name.startswith(LOCAL) else file, None, machine.dtype)
        if any(side % patch for patch in vit.patch_embed.patch_size):
            raise ValueError(
                f"--dinov2_size {side} is not a multiple of the patch {vit.patch_embed.patch_size}"
            )
        vit = vit.to(machine.device).eval()
        told = cast(dict[str, Any], vit.pretrained_cfg)
        config = PreprocessCfg(size=side, mean=tuple(told["mean"]), std=tuple(told["std"]))
        transform = image_transform_v2(config, is_train=False)

        def distances(pixels: Tensor) -> Tensor:
            pixels = pixels.to(machine.device, machine.dtype)
            return cosine_distances(vit.forward_features(pixels)[:, 0])

        return Comparer(describe(config), transform, distances)

    settings: dict[str, Any] = {"size": side}
    if name.startswith(LOCAL):
        settings["config"] = digest_of(file.parent, ["config.json"])
    return Metric("diversity_dinov2", f"timm {name}", [file], settings, open_it)


def find_dinov2(name: str, weights: Path | None) -> Path:
    """The file of DINOv2's weights; raises ValueError where timm would fetch them."""
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if weights:
            raise ValueError(f"--dinov2 {name} has weights: leave out --dinov2_weights")
        for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
            if file.is_file() and (folder / "config.json").is_file():
                return file
        raise ValueError(f"{folder} has no config.json with model.safetensors or pytorch_model.bin")
    if ":" in name or not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"--dinov2 {name} is neither a timm model nor {LOCAL}FOLDER; nothing is downloaded"
        )
    if weights is None:
        raise ValueError(
            f"--dinov2_weights is missing: a local file with the weights of {name} (nothing is "
            "downloaded)"
        )
    return weights


def lpips_diversity(args: argparse.Namespace) -> Metric[Comparer]:
    """LPIPS v0.1 between every two images, on squares of one size."""
    net, file, side = args.lpips_net, args.lpips_weights, args.lpips_size or None
    if file is None:
        raise ValueError(
            "--lpips_weights is missing: torchvision's file of "
            + (
                "alexnet (alexnet-owt-7be5be79.pth)"
                if net == "alex"
                else "vgg16 (vgg16-397923af.pth)"
            )
        )

    def open_it(machine: Machine) -> Comparer:
        network = load_lpips(net, file).to(machine.device)  # small: always float32

        def distances(pixels: Tensor) -> Tensor:
            pixels = pixels.to(machine.device)
            pairs = [
                network(pixels[i : i + 1], pixels[j : j + 1])
                for i, j in combinations(range(len(pixels)), 2)
            ]
            return torch.cat(pairs).flatten()

        words = f"centre square{f', LANCZOS to {side}' if side else ''}, [-1, 1]"
        return Comparer(words, lambda picture: lpips_pixels(picture, side), distances)

    settings = {"net": net, "size": side}
    return Metric("diversity_lpips", f"LPIPS v0.1, {net} (torchmetrics)", [file], settings, open_it)


def lpips_pixels(picture: Image.Image, side: int | None) -> Tensor:
    """(3, side, side) in [-1, 1]."""
    array = torch.from_numpy(np.array(square(picture, side)))
    return array.permute(2, 0, 1).float() / 127.5 - 1


def load_lpips(net: Net, file: Path) -> nn.Module:
    """torchmetrics' LPIPS, its linear layers from the package, the network under it from `file`.

    Raises ValueError when the file does not hold torchvision's weights of that network.
    """
    with torch.device("meta"):
        backbone = LPIPS_NETS[net](weights=None)
    state = read_tensors(file)
    fill(
        lambda: backbone.load_state_dict(state, strict=False, assign=True),
        backbone, file, f"torchvision's {LPIPS_NETS[net].__name__}",
    )  # fmt: skip
    network = _LPIPS(net=net, pnet_rand=True)
    for part in network.net.children():
        for index, layer in part.named_children():  # named by their place in `features`
            layer.load_state_dict(backbone.features[int(index)].state_dict())
    return network.eval()
