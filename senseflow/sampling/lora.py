"""LoRA files that draw: a student that is one, and one on top of what draws.

A file of which a part fits nowhere is refused, unless a part is asked for: the loaders of diffusers
leave such parts out, with a warning at most.
"""

import logging
from pathlib import Path

from diffusers import DiffusionPipeline

from senseflow.common.fields import FieldError
from senseflow.common.files import read_json
from senseflow.sampling.drawing import Paths
from senseflow.teachers.family import Family
from senseflow.teachers.weights import adapted
from senseflow.weights.lora_files import (
    Component,
    Lora,
    add_adapters,
    is_lora,
    layer_shapes,
    read_lora,
)
from senseflow.weights.stored import LORA_FILE, Weights, component_weights
from senseflow.weights.student import open_lora

logger = logging.getLogger(__name__)


def lora_student(family: Family, base: Path, file: Path) -> Lora:
    """A student's adapters, all of which are for the base's network; raises ValueError."""
    lora = read_lora(open_lora(file), [adapted(family, base)])
    lora.require_all(f"; as --lora it is put on top of a student or of the {family.title} teacher")
    return lora


def lora_on_top(family: Family, paths: Paths, network: Weights | None) -> Lora | None:
    """The LoRA to add, for the network and the encoders that a pipeline can add one to.

    network: the student's weights, where it has its own. Raises FieldError for a file that is no
    LoRA, of which nothing fits, or not all where a part was not asked for.
    """
    if paths.lora is None:
        return None
    file = lora_file(paths.lora)
    weights = open_lora(file)
    if not is_lora(weights.keys):
        raise FieldError("lora", f"{file} holds no LoRA: its keys are such as {weights.keys[0]}")
    parts = [adapted(family, paths.base, network), *text_encoders(paths.base)]
    lora = read_lora(weights, parts)
    if not lora.tensors:
        raise FieldError("lora", f"{file} has nothing for {family.title}: {lora.said()}")
    if lora.lost and not paths.lora_partial:
        raise FieldError(
            "lora", f"{file} does not fit: {lora.said()}; --lora_partial uses the others"
        )
    if lora.lost:
        logger.warning("warning: the LoRA %s is used in part: %s", file, lora.said())
    return lora


def lora_file(path: Path) -> Path:
    """The file that a path stands for; raises FieldError."""
    if path.is_file():
        return path
    if (own := path / LORA_FILE).is_file():
        return own
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise FieldError("lora", f"{path} has no {LORA_FILE}, and of other .safetensors {names}")
    return found[0]


def text_encoders(base: Path) -> list[Component]:
    """The encoders that diffusers adds adapters to: those of CLIP."""
    index = read_json(base / "model_index.json")
    names = [
        n for n, kind in index.items() if isinstance(kind, list) and "CLIPText" in str(kind[1])
    ]
    parts = [name for name in names if name.startswith("text_encoder")]
    return [
        Component(name, layer_shapes(component_weights(base / name)), encoder=number)
        for number, name in enumerate(sorted(parts), 1)
    ]


def add_lora(stock: DiffusionPipeline, lora: Lora) -> None:
    """Put a LoRA into the networks of a pipeline that it is for; a student's own stays."""
    for component in dict.fromkeys(key.partition(".")[0] for key in lora.tensors):
        add_adapters(getattr(stock, component), lora.of(component))
