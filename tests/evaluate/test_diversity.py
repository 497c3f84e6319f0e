"""Diversity over seeds against the libraries' own forward, and LPIPS written out."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchmetrics.functional.image as torchmetrics_image
from image_folders import pictures, write_images, write_seeds
from metric_parts import (
    TINY_DINOV2,
    copy_folder,
    error_of,
    save_alexnet,
    save_open_clip,
    score,
    value,
)
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TWO = ["a red fox", "a blue fox"]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Three seeds of two prompts."""
    return write_seeds(tmp_path_factory.mktemp("diversity") / "images", 3, TWO)


def by_prompt(folder: Path) -> list[list[Image.Image]]:
    sets = [pictures(folder / f"seed_{s}") for s in range(3)]
    return [list(group) for group in zip(*sets, strict=True)]


def mean_distance(folder: Path, distance) -> float:
    """Over the three pairs of a prompt, then over prompts."""
    each = [np.mean([distance(a, b) for a, b in combinations(g, 2)]) for g in by_prompt(folder)]
    return float(np.mean(each))


def test_dinov2_distances_of_the_class_token(seeds, tmp_path):
    flags = ("--metrics", "diversity_dinov2", "--dinov2", f"local-dir:{TINY_DINOV2}")
    (entry,) = score(seeds, tmp_path / "r.json", *flags, "--dinov2_size", 32)
    vit = timm.create_model(f"local-dir:{TINY_DINOV2}", pretrained=True).eval()

    @torch.no_grad()
    def distance(a, b):
        small = [p.resize((32, 32), Image.Resampling.BICUBIC) for p in (a, b)]
        tokens = [vit(normalize(to_tensor(p), *IMAGENET)[None]) for p in small]
        return 1 - F.cosine_similarity(*(t.double() for t in tokens)).item()

    assert entry["value"] == pytest.approx(mean_distance(seeds, distance), rel=1e-3)
    assert entry["num_images"] == 6 and entry["num_prompts"] == 2 and entry["num_seeds"] == 3


def test_another_config_in_the_folder_of_a_dinov2_is_another_measurement(seeds, tmp_path):
    folder = copy_folder(TINY_DINOV2, tmp_path / "dinov2")
    flags = ("--metrics", "diversity_dinov2", "--dinov2", f"local-dir:{folder}")
    flags = (*flags, "--dinov2_size", 32)
    (first,) = score(seeds, tmp_path / "r.json", *flags)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (folder / "config.json").write_text(json.dumps(config))
    _, second = score(seeds, tmp_path / "r.json", *flags)
    assert second["value"] != first["value"]


def test_dinov2_of_a_timm_name_and_a_file(seeds, tmp_path, capsys):
    vit = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, num_classes=0)
    file = tmp_path / "dinov2.pth"
    torch.save(vit.state_dict(), file)
    flags = ("--metrics", "diversity_dinov2", "--dinov2", "vit_small_patch14_dinov2.lvd142m")
    (entry,) = score(
        seeds, tmp_path / "r.json", *flags, "--dinov2_weights", file, "--dinov2_size", 28
    )
    assert entry["value"] > 0 and entry["weights"][0]["file"] == str(file)
    said = error_of(capsys, seeds, tmp_path / "r.json", *flags)
    assert "--dinov2_weights is missing" in said and "nothing is downloaded" in said
    said = error_of(
        capsys, seeds, tmp_path / "r.json", *flags, "--dinov2_weights", file, "--dinov2_size", 30
    )
    assert "--dinov2_size 30 is not a multiple of the patch" in said
    torch.save({"a": torch.zeros(1)}, file)
    said = error_of(capsys, seeds, tmp_path / "r.json", *flags, "--dinov2_weights", file)
    assert "dinov2.pth" in said


def test_a_dinov3_is_no_dinov2(seeds, tmp_path, capsys):
    folder = copy_folder(TINY_DINOV2, tmp_path / "dinov3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architecture": "vit_large_patch16_dinov3"})
    )
    for name in (f"local-dir:{folder}", "vit_large_patch16_dinov3.lvd1689m"):
        flags = ("--metrics", "diversity_dinov2", "--dinov2", name)
        said = error_of(capsys, seeds, tmp_path / "r.json", *flags)
        assert f"--dinov2 {name} is a DINOv3" in said and "name a DINOv2" in said


def test_clip_distances(seeds, tmp_path):
    name, weights = save_open_clip(tmp_path / "tiny")
    flags = ("--metrics", "diversity_clip", "--clip_model", name, "--clip_weights", weights)
    ours = value(seeds, tmp_path / "r.json", *flags)
    model = open_clip.create_model(name, load_weights=False).eval()
    model.load_state_dict(torch.load(weights))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

    @torch.no_grad()
    def distance(a, b):
        small = [
            p.resize((256, 256), Image.Resampling.LANCZOS).resize(
                (32, 32), Image.Resampling.BICUBIC
            )
            for p in (a, b)
        ]
        units = [model.encode_image(normalize(to_tensor(p), mean, std)[None]) for p in small]
        return 1 - F.cosine_similarity(*(u.double() for u in units)).item()

    assert ours == pytest.approx(mean_distance(seeds, distance), rel=1e-3)


def test_lpips_written_out(seeds, tmp_path):
    """Zhang et al. 2018: unit features of five layers, squared differences weighed and averaged."""
    backbone = save_alexnet(tmp_path / "alexnet.pth").features.eval()
    flags = ("--metrics", "diversity_lpips", "--lpips_weights", tmp_path / "alexnet.pth")
    ours = value(seeds, tmp_path / "r.json", *flags, "--lpips_size", 64)
    file = Path(torchmetrics_image.__file__).parent / "lpips_models/alex.pth"
    linear = torch.load(file, map_location="cpu")
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)

    def features(picture):
        small = picture.resize((64, 64), Image.Resampling.LANCZOS)
        x = ((to_tensor(small) * 2 - 1 - shift) / scale)[None]
        kept = []
        for number, layer in enumerate(backbone):
            x = layer(x)
            if number in (1, 4, 7, 9, 11):  # the five ReLUs
                kept.append(F.normalize(x, dim=1).clone())
        return kept

    @torch.no_grad()
    def distance(a, b):
        pairs = zip(features(a), features(b), strict=True)
        weights = [linear[f"lin{i}.model.1.weight"] for i in range(5)]
        return sum(
            ((one - other).square() * weight).sum(1).mean().item()
            for (one, other), weight in zip(pairs, weights, strict=True)
        )

    expected = mean_distance(seeds, distance)
    assert expected > 0.01 and ours == pytest.approx(expected, rel=1e-3)


def test_weights_of_another_network_are_named(seeds, tmp_path, capsys):
    save_alexnet(tmp_path / "alexnet.pth")
    flags = ("--metrics", "diversity_lpips", "--lpips_net", "vgg", "--lpips_weights")
    said = error_of(capsys, seeds, tmp_path / "r.json", *flags, tmp_path / "alexnet.pth")
    assert "alexnet.pth holds weights of another model than torchvision's vgg16" in said


def test_one_seed_has_no_diversity(tmp_path, capsys):
    images = write_images(tmp_path / "images", TWO)
    flags = ("--metrics", "diversity_dinov2", "--dinov2", f"local-dir:{TINY_DINOV2}")
    assert "one image per prompt" in error_of(capsys, images, tmp_path / "r.json", *flags)
