"""Qwen-Image in the names of its authors' files, such as qwen_image_bf16.safetensors."""

from typing import Any

from senseflow.teachers.original import OriginalNames


def name(key: str, config: dict[str, Any]) -> str:
    """Its authors wrote the class in diffusers: all tensors are called alike."""
    return key


ORIGINAL = OriginalNames("Qwen", None, "", name)
