"""The roles of a LoRA run: one sharded base, what it may begin with, how its student is written."""

import logging
from pathlib import Path

import torch

from senseflow.config.config import load_config, require_same_base
from senseflow.engine.export import Layout
from senseflow.engine.initial import Initial, is_run
from senseflow.engine.inputs import Inputs
from senseflow.teachers.family import Family
from senseflow.teachers.folder import TeacherSettings
from senseflow.teachers.weights import adapted, lora_key
from senseflow.weights.card import base_form
from senseflow.weights.lora import (
    ADAPTERS,
    Role,
    share,
    with_adapters_of,
)
from senseflow.weights.lora_files import is_lora, read_lora
from senseflow.weights.lora_settings import LoraSettings
from senseflow.weights.meta import Build
from senseflow.weights.packed import PackedLinear
from senseflow.weights.stored import Weights
from senseflow.weights.student import find_student, open_lora

logger = logging.getLogger(__name__)


def build_roles(
    family: Family,
    settings: TeacherSettings,
    lora: LoraSettings,
    initial: Initial,
    build: Build,
    device: torch.device,
) -> tuple[Role, Role, Role]:
    """Teacher, generator and fake score over one network, which is read and sharded once.

    A unit of sharding holds frozen weights in the compute type and float32 adapters: FSDP2 gathers
    both in the compute type, and reduces in float32 the gradients of the adapter that has some.
    device: the run's. A base in few bits is packed there.
    """
    source, base = share(family.teacher(settings), lora, device)
    if lora.base != "bfloat16":
        num = sum(isinstance(module, PackedLinear) for module in base.network.modules())
        logger.info("lora.base: %d linear layers of the base are packed into %s", num, lora.base)
    build(with_adapters_of(initial, source, lora.train))
    generator, fake_score = (Role(base, name) for name in ADAPTERS)
    return Role(base, None), generator, fake_score


def lora_layout(
    family: Family, settings: TeacherSettings, lora: LoraSettings, dtype: torch.dtype
) -> Layout:
    """A student's `pytorch_lora_weights.safetensors`, as the pipelines of diffusers read it."""
    _, base = share(family.teacher(settings), lora)
    state = Role(base, ADAPTERS[0]).state_dict()
    name = lora_key(family, settings.folder)
    return Layout.of_lora(state, dtype, name, lora.alpha / lora.rank)


def initial_adapters(family: Family, base: Path, lora: LoraSettings, student: Path) -> Initial:
    """What a run of this scale begins with of a LoRA student, in any form and of any scale.

    Raises ValueError for what is none, or is not for this teacher alone.
    """
    weights = open_lora(find_student(student).weights)
    if not is_lora(weights.keys):
        raise ValueError(f"{_wrong(student)}: {weights.source} holds no adapters")
    found = read_lora(weights, [adapted(family, base)])
    found.require_all()
    scale = lora.alpha / lora.rank
    tensors = {
        key: value / scale if ".lora_B." in key and scale != 1 else value
        for key, value in found.of(family.component).items()
    }
    return {ADAPTERS[0]: Weights(found.file, list(tensors), lambda key: tensors[key])}


def _wrong(path: Path) -> str:
    return f"paths.initial {path} is no LoRA that this run can go on from"


def check_lora(inputs: Inputs, lora: LoraSettings, initial: Initial) -> None:
    """Raise ValueError for targets this teacher has not, and for an initial run or student that is
    no LoRA of the same rank and targets, or a run of another scale or other factors trained."""
    _, base = share(inputs.family.teacher(inputs.settings), lora)
    if not inputs.config.paths.initial:
        return
    path = Path(inputs.config.paths.initial)
    wrong = _wrong(path)
    try:
        for name in initial.keys() & set(ADAPTERS):
            initial[name].require(Role(base, name).state_dict())
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from error
    if not is_run(path):  # a student's products have no scale of their own
        require_same_base(inputs.config.lora, base_form(find_student(path).card), path)
        return
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    other = load_config(run / "config.yaml").lora
    require_same_base(inputs.config.lora, other.base, path)
    scale = (other.alpha or other.rank or 0) / (other.rank or 1)
    if other.train != lora.train or scale != lora.alpha / lora.rank:
        raise ValueError(
            f"{wrong}: its lora.train or its scale, alpha / rank = {scale:g}, differs; its "
            "student/step_* may be named instead"
        )
