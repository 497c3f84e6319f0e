"""Diversity by LPIPS v0.1 (Zhang et al. 2018): perceptual distances of one prompt's images."""

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from senseflow.distill.scorers import metric

if TYPE_CHECKING:
    from torch import Tensor, nn

Net = Literal["alex", "vgg"]
WEIGHTS = metric.Flag[Path](
    "--lpips_weights", "file", "torchvision's alexnet-owt-7be5be79.pth", required=True
)
NET = metric.Flag[Net](
    "--lpips_net", "text", "vgg: vgg16-397923af.pth (alex)", "alex", choices=("alex", "vgg")
)
RESIZE = metric.Flag[int]("--lpips_size", "pixels", "LANCZOS to this; 0: none (512)", 512)


def prepare(given: metric.Given) -> metric.Prepared:
    """Between every two images, on squares of one size."""
    net, file, side = given[NET], given[WEIGHTS], given[RESIZE] or None

    def open_it(machine: metric.Machine) -> metric.Judge:
        import torch

        from senseflow.common.pictures import to_tensor

        network = load_lpips(net, file).to(machine.device)

        def distances(pixels: "Tensor", prompts: list[str]) -> "Tensor":
            pixels = pixels.to(machine.device)
            pairs = [
                network(pixels[i : i + 1], pixels[j : j + 1])
                for i, j in combinations(range(len(pixels)), 2)
            ]
            return torch.cat(pairs).flatten()

        words = f"{metric.square_in_words(side)}, [-1, 1]"
        return metric.Judge(words, lambda p: to_tensor(metric.square(p, side)), distances)

    settings = {"net": net, "size": side}
    return metric.Prepared(f"LPIPS v0.1, {net} (torchmetrics)", [file], settings, open_it)


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
    state = metric.read_tensors(file)
    metric.fill(
        lambda: backbone.load_state_dict(state, strict=False, assign=True),
        backbone, file, f"torchvision's {make.__name__}",
    )  # fmt: skip
    network = _LPIPS(net=net, pnet_rand=True)
    for part in network.net.children():
        for index, layer in part.named_children():  # named by their place in `features`
            layer.load_state_dict(backbone.features[int(index)].state_dict())
    return network.eval()


SPEC = metric.Spec(
    metric.Column("diversity_lpips", "Diversity, LPIPS"),
    about="LPIPS v0.1 of two images",
    needs="seeds",
    prepare=prepare,
    flags=(WEIGHTS, NET, RESIZE),
    float32=True,
)
