"""A teacher's folder without its weights, on the disk: every file a run reads, tensors as holes.

The weights files have the right keys, types and shapes, and no bytes: a hole in a file takes no
room on the disk, and what is read of it on fake tensors is a shape. So a plan goes the way of
training, from `paths.pretrained_model` to the shards, and no part of the package knows of plans.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import diffusers
import open_clip
import timm
import torch
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.config.sections import PathsConfig
from senseflow.teachers.family import Family
from senseflow.teachers.text_encoders import Kinds, TextEncoder, kind_of
from senseflow.weights.safetensors_writer import header, num_bytes

SHARD = 8 * 2**30  # bytes; a file as large as the host's memory could not be mapped
NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
WEIGHTS = (
    "*.safetensors",
    "*.index.json",
    "*.index.*.json",
    "*.bin",
    "*.msgpack",
    "*.onnx",
    "*.pth",
    "*.ckpt",
)


def write_holes(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with the names, types and shapes of `tensors` and nothing in them."""
    with file.open("wb") as stream:
        stream.write(header(tensors))
        stream.truncate(num_bytes(tensors))


def write_shards(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """A component's weights as holes, in several files with an index where they are large."""
    shards, total = dict[int, dict[str, Tensor]](), 0
    for key, tensor in tensors.items():
        shards.setdefault(total // SHARD, {})[key] = tensor
        total += tensor.nbytes
    if len(shards) == 1:
        write_holes(folder / f"{name}.safetensors", tensors)
        return
    files = {f"{name}-{n + 1:05}-of-{len(shards):05}.safetensors": s for n, s in shards.items()}
    for file, shard in files.items():
        write_holes(folder / file, shard)
    placed = {key: file for file, shard in files.items() for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def write_teacher(folder: Path, family: Family) -> None:
    """The pipeline folder of a family's published teacher, with holes for weights."""
    for name, tree in family.published.files(family.pipeline_class, family.component).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(tree, indent=2))
    fill(folder, family.networks().adapter.text_encoders)


def copy_teacher(source: Path, folder: Path, family: Family) -> None:
    """A copy of an existing pipeline folder with holes for weights, whether those are there or not.

    Raises ValueError when it is none.
    """
    index = read_json(source / "model_index.json")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "model_index.json", folder)
    for name, entry in index.items():
        if isinstance(entry, list) and (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns(*WEIGHTS))
    fill(folder, family.networks().adapter.text_encoders)


def fill(folder: Path, kinds: Kinds) -> None:
    """Give each component of model_index.json the weights or vocabulary it lacks.

    kinds: of the text encoders.
    """
    for name, entry in read_json(folder / "model_index.json").items():
        config = folder / name / "config.json"
        if not isinstance(entry, list) or not config.is_file() or name == "image_encoder":
            continue  # that of an IP-adapter is not read
        tree, network = read_json(config), nn.Module()
        with torch.device("meta"):
            if entry[0] == "diffusers":
                network = getattr(diffusers, entry[1]).from_config(tree)
            else:
                kind = kind_of(folder / name, entry[1], kinds)
                network = kind.network(kind.network.config_class.from_dict(tree))
                write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), kind)
        state = network.to(torch.bfloat16).state_dict()  # as teachers are stored
        write_shards(folder / name, NAMES[entry[0]], state)


def write_tokenizer(folder: Path, kind: TextEncoder) -> None:
    """One of the same kind and length that knows a letter, where a folder has no vocabulary.

    Prompts are padded to their length, so that the vocabulary changes no shape.
    """
    length = read_json(folder / "tokenizer_config.json")["model_max_length"]
    if all(file.name == "tokenizer_config.json" for file in folder.iterdir()):
        kind.tokenizer(length).save_pretrained(folder)


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
