"""Diversity by DINOv2: how far apart the CLS tokens of one prompt's images are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from senseflow.distill.scorers import metric

if TYPE_CHECKING:
    from torch import Tensor

DINOV2 = metric.Flag[str](
    "--dinov2", "text", "timm name, or local-dir:FOLDER (vit_large_patch14_dinov2.lvd142m)",
    "vit_large_patch14_dinov2.lvd142m",
)  # fmt: skip
WEIGHTS = metric.Flag[Path | None]("--dinov2_weights", "file", "of a timm name")
FILES = ("model.safetensors", "pytorch_model.bin")  # as timm looks for them
SIZE = metric.Flag[int]("--dinov2_size", "pixels", "bicubic to this (224)", 224)


def prepare(given: metric.Given) -> metric.Prepared:
    """The CLS token after the last norm, of a bicubic centre crop."""
    name, side = given[DINOV2], given[SIZE]
    if side < 1:
        raise ValueError(f"{SIZE.name} {side} must be at least 1")
    if name.startswith(metric.LOCAL) and not Path(name.removeprefix(metric.LOCAL)).is_dir():
        raise ValueError(f"--dinov2 {name}: there is no such folder")
    require_dinov2(name)
    file = find_dinov2(name, given[WEIGHTS])
    settings: dict[str, Any] = {"size": side}
    if name.startswith(metric.LOCAL):
        settings["config"] = metric.digest_of(file.parent, ["config.json"])
    return metric.Prepared(
        f"timm {name}", [file], settings, lambda machine: open_dinov2(name, file, side, machine)
    )


def open_dinov2(name: str, file: Path, side: int, machine: metric.Machine) -> metric.Judge:
    """Raises ValueError for another model's file, or a size that its patches do not metric.fill."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from senseflow.distill.scorers.open_clips import in_words
    from senseflow.distill.vfm_features import create_vit

    with metric.reading(file):
        vit = create_vit(name, None if name.startswith(metric.LOCAL) else file, None, machine.dtype)
    if any(side % patch for patch in vit.patch_embed.patch_size):
        raise ValueError(
            f"--dinov2_size {side} is not a multiple of the patch {vit.patch_embed.patch_size}"
        )
    vit = vit.to(machine.device).eval()
    told = cast(dict[str, Any], vit.pretrained_cfg)
    config = PreprocessCfg(size=side, mean=tuple(told["mean"]), std=tuple(told["std"]))

    def distances(pixels: "Tensor", prompts: list[str]) -> "Tensor":
        pixels = pixels.to(machine.device, machine.dtype)
        return metric.cosine_distances(vit.forward_features(pixels)[:, 0])

    return metric.Judge(in_words(config), image_transform_v2(config, is_train=False), distances)


def find_dinov2(name: str, weights: Path | None) -> Path:
    """The file of DINOv2's weights; raises ValueError where timm would fetch them."""
    import timm

    if name.startswith(metric.LOCAL):
        folder = Path(name.removeprefix(metric.LOCAL))
        if weights:
            raise ValueError(f"--dinov2 {name} has weights: leave out --dinov2_weights")
        found = metric.weights_in(folder, *FILES)
        if not found or not (folder / "config.json").is_file():
            raise ValueError(f"--dinov2 {name}: it has no config.json with {' or '.join(FILES)}")
        return found[0]
    if ":" in name or not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"--dinov2 {name} is neither a timm model nor local-dir:FOLDER; nothing is downloaded"
        )
    if weights is None:
        raise ValueError(
            f"--dinov2_weights is missing: a local file with the weights of {name} (nothing is "
            "downloaded)"
        )
    return weights


def require_dinov2(name: str) -> None:
    """Raise ValueError for a DINOv3, whose values do not compare with those of this column."""
    from senseflow.distill.vfm_features import architecture_of

    if "dinov3" in architecture_of(name):
        raise ValueError(
            f"--dinov2 {name} is a DINOv3: its distances do not compare with DINOv2's, which this "
            "column is of; name a DINOv2"
        )


SPEC = metric.Spec(
    metric.Column("diversity_dinov2", "Diversity, DINOv2"),
    about="1 - cosine of DINOv2's CLS tokens, after the last norm, of two images",
    needs="seeds",
    prepare=prepare,
    flags=(DINOV2, WEIGHTS, SIZE),
)
