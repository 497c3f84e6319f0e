"""Diversity by LPIPS v0.1 (Zhang et al. 2018): perceptual distances of one prompt's images."""

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from senseflow.evaluate.metrics.metric import (
    Column,
    Comparer,
    Flag,
    Given,
    Machine,
    Prepared,
    Spec,
    file_flag,
    fill,
    read_tensors,
    resize_flag,
    square,
    square_in_words,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

Net = Literal["alex", "vgg"]
WEIGHTS = file_flag("--lpips_weights", "torchvision's alexnet-owt-7be5be79.pth")
NET = Flag("--lpips_net", "alex", "vgg: of vgg16-397923af.pth (alex)", str, None, ("alex", "vgg"))
RESIZE = resize_flag("--lpips_size", 512)


def prepare(given: Given) -> Prepared:
    """Between every two images, on squares of one size."""
    net = cast(Net, given[NET])
    file, side = given.required(WEIGHTS), given[RESIZE] or None

    def open_it(machine: Machine) -> Comparer:
        import torch

        network = load_lpips(net, file).to(machine.device)

        def distances(pixels: "Tensor") -> "Tensor":
            pixels = pixels.to(machine.device)
            pairs = [
                network(pixels[i : i + 1], pixels[j : j + 1])
                for i, j in combinations(range(len(pixels)), 2)
            ]
            return torch.cat(pairs).flatten()

        words = f"{square_in_words(side)}, [-1, 1]"
        return Comparer(words, lambda picture: lpips_pixels(picture, side), distances)

    settings = {"net": net, "size": side}
    return Prepared(f"LPIPS v0.1, {net} (torchmetrics)", [file], settings, open_it)


def lpips_pixels(picture: "Image.Image", side: int | None) -> "Tensor":
    """(3, side, side) in [-1, 1]."""
    import numpy as np
    import torch

    array = torch.from_numpy(np.array(square(picture, side)))
    return array.permute(2, 0, 1).float() / 127.5 - 1


def load_lpips(net: Net, file: Path) -> "nn.Module":
    """torchmetrics' LPIPS, its linear layers from the package, the network under it from `file`.

    Raises ValueError when the file does not hold torchvision's weights of that network.
    """
    import torch
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet, vgg16

    make = {"alex": alexnet, "vgg": vgg16}[net]
    with torch.device("meta"):
        backbone = make(weights=None)
    state = read_tensors(file)
    fill(
        lambda: backbone.load_state_dict(state, strict=False, assign=True),
        backbone, file, f"torchvision's {make.__name__}",
    )  # fmt: skip
    network = _LPIPS(net=net, pnet_rand=True)
    for part in network.net.children():
        for index, layer in part.named_children():  # named by their place in `features`
            layer.load_state_dict(backbone.features[int(index)].state_dict())
    return network.eval()


SPEC = Spec(
    Column("diversity_lpips", "Diversity, LPIPS"),
    about="LPIPS v0.1 of two images",
    needs="seeds",
    prepare=prepare,
    flags=(WEIGHTS, NET, RESIZE),
    required=(WEIGHTS,),
    float32=True,
)
