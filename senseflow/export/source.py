"""The student that is to be shipped: where its tensors are, its card, its teacher and its run."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from senseflow.common.files import read_json
from senseflow.config.config import Config, load_config
from senseflow.config.families import check_card_family, check_keys, family_of
from senseflow.config.recipes import RECIPES
from senseflow.config.sections import Dtype
from senseflow.engine.build import export
from senseflow.engine.checkpoint_folders import find_checkpoint
from senseflow.engine.checkpoint_reader import OpenCheckpoint
from senseflow.engine.export import Layout, aligned
from senseflow.engine.inputs import read_setup
from senseflow.sampling.model import student_guidance
from senseflow.teachers.family import Family, StockSampling
from senseflow.teachers.weights import adapted, base_weights, in_diffusers_names, lora_key
from senseflow.weights.card import StudentCard, base_form
from senseflow.weights.fingerprint import base_fingerprint
from senseflow.weights.lora_files import is_lora, read_lora
from senseflow.weights.meta import meta_network
from senseflow.weights.original import inverse, planned, to_diffusers
from senseflow.weights.stored import Computed
from senseflow.weights.student import (
    STEP,
    StudentFiles,
    find_student,
    open_lora,
    open_weights,
)

logger = logging.getLogger("senseflow")


@dataclass(frozen=True)
class Source:
    """A student on disk, one tensor of which is read at a time."""

    base: Path  # its teacher's diffusers folder
    family: Family
    card: StudentCard
    config: Config | None  # of its run, where that is known
    layout: Layout  # of a component, or of a LoRA
    read: Callable[[str], Tensor]  # what is written, before it is rounded: by key in the layout

    @property
    def is_lora(self) -> bool:
        """Adapters, not a network of its own."""
        return self.layout.component is None

    @property
    def stock(self) -> StockSampling:
        """How a plain pipeline samples it."""
        return self.family.stock_sampling(self.card.anchors)

    @property
    def guidance(self) -> float | None:
        """What its embedding is fed, None without one."""
        component: Any = self.layout.component
        base = self.base / self.family.component / "config.json"
        config = dict(component.config) if component else read_json(base)
        return student_guidance(self.family, self.card, config)

    def tensors(self) -> Iterator[Tensor]:
        """All of them in the layout's order."""
        return (self.read(key).to(self.layout.dtype).contiguous() for key in self.layout.keys)


def find_source(
    folder: Path, pretrained_model: Path | None, ema: bool, dtype: Dtype | None
) -> Source:
    """The student of a run, of one of its checkpoints, or of a folder with weights and card.

    pretrained_model: the teacher's folder, where it is not the one the run names. ema: the average
    of the student's weights. dtype: None for the run's precision.compute or a folder's own.
    Raises ValueError for what is none of them, or is of another teacher.
    """
    of = of_folder if holds_student(folder) else of_checkpoint
    source = of(folder, pretrained_model, ema, dtype)
    _warn_of_another_base(source)
    return source


def holds_student(folder: Path) -> bool:
    """Whether a folder holds a student's weights, or step_* folders with some, not a whole run.

    A run of which the students alone were kept, without its checkpoints, is such a folder.
    """
    if not folder.is_dir() or folder.parent.name == "checkpoints":
        return folder.is_file()
    indexed = (folder / "model_index.json").is_file()
    kept = (folder / "student").is_dir() and not (folder / "checkpoints").exists()
    return indexed or kept or folder.name in ("student", "ema") or any(folder.glob("*.safetensors"))


