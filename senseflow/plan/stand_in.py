"""A teacher's folder without its weights, on the disk: every file a run reads, tensors as holes.

The weights files have the right keys, types and shapes, and no bytes: a hole in a file takes no
room on the disk, and what is read of it on fake tensors is a shape. So a plan goes the way of
training, from `paths.pretrained_model` to the shards, and no part of the package knows of plans.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import timm
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from senseflow.common.files import read_json
from senseflow.config.config import PathsConfig
from senseflow.teachers.text_encoders import CLASSES
from senseflow.weights.safetensors_writer import header, num_bytes

NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.msgpack", "*.onnx", "*.pth", "*.ckpt")


def write_holes(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with the names, types and shapes of `tensors` and nothing in them."""
    with file.open("wb") as stream:
        stream.write(header(tensors))
        stream.truncate(num_bytes(tensors))


def write_teacher(folder: Path, trees: Mapping[str, Mapping[str, Any]]) -> None:
    """A pipeline folder of JSON files by path, with holes for weights."""
    for name, tree in trees.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(tree, indent=2))
    fill(folder)


def copy_teacher(source: Path, folder: Path) -> None:
    """The same of an existing pipeline folder, whether its weights are there or not.

    Raises ValueError when it is none.
    """
    index = read_json(source / "model_index.json")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "model_index.json", folder)
    for name, entry in index.items():
        if isinstance(entry, list) and (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns(*WEIGHTS))
    fill(folder)


def fill(folder: Path) -> None:
    """Give each component of model_index.json the weights or vocabulary it lacks."""
    index = read_json(folder / "model_index.json")
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] in NAMES and entry[1]:
            if name.startswith("tokenizer"):
                write_tokenizer(folder / name)
            elif name != "scheduler" and (folder / name / "config.json").is_file():
                network = meta_component(folder / name, entry[1])
                write_holes(folder / name / f"{NAMES[entry[0]]}.safetensors", network.state_dict())


def meta_component(folder: Path, class_name: str) -> nn.Module:
    """A network of a pipeline folder on the meta device, in bfloat16, as teachers are stored."""
    tree = read_json(folder / "config.json")
    network: nn.Module
    with torch.device("meta"):
        if class_name in CLASSES:
            network = CLASSES[class_name](CLASSES[class_name].config_class.from_dict(tree))
        else:
            network = getattr(diffusers, class_name).from_config(tree)
    return network.to(torch.bfloat16)


def write_tokenizer(folder: Path) -> None:
    """One of the same kind and length that knows a letter, where a folder has no vocabulary.

    Prompts are padded to their length, so that the vocabulary changes no shape.
    """
    tree = read_json(folder / "tokenizer_config.json")
    if any(f.name != "tokenizer_config.json" for f in folder.iterdir()):
        return
    length = tree["model_max_length"]
    tokenizer: PreTrainedTokenizerBase
    if length > 77:
        pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "a")]
        tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
    else:
        vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)
    tokenizer.save_pretrained(folder)


def write_vision(folder: Path, paths: PathsConfig) -> list[str]:
    """Holes for DINOv2 and CLIP where a run would fetch their weights; overrides that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = []
    with torch.device("meta"):
        if ":" not in paths.dinov2:
            vit = timm.create_model(paths.dinov2, pretrained=False)
            write_holes(folder / "dinov2.safetensors", vit.state_dict())
            overrides.append(f"paths.dinov2_weights={folder / 'dinov2.safetensors'}")
        if ":" not in paths.clip:
            clip = open_clip.create_model(paths.clip, device="meta")
            write_holes(folder / "clip.safetensors", clip.state_dict())
            overrides.append(f"paths.clip_weights={folder / 'clip.safetensors'}")
            overrides.append("paths.clip_quick_gelu=true")
    return overrides
