"""LAION's aesthetic predictor on random files of the published layouts, by numpy."""

import numpy as np
import open_clip
import pytest
import torch
from image_folders import pictures, write_images
from metric_parts import error_of, save_aesthetic_head, save_open_clip, score
from open_clip.transform import image_transform_v2

METRIC = ("--metrics", "aesthetic")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The flags that name a small CLIP, and the file of a head."""
    folder = tmp_path_factory.mktemp("aesthetic")
    name, weights = save_open_clip(folder / "clip")
    head = save_aesthetic_head(folder / "head.pth")
    return ("--aesthetic_model", name, "--aesthetic_clip", weights), head


def test_a_head_of_linear_layers_on_unit_embeddings(files, tmp_path):
    (_, name, _, weights), head = files
    images = write_images(tmp_path / "images", size=(48, 40))
    (entry,) = score(images, tmp_path / "r.json", *METRIC, *files[0], "--aesthetic", head)
    clip = open_clip.create_model(name, load_weights=False)
    clip.load_state_dict(torch.load(weights))
    prepare = image_transform_v2(
        open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False
    )
    squares = []
    for picture in pictures(images):
        side, (width, height) = min(picture.size), picture.size
        left, top = (width - side) // 2, (height - side) // 2
        squares.append(prepare(picture.crop((left, top, left + side, top + side))))
    with torch.no_grad():
        seen = clip.encode_image(torch.stack(squares)).double().numpy()
    values = seen / np.linalg.norm(seen, axis=1, keepdims=True)
    state = {key: value.double().numpy() for key, value in torch.load(head).items()}
    for place in (0, 2, 4, 6, 7):
        values = values @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    assert values.std() > 0
    assert entry["value"] == pytest.approx(values.mean(), abs=1e-5)
    assert entry["metric"] == "aesthetic" and "clip" in entry["model"]


def test_a_head_of_another_clip_is_named(files, tmp_path, capsys):
    images = write_images(tmp_path / "images", size=(48, 40))
    flags, right = files
    other = save_aesthetic_head(tmp_path / "other.pth", width=24)
    said = error_of(capsys, images, tmp_path / "r", *METRIC, *flags, "--aesthetic", other)
    assert f"{other} holds weights of another model than LAION's aesthetic predictor" in said
    torch.save({**torch.load(right), "layers.1.weight": torch.zeros(1)}, tmp_path / "more.pth")
    more = tmp_path / "more.pth"
    said = error_of(capsys, images, tmp_path / "r", *METRIC, *flags, "--aesthetic", more)
    assert "layers.1.weight" in said and "another model" in said
    said = error_of(capsys, images, tmp_path / "r", *METRIC, *flags)
    assert "--aesthetic" in said and "sac+logos+ava1-l14-linearMSE.pth" in said