def of_checkpoint(
    folder: Path, pretrained_model: Path | None, ema: bool, dtype: Dtype | None
) -> Source:
    """The student, or its average, of a run's training checkpoint."""
    checkpoint, iteration = find_checkpoint(folder)
    config = read_config(checkpoint.parent.parent, pretrained_model)
    stored = OpenCheckpoint(checkpoint)
    keys = stored.student(ema)
    setup = read_setup(config, RECIPES[config.recipe].family)
    student = export(setup, dtype or config.precision.compute)
    layout, base = student.layout, Path(config.paths.pretrained_model)
    check_shapes(checkpoint, {key: stored.shapes[name].size for key, name in keys.items()}, layout)
    return Source(
        base=base,
        family=family_of(base, "--pretrained_model"),
        card=dataclasses.replace(
            student.card, iteration=iteration, ema=config.ema.decay if ema else None
        ),
        config=config,
        layout=layout,
        read=lambda key: layout.written(key, stored.read(keys[key], torch.float32)),
    )


def read_config(run: Path, pretrained_model: Path | None) -> Config:
    """The configuration of a run, with its teacher where it is now."""
    config = load_config(run / "config.yaml")
    base = pretrained_model or Path(config.paths.pretrained_model)
    if not base.is_dir():
        raise ValueError(
            f"the run's teacher {base} is not there: name its folder with --pretrained_model"
        )
    paths = dataclasses.replace(config.paths, pretrained_model=str(base))
    return dataclasses.replace(config, paths=paths)


def of_folder(
    folder: Path, pretrained_model: Path | None, ema: bool, dtype: Dtype | None
) -> Source:
    """A student as safetensors with its card: a run's student/step_*, or what was exported."""
    files = find_student(folder, ema)
    if files.card is None:
        raise ValueError(
            f"{files.weights.parent} has no senseflow.json, the card of how the student is sampled"
        )
    config = _config_of_run(files.weights.parent, pretrained_model)
    base = Path(config.paths.pretrained_model) if config else pretrained_model
    if base is None:
        raise ValueError("--pretrained_model is missing: the diffusers folder of the teacher")
    family = family_of(base, "--pretrained_model")
    check_card_family(family, folder, files.card.family)
    weights = open_weights(files.weights)
    check_keys(family, files.weights, weights.keys)
    # all tensors of a student have one type; what was in 8 bits is written in bfloat16
    own = weights.tensor(weights.keys[0]).dtype
    stored_as = getattr(torch, dtype) if dtype else torch.bfloat16 if own.itemsize == 1 else own
    if is_lora(weights.keys):
        return _of_lora(files, family, base, config, stored_as)
    layout = _component_layout(_config_of(files, base, family, weights.keys), family, stored_as)
    weights = in_diffusers_names(family, weights, dict(layout.component.config))
    shapes = {key: weights.read(key).shape for key in weights.keys}
    check_shapes(files.weights, shapes, layout)

    def read(key: str) -> Tensor:
        return weights.tensor(key).to(stored_as).contiguous()

    return Source(base, family, files.card, config, layout, read)


def _of_lora(
    files: StudentFiles, family: Family, base: Path, config: Config | None, dtype: torch.dtype
) -> Source:
    """A LoRA in any form, which is written in ours; it is in memory."""
    assert files.card
    lora = read_lora(open_lora(files.weights), [adapted(family, base)])
    lora.require_all()
    tensors = lora.of(family.component)
    layout = Layout.of_lora(tensors, dtype, lora_key(family, base))
    return Source(base, family, files.card, config, layout, lambda key: tensors[key])


def _config_of_run(step: Path, pretrained_model: Path | None) -> Config | None:
    """The configuration of the run that a student/step_* lies in; None elsewhere."""
    run = step.parent.parent
    inside = step.parent.name in ("student", "ema") and STEP.match(step.name)
    is_of_run = inside and (run / "config.yaml").is_file()
    return read_config(run, pretrained_model) if is_of_run else None


def _config_of(files: StudentFiles, base: Path, family: Family, keys: list[str]) -> dict[str, Any]:
    """The config.json beside a student's weights; the teacher's, fitted, where there is none."""
    if files.config:
        return read_json(files.config)
    return family.fit_config(read_json(base / family.component / "config.json"), keys)


