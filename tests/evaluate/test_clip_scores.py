"""CLIP score, HPSv2 and PickScore against the libraries' own forward on the same files."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from image_folders import PROMPTS, pictures, write_images, write_seeds
from metric_parts import (
    OPEN_CLIP,
    TINY_CLIP,
    copy_folder,
    error_of,
    save_clip_model,
    save_open_clip,
    score,
    value,
)
from PIL import Image
from safetensors.torch import save_file
from text_parts import clip_tokenizer
from torchvision.transforms.functional import to_tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from senseflow.distill.scorers.metric import reads_of
from senseflow.distill.scorers.open_clips import find_source

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's

GRID = "visual.positional_embedding"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five pictures wider than high."""
    return write_images(tmp_path_factory.mktemp("clip") / "images", size=(96, 64))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """local-dir name and weights file of a tiny open_clip model."""
    return save_open_clip(tmp_path_factory.mktemp("clip") / "tiny")


def model_of(clip) -> open_clip.CLIP:
    """Built from the config and loaded with torch alone."""
    model = open_clip.CLIP(**OPEN_CLIP).eval()
    model.load_state_dict(torch.load(clip[1]))
    return model


def normalised(picture) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (to_tensor(picture) - mean) / std


@torch.no_grad()
def mean_cosine(model, pixels, texts) -> float:
    tokens = open_clip.tokenize(texts)
    return F.cosine_similarity(model.encode_image(pixels), model.encode_text(tokens)).mean().item()


def as_dmd2(picture, side=256):
    left = (picture.width - picture.height) // 2
    cropped = picture.crop((left, 0, left + picture.height, picture.height))
    if side:
        cropped = cropped.resize((side, side), Image.Resampling.LANCZOS)
    return normalised(cropped.resize((32, 32), Image.Resampling.BICUBIC))


def test_clip_is_the_cosine_of_dmd2s_crop_and_prefix(images, clip, tmp_path):
    flags = ("--metrics", "clip", "--clip_model", clip[0], "--clip_weights", clip[1])
    (entry,) = score(images, tmp_path / "r.json", *flags)
    pixels = torch.stack([as_dmd2(p) for p in pictures(images)])
    expected = mean_cosine(model_of(clip), pixels, [f"A photo depicts {p}" for p in PROMPTS])
    assert entry["value"] == pytest.approx(expected, abs=1e-5)
    assert entry["weights"][0]["file"] == str(clip[1])
    assert "LANCZOS to 256" in entry["preprocessing"]
    assert entry["settings"]["prefix"] == "A photo depicts "


def test_prompts_that_are_not_read_to_their_ends_are_counted_and_said_once(
    images, clip, tmp_path, capsys
):
    """OpenAI's tokenizer: "dog" is one token, the prefix three, begin and end two; of 77."""
    prompts = ["dog " * 72, "dog " * 73, "dog " * 99, *PROMPTS][: len(PROMPTS)]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    flags = ("--metrics", "clip", "--clip_model", clip[0], "--clip_weights", clip[1])
    more = ("--batch_size", 1, "--prompts_file", tmp_path / "p.txt")
    (entry,) = score(images, tmp_path / "r.json", *flags, *more)
    said = f"2 of {len(PROMPTS)} prompts are longer than the 77 tokens that this model reads"
    assert entry["notes"] == [f"{said}: it does not judge their ends"]
    assert capsys.readouterr().err.count("it does not judge their ends") == 1
    reads = reads_of(clip_tokenizer(), 5)  # a token for every letter
    assert reads.is_cut(["abc", "abcd"]) == [False, True] and reads.notes(["abc"]) == []


def test_prefix_and_resize_are_settings(images, clip, tmp_path):
    flags = ("--metrics", "clip", "--clip_model", clip[0], "--clip_weights", clip[1])
    more = ("--clip_prefix", "", "--clip_resize", 0, "--batch_size", 2)
    ours = value(images, tmp_path / "r.json", *flags, *more)
    pixels = torch.stack([as_dmd2(p, None) for p in pictures(images)])
    assert ours == pytest.approx(mean_cosine(model_of(clip), pixels, PROMPTS), abs=1e-5)
    assert ours != pytest.approx(value(images, tmp_path / "d.json", *flags), abs=1e-3)


def test_a_folder_of_open_clip_with_its_own_weights_and_tokenizer(images, tmp_path):
    flags = ("--metrics", "clip", "--clip_model", f"local-dir:{TINY_CLIP}")
    (entry,) = score(images, tmp_path / "r.json", *flags)
    assert entry["weights"][0]["file"].endswith("open_clip_model.safetensors")
    assert abs(entry["value"]) <= 1


