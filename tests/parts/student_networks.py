"""The network of a student in any form that `--checkpoint` takes, to compare its weights."""

from pathlib import Path

import torch
from lora_parts import adapters_for
from torch import nn

from senseflow.common.files import read_json
from senseflow.weights.lora_files import is_lora
from senseflow.weights.student import (
    build_lora_student,
    build_student,
    find_student,
    open_weights,
)


def load_network(
    checkpoint: Path,
    config: Path | None = None,
    dtype: torch.dtype = torch.float32,
    base: Path | None = None,
) -> nn.Module:
    """On the CPU; base: the component folder of the teacher that a LoRA is for."""
    files = find_student(checkpoint)
    weights = open_weights(files.weights)
    if is_lora(weights.keys):
        assert base is not None
        return build_lora_student(adapters_for(files.weights, base), base, dtype)
    config = config or files.config
    assert config is not None
    return build_student(weights, read_json(config), dtype, str(config))