def _component_layout(config: dict[str, Any], family: Family, dtype: torch.dtype) -> Layout:
    """One file or shards, as diffusers saves the network of a config."""
    network = meta_network(getattr(diffusers, family.network_class), config)
    return Layout.plan(network, dtype)


def check_shapes(where: Path, held: dict[str, torch.Size], layout: Layout) -> None:
    """Raise ValueError unless these are the tensors of this teacher's student."""
    wanted = {key: like.shape for shapes in layout.files.values() for key, like in shapes.items()}
    other = [key for key in wanted if held.get(key) != wanted[key]]
    other += [key for key in held if key not in wanted]
    if other:
        raise ValueError(
            f"{where} is not a student of this teacher: {len(other)} keys differ, such as "
            f"{', '.join(other[:5])}"
        )


def _warn_of_another_base(source: Source) -> None:
    """A student may be shipped with another teacher's encoders, but not without a word."""
    if base_fingerprint(source.base / source.family.component) != source.card.base_fingerprint:
        logger.warning(
            "warning: the student was distilled from another %s than %s",
            source.card.base_name,
            source.base,
        )


def in_steps(source: Source, steps: int) -> Source:
    """The student as one of fewer steps, at those of its anchors that sampling in so many takes.

    Raises ValueError unless they divide the number of anchors.
    """
    anchors = source.card.anchors
    if len(anchors) % steps:
        raise ValueError(
            f"--steps {steps} does not divide the {len(anchors)} steps that the student is for"
        )
    chosen = source.family.levels.of_steps(list(anchors), steps)
    return dataclasses.replace(source, card=dataclasses.replace(source.card, anchors=tuple(chosen)))


def in_original_names(source: Source) -> Source:
    """A network's tensors as the files of its teacher's authors name, cut and join them.

    Raises ValueError for a network which those files cannot hold.
    """
    original, network = source.family.original, source.layout.component
    if original is None:
        raise ValueError(f"--form original: {source.family.title} has no names but diffusers'")
    config = dict(network.config)
    plan = inverse(to_diffusers(network, original.of(config), original.prefix))
    own, dtype = network.state_dict(), source.layout.dtype
    held = planned(plan, lambda key: Computed(own[key].shape, partial(source.read, key)))
    tensors = {key: torch.empty(held(key).shape, dtype=dtype, device="meta") for key in plan}
    names = {key: original.prefix + key for key in tensors}
    layout = Layout(None, dtype, {"": aligned(tensors)}, names=names)
    return dataclasses.replace(source, layout=layout, read=lambda key: held(key)[...])


def fused(source: Source) -> Source:
    """A LoRA's student as a network of its own: W + B A, rounded once to the layout's type; of a
    base in few bits, W is what they stand for in float32.

    A network stays as it is. Raises ValueError for DoRA, which is no sum.
    """
    if not source.is_lora:
        return source
    folder = source.base / source.family.component
    layout = _component_layout(
        read_json(folder / "config.json"), source.family, source.layout.dtype
    )
    weights = base_weights(source.family, source.base, base_form(source.card))
    layers = {key.rpartition(".lora_")[0] for key in source.layout.keys}
    more = [
        key for key in source.layout.keys if not key.endswith(("lora_A.weight", "lora_B.weight"))
    ]
    if more:
        raise ValueError(f"only products B A are fused, and the LoRA holds more, such as {more[0]}")

    def read(key: str) -> Tensor:
        # summed in float32: a step of a LoRA is often smaller than a bfloat16 weight's last digit
        weight, layer = weights.tensor(key).float().contiguous(), key.removesuffix(".weight")
        if layer in layers and key.endswith(".weight"):
            a, b = (source.read(f"{layer}.lora_{factor}.weight").float() for factor in "AB")
            weight = weight + (b.flatten(1) @ a.flatten(1)).view_as(weight)
        return weight.to(layout.dtype)

    return dataclasses.replace(source, layout=layout, read=read)
