"""What a configuration tells a family of its teacher and student."""

from pathlib import Path

import torch

from senseflow.config.config import Config
from senseflow.config.sections import Dtype
from senseflow.teachers.folder import TeacherSettings
from senseflow.weights.lora_settings import LoraSettings


def teacher_settings(config: Config) -> TeacherSettings:
    """What the family of the teacher needs to know of a configuration."""
    paths = config.paths
    return TeacherSettings(
        folder=Path(paths.pretrained_model),
        resolution=config.train.resolution,
        max_sequence_length=config.data.max_sequence_length,
        shift=config.anchors.shift,
        compute_dtype=torch_dtype(config.precision.compute),
        vae_dtype=torch_dtype(config.precision.vae),
        student_config=Path(paths.student_config) if paths.student_config else None,
        linked=Path(paths.flux_wo_guidance_embed) if paths.flux_wo_guidance_embed else None,
        fold_guidance=config.student.fold_guidance,
        guidance=config.student.guidance,
        lora=lora_settings(config),
    )


def lora_settings(config: Config) -> LoraSettings | None:
    """The adapters of a configuration, None where student and fake score are networks."""
    lora = config.lora
    if lora.rank is None:
        return None
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return LoraSettings(
        lora.rank, float(alpha), lora.train, lora.targets, config.train.seed, lora.base
    )


def torch_dtype(name: Dtype) -> torch.dtype:
    """The type of a name in the configuration."""
    return torch.bfloat16 if name == "bfloat16" else torch.float32
