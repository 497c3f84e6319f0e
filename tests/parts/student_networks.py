"""The network of a student in any form that `--checkpoint` takes, to compare its weights."""

from pathlib import Path

import torch
from torch import nn

from senseflow.common.files import read_json
from senseflow.weights.student import (
    build_lora_student,
    build_student,
    find_student,
    is_lora,
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
    if is_lora(files.weights):
        assert base is not None
        return build_lora_student(files.weights, base, dtype)
    config = config or files.config
    assert config is not None
    return build_student(open_weights(files.weights), read_json(config), dtype, str(config))
