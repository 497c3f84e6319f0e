"""A student's weights, wherever they come from, as a diffusers network; and the card beside them.

Weights that do not fit are an error that names the keys: nothing is ever left random. Pickles are
read with weights_only, and a run folder through its student's safetensors alone.
"""

import logging
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.common.hub_names import in_cache, said_missing
from senseflow.common.weights_files import DAMAGES, fault_in
from senseflow.weights.card import StudentCard, read_card
from senseflow.weights.foreign import ADVICE, open_gguf, readable
from senseflow.weights.lora_files import Lora, add_adapters
from senseflow.weights.meta import class_in, meta_network
from senseflow.weights.stored import (
    NAMES,
    SUFFIXES,
    Weights,
    component_weights,
    open_index,
    open_safetensors,
    shards_of,
)

logger = logging.getLogger(__name__)

COMPONENTS = ("transformer", "unet")  # the trained part of a diffusers pipeline folder
STEP = re.compile(r"step_(\d+)$")
GGUF = ".gguf"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
PICKLED = ("model", "ema_model", "state_dict", "module", "generator")  # where weights are in one
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
NETWORK = "model.diffusion_model."  # before its keys in a checkpoint of all parts
PREFIXES = (
    "module.",
    NETWORK,
    "model.",
    *(f"{component}." for component in COMPONENTS),
)
FORMS = (
    "a run folder or one of its student/step_* or checkpoints/step_* folders, a diffusers "
    "component folder (config.json and safetensors) or whole pipeline, a .safetensors file, a "
    ".safetensors.index.json, a LoRA (pytorch_lora_weights.safetensors), a .gguf, or a "
    f"{', '.join(PICKLES)} with weights, bare or under {', '.join(PICKLED)}"
)


@dataclass(frozen=True)
class StudentFiles:
    """What was found at a checkpoint's path: the weights file, and what lies beside it."""

    weights: Path  # .safetensors, .safetensors.index.json or a pickle
    config: Path | None  # its own config.json
    card: StudentCard | None
    ema: bool = False  # the average is asked for

    @property
    def parts(self) -> list[Path]:
        """The files with the weights: of an index, it and its shards."""
        if not self.weights.name.endswith(".index.json"):
            return [self.weights]
        shards = set(shards_of(self.weights).values())
        return [self.weights, *(self.weights.parent / name for name in sorted(shards))]


def find_student(checkpoint: Path, ema: bool = False) -> StudentFiles:
    """Which files a checkpoint's path stands for; nothing is read but the card.

    ema: the average of the student's weights; raises ValueError when there is none.
    """
    if not checkpoint.exists():
        raise ValueError(f"checkpoint {checkpoint} {said_missing(checkpoint)}; it may be {FORMS}")
    if checkpoint.is_file():
        suffixes = (".safetensors", ".safetensors.index.json", GGUF, *PICKLES)
        if not checkpoint.name.endswith(suffixes):
            raise ValueError(f"checkpoint {checkpoint} is not a weights file; it may be {FORMS}")
        return _with_neighbours(checkpoint, ema)
    return _with_neighbours(_weights_file(_component_folder(checkpoint, ema)), ema)


def _with_neighbours(weights: Path, ema: bool) -> StudentFiles:
    """config.json counts as the weights' own when it is a diffusers network's."""
    config = weights.parent / "config.json"
    own = config.is_file() and "_class_name" in read_json(config)
    card = read_card(weights.parent)
    if ema and weights.suffix not in PICKLES and not (card and card.ema):
        raise ValueError(
            f"{weights} is no EMA; --ema takes a run trained with ema.decay, one of its ema/step_* "
            "or checkpoints/step_* folders, or a .pth with 'ema_model'"
        )
    return StudentFiles(weights, config if own else None, card, ema)


def _component_folder(folder: Path, ema: bool) -> Path:
    """The folder with config.json and safetensors that a folder stands for."""
    kind = "ema" if ema else "student"
    if (folder / kind).is_dir() and (newest := newest_step(folder / kind)):
        return newest
    if ema and (folder / "student").is_dir():
        raise ValueError(f"{folder} holds no EMA: the run was trained without ema.decay")
    if folder.name in ("student", "ema") and (newest := newest_step(folder)):
        return newest
    step = newest_step(folder) if folder.name == "checkpoints" else folder
    if step and step.parent.name == "checkpoints" and STEP.match(step.name):
        student = step.parent.parent / kind / step.name
        if ema and not student.is_dir():
            raise ValueError(f"{step} holds no EMA: there is no {student}")
        if not student.is_dir():
            raise ValueError(
                f"{step} is a training checkpoint whose student {student} is gone; name another "
                "step, or the run folder for the newest student"
            )
        return student
    for name in COMPONENTS:
        if (folder / name / "config.json").is_file():
            return folder / name
    return folder


def newest_step(folder: Path) -> Path | None:
    """The step_* folder with the highest number."""
    steps = [(int(m[1]), f) for f in folder.iterdir() if (m := STEP.match(f.name)) and f.is_dir()]
    return max(steps)[1] if steps else None


