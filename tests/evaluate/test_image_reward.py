"""ImageReward on a random file of the published layout, against transformers' own BLIP."""

import json

import pytest
import torch
from image_folders import PROMPTS, pictures, write_images
from metric_parts import copy_folder, error_of, score
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TEXT = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=40, layer_norm_eps=1e-12, hidden_act="gelu",
)  # fmt: skip
VISION = dict(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
    image_size=32, patch_size=8, layer_norm_eps=1e-6, hidden_act="gelu",
)  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "red", "blue", "green"]
VISION_NAMES = {  # transformers' names and BLIP's own
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "encoder.layers.": "blocks.",
    "self_attn.qkv.": "attn.qkv.",
    "self_attn.projection.": "attn.proj.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "post_layernorm.": "norm.",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The published files' folder and the tokenizer's, with the networks they were saved from."""
    torch.manual_seed(0)
    vision = BlipVisionModel(BlipVisionConfig(**VISION)).eval()
    config = BlipTextConfig(**TEXT, encoder_hidden_size=64, is_decoder=True, pad_token_id=0)
    text = BlipTextModel(config, add_pooling_layer=False).eval()
    sizes = [(32, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
    drop = nn.Dropout(0.2)
    linear = [nn.Linear(*size) for size in sizes]
    mlp = nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4])
    for network in (vision, text):
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("reward")
    torch.save(published_state(vision, text, mlp), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**TEXT, "encoder_width": 768}))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder / "bert")
    return folder, vision, text, mlp.eval(), tokenizer


def published_state(vision, text, mlp):
    """Under the names of ImageReward.pt, with what it has besides."""
    state = {}
    for key, tensor in vision.state_dict().items():
        for theirs, own in VISION_NAMES.items():
            key = key.replace(theirs, own)
        state["blip.visual_encoder." + key] = tensor
    state |= {"blip.text_encoder." + k: v for k, v in text.state_dict().items()}
    state |= {"mlp.layers." + k: v for k, v in mlp.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["blip.vision_proj.weight"] = torch.zeros(4, 64)
    return state


def test_it_equals_blip_and_the_mlp_of_transformers(parts, tmp_path):
    folder, vision, text, mlp, tokenizer = parts
    images = write_images(tmp_path / "images", size=(96, 64))
    flags = ("--image_reward", folder, "--image_reward_tokenizer", folder / "bert")
    (entry,) = score(images, tmp_path / "r.json", "--metrics", "image_reward", *flags)

    def pixels_of(picture):
        small = picture.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
        return normalize(to_tensor(small), CLIP_MEAN, CLIP_STD)

    pixels = torch.stack([pixels_of(p) for p in pictures(images)])
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = vision(pixel_values=pixels).last_hidden_state
        read = text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen, encoder_attention_mask=torch.ones(seen.shape[:2]),
        )  # fmt: skip
        raw = mlp(read.last_hidden_state[:, 0])[:, 0]
    expected = ((raw - 0.16717362830052426) / 1.0333394966054072).mean().item()
    assert raw.std() > 1e-3 and entry["value"] == pytest.approx(expected, rel=1e-4)


def test_another_tokenizer_or_config_is_another_measurement(parts, tmp_path):
    images = write_images(tmp_path / "images", size=(96, 64))
    folder = copy_folder(parts[0], tmp_path / "reward")
    flags = ("--image_reward", folder, "--image_reward_tokenizer", folder / "bert")
    flags = ("--metrics", "image_reward", *flags)
    (first,) = score(images, tmp_path / "r.json", *flags)
    swapped = BertTokenizer(vocab={word: i for i, word in enumerate([*WORDS[:5], *WORDS[:4:-1]])})
    swapped.save_pretrained(folder / "bert")
    _, second = score(images, tmp_path / "r.json", *flags)
    assert second["value"] != first["value"]
    config = {**TEXT, "layer_norm_eps": 0.1}
    (folder / "med_config.json").write_text(json.dumps(config))
    *_, third = score(images, tmp_path / "r.json", *flags)
    assert third["value"] not in (first["value"], second["value"])


def test_missing_and_wrong_files_are_named(parts, tmp_path, capsys):
    folder = parts[0]
    images = write_images(tmp_path / "images")
    metric = ("--metrics", "image_reward")
    said = error_of(capsys, images, tmp_path / "r.json", *metric)
    assert "ImageReward.pt" in said and "bert-base-uncased" in said
    (tmp_path / "empty").mkdir()
    flags = ("--image_reward", tmp_path / "empty", "--image_reward_tokenizer", folder / "bert")
    said = error_of(capsys, images, tmp_path / "r.json", *metric, *flags)
    assert "empty/ImageReward.pt is missing" in said
    state = torch.load(folder / "ImageReward.pt")
    del state["mlp.layers.7.bias"]
    torch.save(state, tmp_path / "empty" / "ImageReward.pt")
    (tmp_path / "empty" / "med_config.json").write_text((folder / "med_config.json").read_text())
    said = error_of(capsys, images, tmp_path / "r.json", *metric, *flags)
    assert "another model than ImageReward" in said and "mlp.layers.7.bias" in said
