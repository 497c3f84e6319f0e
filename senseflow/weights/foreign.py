"""Weights in the forms that other programs make of them: 8 bits, GGUF; and those that are not read.

What is read becomes tensors of 16 or 32 bits, one at a time. What was rounded away stays away, so
it is said.
"""

import importlib
import logging
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Size, Tensor

from senseflow.common.fields import short
from senseflow.common.files import parse_json
from senseflow.common.weights_files import DAMAGES, fault_in
from senseflow.weights.stored import Computed, Stored, Weights

logger = logging.getLogger(__name__)

FEW_BITS = {  # by how some key ends, the program that reads it
    r"\.quant_state\.bitsandbytes__\w+|\.absmax|\.SCB": "bitsandbytes",
    r"\.weight\._(data|scale)": "optimum-quanto",
    r"\.qweight|\.wscales|\.qzeros": "SVDQuant or GPTQ",
    r"\.weight[:_](_?data|qdata|tensor_impl\S*|int_data)|\._weight_qdata": "torchao",
    r"\.weight_scale_2": "NVFP4",
}
SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's two names for the scale of a weight in fp8
BESIDE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")  # such a weight
MARKER = "scaled_fp8"  # a tensor that is nothing but a sign
ADVICE = "students are read from weights of 16 or 32 bits: give those it was made of"


def readable(weights: Weights) -> Weights:
    """The same weights with the scales of ComfyUI's 8 bits multiplied in.

    Raises ValueError, saying what they are, for few bits that only their own program reads.
    """
    for ends, program in FEW_BITS.items():
        if any(re.search(f"(?:{ends})$", key) for key in weights.keys):
            raise ValueError(f"{weights.source} is quantized ({program}); {ADVICE}")
    if any(kind.startswith("F8") for kind in weights.types):
        logger.warning(
            "warning: %s is in 8 bits (fp8): it draws other images than the weights it was made of",
            weights.source,
        )
    return _unscaled(weights)


def _unscaled(weights: Weights) -> Weights:
    """ComfyUI's fp8 with a scale for each weight: W = scale * weight."""
    scales = {
        f"{key.removesuffix(end)}.weight": key
        for key in weights.keys
        for end in SCALES
        if key.endswith(end)
    }
    if not scales:
        return weights
    for key in weights.keys:
        if key.endswith(".comfy_quant"):
            said = parse_json(bytes(weights.tensor(key).tolist()), f"{weights.source}, {key}")
            kind = str(said.get("format") if isinstance(said, dict) else said)
            if not kind.startswith("float8_e"):
                raise ValueError(
                    f"{weights.source} is quantized (ComfyUI's {short(kind)}); {ADVICE}"
                )

    def read(key: str) -> Stored:
        stored = weights.read(key)
        if key not in scales:
            return stored
        return Computed(
            stored.shape, lambda: stored[...].float() * weights.tensor(scales[key]).float()
        )

    keys = [k for k in weights.keys if not k.endswith(BESIDE) and k.split(".")[-1] != MARKER]
    return replace(weights, keys=keys, read=read)


def open_gguf(file: Path) -> Weights:
    """The tensors of a GGUF file in float32; raises ValueError without the package gguf, and for a
    damaged file."""
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError(f"{file}: GGUF is read by the package gguf: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(file)
    except DAMAGES as error:
        raise ValueError(f"{file} {fault_in(file, error)}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {tensor.tensor_type.name for tensor in tensors.values()}

    def read(key: str) -> Stored:
        found = tensors[key]
        # Of what was reshaped so that rows are whole blocks, the shape it had is kept beside it.
        kept = reader.get_field(f"comfy.gguf.orig_shape.{key}")
        shape = Size(map(int, kept.contents() if kept else reversed(found.shape)))

        def make() -> Tensor:
            values = gguf.dequantize(found.data, found.tensor_type)
            return torch.from_numpy(values.copy()).float().view(shape)

        return Computed(shape, make)

    if few := sorted(kinds - {"F32", "F16", "BF16"}):
        logger.warning(
            "warning: %s is in few bits (%s): it draws other images than the weights it was made "
            "of",
            file,
            ", ".join(few),
        )
    return Weights(file, list(tensors), read)