def _weights_file(folder: Path) -> Path:
    """The one set of weights in a component folder."""
    for name in (*NAMES, "*"):
        for suffix in SUFFIXES:
            found = sorted(folder.glob(name + suffix))
            if len(found) == 1:
                return found[0]
            if found:
                names = ", ".join(f.name for f in found[:5])
                raise ValueError(
                    f"checkpoint {folder} holds several weights files: {names}; name one"
                )
    if held := in_cache(folder):
        raise ValueError(
            f"checkpoint {folder} is a folder of the Hub's cache; what was downloaded is {held}"
        )
    raise ValueError(f"checkpoint {folder} holds no weights; a checkpoint may be {FORMS}")


def open_weights(file: Path, ema: bool = False) -> Weights:
    """The tensors of a weights file; raises ValueError naming the file when it is damaged.

    ema: of a pickle, those under 'ema_model' alone.
    """
    if file.name.endswith(".index.json"):
        weights = open_index(file)
    elif file.suffix == ".safetensors":
        weights = open_safetensors(file)
    elif file.suffix == GGUF:
        weights = open_gguf(file)
    else:
        weights = _open_pickle(file, ema)
    return readable(_stripped(weights))


def _open_pickle(file: Path, ema: bool) -> Weights:
    try:
        tree = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except DAMAGES as error:
        fault = fault_in(file, error)  # a pickle of torchao's names its classes
        fault = f"is quantized (torchao); {ADVICE}" if "torchao" in fault else fault
        raise ValueError(f"{file} {fault}") from error
    tree = _inner(file, tree, ema)
    return Weights(file, list(tree), lambda key: tree[key])


def _inner(file: Path, tree: Any, ema: bool) -> dict[str, Tensor]:
    """The weights in a pickled checkpoint: under one of PICKLED, or the whole of it."""
    found = tree
    if isinstance(tree, dict):
        names = ("ema_model",) if ema else PICKLED
        name = next((n for n in names if isinstance(tree.get(n), dict)), None)
        if ema and not name:
            raise ValueError(f"{file} holds no EMA: there is no 'ema_model' in it")
        if name:
            logger.info("weights under %r in %s", name, file)
            found = tree[name]
    if (
        not isinstance(found, dict)
        or not found
        or not all(torch.is_tensor(v) for v in found.values())
    ):
        kind = f"keys {list(tree)[:5]}" if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{file} holds no weights, bare or under {', '.join(PICKLED)}: {kind}")
    return found


def _stripped(weights: Weights) -> Weights:
    """The network's weights alone, whose keys lost what DDP, torch.compile, FSDP and checkpoints of
    all parts put before them."""
    names = {key: key for key in weights.keys}
    if inside := {key: key for key in names if key.startswith(NETWORK)}:
        if others := names.keys() - inside.keys():
            parts = ", ".join(sorted({key.partition(".")[0] for key in others}))
            logger.info("of %s the network alone is read, not %s", weights.source, parts)
        names = inside
    for wrapper in WRAPPERS:
        names = {key.replace(wrapper, ""): name for key, name in names.items()}
    # Only what begins all keys is a wrapper's: a network may have a `model.` of its own.
    while names and (
        prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in names)), "")
    ):
        names = {key.removeprefix(prefix): name for key, name in names.items()}
    return replace(weights, keys=list(names), read=lambda key: weights.read(names[key]))


def build_student(
    weights: Weights, config: dict[str, Any], dtype: torch.dtype, config_name: str
) -> nn.Module:
    """The diffusers network of `config` (class by its _class_name) with all and only `weights`.

    Raises ValueError naming keys that are missing, unknown or of another shape, and the config.
    """
    # Without memory: SD3.5's table of positions alone is 0.9 GB, which the weights bring.
    network: nn.Module = meta_network(class_in(config, config_name), config, config_name)
    wanted = network.state_dict()
    weights.require(wanted, config_name)
    # In memory of torch's own: matrix products round by how theirs is aligned.
    state = {key: weights.tensor(key).to(dtype, copy=True) for key in wanted}
    network.load_state_dict(state, assign=True, strict=True)
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    return network.eval().requires_grad_(False)


def open_lora(file: Path) -> Weights:
    """The tensors of a LoRA file with their prefixes, which tell the networks apart, in memory: it
    has thousands. Raises ValueError when it is damaged."""
    if file.suffix != ".safetensors":
        return open_weights(file)
    keys = open_safetensors(file).keys
    tensors = load_file(file)
    return Weights(file, keys, lambda key: tensors[key])


def build_lora_student(
    lora: Lora, base: Path, dtype: torch.dtype, weights: Weights | None = None
) -> nn.Module:
    """The network of a teacher's component folder with the adapters of a LoRA on it.

    weights: of the base; None: the folder's.
    """
    config = base / "config.json"
    weights = weights or component_weights(base)
    network = build_student(weights, read_json(config), dtype, str(config))
    add_adapters(network, lora.of(base.name))
    return network.eval().requires_grad_(False)
