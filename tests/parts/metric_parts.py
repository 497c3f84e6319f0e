"""Small random models in the formats of the published ones, and the command."""

import io
import json
import math
import shutil
from pathlib import Path

import open_clip
import torch
import torchvision
from text_parts import clip_tokenizer
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from senseflow.evaluate.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TINY_CLIP = ROOT / "assets/tiny/common/clip"
TINY_DINOV2 = ROOT / "assets/tiny/common/dinov2"
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def score(images: Path, output: Path, *flags: object) -> list[dict]:
    """The entries that a successful run leaves."""
    words = ["score", "--images", images, "--name", "student", "--output", output, *flags]
    assert main([*map(str, words), "--device", "cpu"]) == 0
    return json.loads(output.read_text())


def value(images: Path, output: Path, *flags: object) -> float:
    """Of the one metric asked for."""
    (entry,) = score(images, output, *flags)
    return entry["value"]


def error_of(capsys, images: Path, output: Path, *flags: object) -> str:
    """The one line of an exit with status 2."""
    capsys.readouterr()
    words = ["score", "--images", images, "--name", "student", "--output", output, *flags]
    try:
        status = main([*map(str, words), "--device", "cpu"])
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, (status, lines)
    return lines[0]


def save_torchscript_inception(file: Path) -> Path:
    """TorchScript with `layers`, as inception-2015-12-05.pt; 12 features."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 12, 9, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    whole = nn.Sequential()
    whole.add_module("layers", layers)
    torch.jit.script(whole).save(str(file))
    return file


class RandomInception(FeatureExtractorInceptionV3):
    """torch-fidelity's network with random weights of some strength."""

    def __init__(self) -> None:
        stream = io.BytesIO()
        torch.save({}, stream)
        stream.seek(0)
        super().__init__("inception", ["2048"], stream)

    def load_state_dict(self, *_: object) -> None:
        torch.manual_seed(1)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)


def save_open_clip(folder: Path, seed: int = 0) -> tuple[str, Path]:
    """local-dir name of a tiny architecture, and the file of its weights as open_clip has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    weights = folder.parent / f"{folder.name}_open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), weights)
    return f"local-dir:{folder}", weights


def save_clip_model(folder: Path) -> Path:
    """A transformers CLIPModel with its processor, as PickScore_v1."""
    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.logit_scale.data.fill_(math.log(100))  # as published; bfloat16 has 98.9
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images.save_pretrained(folder)  # preprocessor_config.json, as published
    tokenizer.save_pretrained(folder)
    return folder


def save_aesthetic_head(file: Path, width: int = OPEN_CLIP["embed_dim"]) -> Path:
    """As sac+logos+ava1-l14-linearMSE.pth, random: its keys, and its widths but for CLIP's."""
    torch.manual_seed(2)
    widths = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = {place: nn.Linear(*pair) for place, pair in widths.items()}
    torch.save(
        {f"layers.{k}.{n}": p.data for k, v in layers.items() for n, p in v.named_parameters()},
        file,
    )
    return file


def save_alexnet(file: Path) -> torchvision.models.AlexNet:
    """torchvision's AlexNet, random; the classifier, which LPIPS does not use, is one number."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = torchvision.models.alexnet(weights=None)
    network.features.to_empty(device="cpu")
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    state = network.state_dict()
    for key in state:
        if key.startswith("classifier"):
            state[key] = torch.zeros(1).expand(state[key].shape)
    torch.save(state, file)
    return network


def copy_folder(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