def test_safetensors_give_the_same_as_a_bin(images, clip, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in torch.load(clip[1]).items()}, file)
    flags = ("--metrics", "clip", "--clip_model", clip[0], "--clip_weights")
    first = value(images, tmp_path / "a.json", *flags, clip[1])
    assert value(images, tmp_path / "b.json", *flags, file) == first


@pytest.mark.parametrize("name", ["hps_v2", "hps_v2.1"])
def test_hps_sees_the_whole_image_padded_and_no_prefix(images, clip, tmp_path, name):
    file = tmp_path / "HPS_compressed.pt"
    torch.save({"epoch": 3, "state_dict": torch.load(clip[1])}, file)
    flags = ("--metrics", name, f"--{name}", file, "--hps_model", clip[0])
    (entry,) = score(images, tmp_path / "r.json", *flags)

    def padded(picture):  # 96 x 64: the longer side to 32, the shorter to 21, black above and below
        paper = Image.new("RGB", (32, 32))
        paper.paste(picture.resize((32, 21), Image.Resampling.BICUBIC), (0, 5))
        return normalised(paper)

    pixels = torch.stack([padded(p) for p in pictures(images)])
    assert entry["metric"] == name
    assert entry["value"] == pytest.approx(mean_cosine(model_of(clip), pixels, PROMPTS), abs=1e-5)


def test_pick_score_is_the_scaled_cosine_of_transformers(images, tmp_path, capsys):
    folder = save_clip_model(tmp_path / "PickScore_v1")
    transformers.utils.logging.enable_progress_bar()
    ours = value(images, tmp_path / "r.json", "--metrics", "pick_score", "--pick_score", folder)
    assert "Loading weights" not in capsys.readouterr().err  # nor any other bar of a library
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")

    def pixels_of(picture):
        small = picture.resize((48, 32), Image.Resampling.BICUBIC)
        return normalised(small.crop((8, 0, 40, 32)))

    pixels = torch.stack([pixels_of(p) for p in pictures(images)])
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image
    assert ours == pytest.approx(logits.diagonal().mean().item(), rel=1e-4)
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)


def test_pick_score_has_its_whole_scale_in_bfloat16(images, tmp_path):
    """exp of 4.594, which bfloat16 has for ln 100, would be 98.9."""
    folder = save_clip_model(tmp_path / "PickScore_v1")
    flags = ("--metrics", "pick_score", "--pick_score", folder)
    (entry,) = score(images, tmp_path / "r.json", *flags, "--dtype", "bfloat16")
    model = CLIPModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor, tokenizer = (c.from_pretrained(folder) for c in (CLIPImageProcessor, AutoTokenizer))
    with torch.no_grad():
        pixels = processor(images=list(pictures(images)), return_tensors="pt")["pixel_values"]
        image = model.get_image_features(pixel_values=pixels.bfloat16()).pooler_output
        text = model.get_text_features(**tokenizer(PROMPTS, padding=True, return_tensors="pt"))
    cosines = torch.cosine_similarity(image.float(), text.pooler_output.float())
    # 1e-3 apart by how pictures are resized and batched, in few bits
    assert entry["value"] == pytest.approx(100 * cosines.mean().item(), rel=4e-3)


def test_standard_error_is_over_prompts_not_seeds(clip, tmp_path):
    images = write_seeds(tmp_path / "images", 2)
    files = (sorted(images.glob(f"seed_{i}/0*.png")) for i in (0, 1))
    for first, second in zip(*files, strict=True):
        second.write_bytes(first.read_bytes())  # a second seed that tells nothing new
    flags = ("--metrics", "clip", "--clip_model", clip[0], "--clip_weights", clip[1])
    (both,) = score(images, tmp_path / "a.json", *flags)
    (one,) = score(images / "seed_0", tmp_path / "b.json", *flags)
    assert both["num_images"] == 10 and both["num_prompts"] == 5
    assert both["value"] == pytest.approx(one["value"])
    assert both["standard_error"] == pytest.approx(one["standard_error"])


def test_bfloat16_is_near_and_said(images, clip, tmp_path):
    flags = ("--metrics", "clip", "--clip_model", clip[0], "--clip_weights", clip[1])
    exact = value(images, tmp_path / "a.json", *flags)
    (entry,) = score(images, tmp_path / "b.json", *flags, "--dtype", "bfloat16")
    assert entry["settings"]["dtype"] == "bfloat16"
    assert entry["value"] != exact and entry["value"] == pytest.approx(exact, abs=0.02)


