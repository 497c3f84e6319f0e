"""Quantized weights, told by their config; needs no torch."""

from typing import Any


def require_plain(name: str, config: dict[str, Any]) -> None:
    """Raise ValueError for the config of a network whose weights are packed into 4 or 8 bits.

    name: of the file or folder the config is of.
    """
    told = config.get("quantization_config")
    if told is None:
        return
    method = told.get("quant_method") if isinstance(told, dict) else None
    raise ValueError(
        f"{name}: its weights are quantized ({method or 'quantization_config'}); full ones are "
        "needed, in bfloat16, float16 or float32, as before they were quantized"
    )
