"""The roles of a LoRA run: one sharded base, what it may begin with, how its student is written."""

from pathlib import Path

import torch

from senseflow.config.config import load_config
from senseflow.engine.export import LORA_FILE, Layout
from senseflow.engine.initial import Initial, is_run
from senseflow.engine.inputs import Inputs
from senseflow.teachers.family import Family
from senseflow.teachers.folder import TeacherSettings
from senseflow.weights.lora import (
    ADAPTERS,
    Role,
    metadata,
    share,
    stated_scale,
    with_adapters_of,
)
from senseflow.weights.lora_settings import LoraSettings
from senseflow.weights.meta import Build
from senseflow.weights.student import find_student


def build_roles(
    family: Family,
    settings: TeacherSettings,
    lora: LoraSettings,
    initial: Initial,
    build: Build,
) -> tuple[Role, Role, Role]:
    """Teacher, generator and fake score over one network, which is read and sharded once.

    A unit of sharding holds frozen weights in the compute type and float32 adapters: FSDP2 gathers
    both in the compute type, and reduces in float32 the gradients of the adapter that has some.
    """
    source, base = share(family.teacher(settings), lora)
    build(with_adapters_of(initial, source, lora.train))
    generator, fake_score = (Role(base, name) for name in ADAPTERS)
    return Role(base, None), generator, fake_score


def lora_layout(
    family: Family, settings: TeacherSettings, lora: LoraSettings, dtype: torch.dtype
) -> Layout:
    """A student's `pytorch_lora_weights.safetensors`, as the pipelines of diffusers read it."""
    _, base = share(family.teacher(settings), lora)
    state = Role(base, ADAPTERS[0]).state_dict()
    tensors = {key: value.to("meta", dtype) for key, value in state.items()}
    header = metadata(family.component, lora.rank, lora.alpha, list(lora.targets))
    prefix = f"{family.component}."
    return Layout(None, dtype, {LORA_FILE: tensors}, prefix=prefix, metadata=header)


def check_lora(inputs: Inputs, lora: LoraSettings, initial: Initial) -> None:
    """Raise ValueError for targets this teacher has not, and for an initial run or student that is
    no LoRA of the same rank, scale, factors trained and targets."""
    _, base = share(inputs.family.teacher(inputs.settings), lora)
    if not inputs.config.paths.initial:
        return
    path = Path(inputs.config.paths.initial)
    wrong = f"paths.initial {path} is no LoRA that this run can go on from"
    try:
        for name in initial.keys() & set(ADAPTERS):
            initial[name].require(Role(base, name).state_dict())
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from error
    if is_run(path):
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        other = load_config(run / "config.yaml").lora
        same = other.train == lora.train
        scale = (other.alpha or other.rank or 0) / (other.rank or 1)
    else:
        same, scale = True, stated_scale(find_student(path).weights)
    if not same or scale != lora.alpha / lora.rank:
        raise ValueError(f"{wrong}: its lora.train or its scale, alpha / rank = {scale:g}, differs")