def test_wrong_weights_are_named_with_a_key(images, clip, tmp_path, capsys):
    output = tmp_path / "r.json"
    flags = ("--metrics", "clip", "--clip_model", clip[0], "--clip_weights")
    state = torch.load(clip[1])
    for change, word in (
        (lambda s: s.pop("ln_final.weight"), "ln_final.weight"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra"),
        (lambda s: s.update({GRID: torch.zeros(26, 32)}), GRID),  # which open_clip would resize
        (lambda s: s.update(text_projection=torch.zeros(3, 3)), "text_projection"),
    ):
        other = dict(state)
        change(other)
        torch.save(other, tmp_path / "other.bin")
        said = error_of(capsys, images, output, *flags, tmp_path / "other.bin")
        assert "other.bin holds weights of another model" in said and word in said
    data = clip[1].read_bytes()
    (tmp_path / "half.bin").write_bytes(data[: len(data) // 2])
    assert "half.bin" in error_of(capsys, images, output, *flags, tmp_path / "half.bin")
    folder = save_clip_model(tmp_path / "pick")
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    said = error_of(capsys, images, output, "--metrics", "pick_score", "--pick_score", folder)
    assert "another model than CLIPModel" in said
    assert not output.exists()


def test_nothing_is_fetched(images, tmp_path, capsys):
    output = tmp_path / "r.json"
    said = error_of(capsys, images, output, "--metrics", "clip")
    assert "--clip_weights is missing" in said and "ViT-g-14" in said
    said = error_of(capsys, images, output, "--metrics", "clip", "--clip_model", "hf-hub:a/b")
    assert "hf-hub:a/b" in said and "nothing is downloaded" in said
    weights = tmp_path / "w.bin"
    torch.save({}, weights)
    flags = ("--metrics", "clip", "--clip_model", "ViT-L-14", "--clip_weights", weights)
    assert "--clip_quick_gelu" in error_of(capsys, images, output, *flags)


def test_the_activation_is_said_where_a_name_has_two(tmp_path):
    file = tmp_path / "weights.pt"
    assert not find_source("ViT-g-14", file, None, "--clip").quick_gelu
    assert find_source("ViT-L-14", file, True, "--clip").model == "open_clip ViT-L-14, quick GELU"
    assert not find_source("ViT-L-14", file, False, "--clip").quick_gelu


def test_a_config_that_is_none_is_named(images, tmp_path, capsys):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"a": 1}))
    flags = ("--metrics", "clip", "--clip_model", f"local-dir:{tmp_path}")
    said = error_of(capsys, images, tmp_path / "r.json", *flags)
    assert "open_clip_config.json is not a config" in said


def test_another_processor_is_another_measurement(images, tmp_path):
    """The same weights: what stands beside them changes the value too."""
    folder = save_clip_model(tmp_path / "pick")
    other = copy_folder(folder, tmp_path / "other")
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.0, 0.1, 0.2]}))
    flags = ("--metrics", "pick_score", "--pick_score", folder)
    (first,) = score(images, tmp_path / "r.json", *flags)
    _, second = score(images, tmp_path / "r.json", *flags, "--pick_processor", other)
    assert second["value"] != first["value"]
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["layer_norm_eps"] = 0.5
    file.write_text(json.dumps(config))
    *_, third = score(images, tmp_path / "r.json", *flags)
    assert third["value"] not in (first["value"], second["value"])


@pytest.mark.parametrize("metric", ["clip", "hps_v2.1", "diversity_clip"])
def test_another_config_in_the_folder_of_a_clip_is_another_measurement(metric, tmp_path):
    images = write_seeds(tmp_path / "images", 2)
    name, weights = save_open_clip(tmp_path / "tiny")
    flags = {
        "hps_v2.1": ("--hps_model", name, "--hps_v2.1", weights),
    }.get(metric, ("--clip_model", name, "--clip_weights", weights))
    (first,) = score(images, tmp_path / "r.json", "--metrics", metric, *flags)
    config = {
        "model_cfg": {**OPEN_CLIP, "quick_gelu": False},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "tiny" / "open_clip_config.json").write_text(json.dumps(config))
    _, second = score(images, tmp_path / "r.json", "--metrics", metric, *flags)
    assert second["settings"] != first["settings"]
    assert second["value"] != first["value"] or metric == "hps_v2.1"  # its own preprocessing
