"""What draws: a student on its base, or the base itself, its teacher; looked into, not read yet.

The student's card, else its base, says how it is drawn where the caller does not.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from senseflow.common.fields import FieldError
from senseflow.common.files import read_json
from senseflow.config.families import check_card_family, check_config, check_keys
from senseflow.sampling.drawing import CPS, Drawing, Paths
from senseflow.sampling.lora import lora_on_top, lora_student
from senseflow.teachers.family import Family, Plan
from senseflow.teachers.folder import base_config
from senseflow.teachers.weights import base_weights, in_diffusers_names
from senseflow.weights.card import StudentCard, base_form
from senseflow.weights.fingerprint import base_fingerprint, fingerprint, stored_weights
from senseflow.weights.lora_files import Lora, is_lora
from senseflow.weights.stored import Weights
from senseflow.weights.student import (
    StudentFiles,
    build_lora_student,
    build_student,
    find_student,
    open_weights,
)

logger = logging.getLogger(__name__)

NUM_STEPS = 4  # of students without a card


@dataclass(frozen=True)
class Student:
    """A checkpoint's weights, found and looked into, but not read yet."""

    files: StudentFiles
    weights: Weights | Lora  # a LoRA is on the base's own
    config: dict[str, Any]
    config_name: str


@dataclass(frozen=True, eq=False)
class Model:
    """A student on its base, or the base itself."""

    family: Family
    paths: Paths
    student: Student | None  # None: the base itself, the teacher
    lora: Lora | None = None  # on top

    @property
    def component(self) -> Path:
        """The folder of the base's own network."""
        return self.paths.base / self.family.component

    @property
    def card(self) -> StudentCard | None:
        """How the student was trained; None for a teacher, and for weights without a card."""
        return self.student.files.card if self.student else None

    @property
    def config(self) -> dict[str, Any] | None:
        """config.json of the student's network, None for a teacher."""
        return self.student.config if self.student else None

    @property
    def anchors(self) -> list[float]:
        """The noise levels a student was trained at: its card's, else those of the base's."""
        if self.card:
            return list(self.card.anchors)
        return self.family.default_anchors(self.paths.base, NUM_STEPS)

    @property
    def size_multiple(self) -> int:
        """What heights and widths are multiples of, in pixels."""
        return self.family.sides(self.paths.base, self.config).multiple

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Read the student's network, on the CPU."""
        student = self.student
        assert student, "the teacher's network is read with its pipeline"
        if isinstance(student.weights, Lora):
            # On the base that it was trained on: a packed one differs from the base's files.
            weights = base_weights(self.family, self.paths.base, base_form(self.card))
            return build_lora_student(student.weights, self.component, dtype, weights)
        return build_student(student.weights, student.config, dtype, student.config_name)

    def plan(self, drawing: Drawing) -> Plan:
        """What is drawn: each value as asked for, else the card's, else the base's.

        Raises FieldError for what this student or teacher cannot draw.
        """
        if self.student or drawing.sampler not in (None, "euler"):
            self.family.require_scheduler(self.paths.base)
        height, width = self._size(drawing)
        levels = self._levels(drawing)
        sampler, eta = self._sampler(drawing)
        return Plan(
            steps=len(levels) if levels else drawing.steps or self.family.teacher_steps,
            sampler=sampler,
            levels=levels,
            guidance=self._guidance(drawing),
            max_sequence_length=self._t5_length(drawing),
            height=height,
            width=width,
            eta=eta,
        )

    def _sampler(self, drawing: Drawing) -> tuple[str, float | None]:
        """And the eta of cps, which is the trained one where none is asked for."""
        if drawing.sampler is None and self.card and self.card.eta is not None:
            return CPS, float(self.card.eta)
        default = "x0" if self.student else "euler"
        return drawing.sampler or default, None if drawing.eta is None else float(drawing.eta)

    def _size(self, drawing: Drawing) -> tuple[int, int]:
        sides, card = self.family.sides(self.paths.base, self.config), self.card
        height = drawing.height or (card.height if card else sides.default)
        width = drawing.width or (card.width if card else sides.default)
        for field, side in (("height", height), ("width", width)):
            if side % sides.multiple:
                raise FieldError(field, f"{side} is not a positive multiple of {sides.multiple}")
            if sides.largest and side > sides.largest:
                raise FieldError(
                    field, f"{side}: the network has positions for {sides.largest} pixels"
                )
        return height, width

    def _t5_length(self, drawing: Drawing) -> int | None:
        wanted = drawing.max_sequence_length
        if self.family.tokenizer is None:
            if wanted is not None:
                raise FieldError("max_sequence_length", f"{wanted}: {self.family.title} has no T5")
            return None
        trained = self.card.max_sequence_length if self.card else None
        # The trained number first: padding is not masked, and another length is another prompt.
        length = wanted or trained or self.family.t5_length(self.paths.base)
        if length > (most := self.family.most_tokens(self.paths.base)):
            raise FieldError(
                "max_sequence_length",
                f"{length}: {self.family.title} takes {most} tokens of a prompt at most",
            )
        return length

    def _guidance(self, drawing: Drawing) -> float | None:
        wanted = drawing.guidance
        if self.config is None:
            return self._teacher_guidance(wanted)
        trained = student_guidance(self.family, self.card, self.config)
        if wanted is None:
            return trained
        if trained is None:
            # a student draws as its teacher does with guidance: it has learnt the scale
            raise FieldError("guidance", f"{wanted:g}: this student takes no guidance")
        return float(wanted)

    def _teacher_guidance(self, wanted: float | None) -> float | None:
        """A number that the teacher's own network makes something of; None: it takes none."""
        family = self.family
        own = base_config(self.paths.base, family.component)
        if family.embeds_guidance and not family.takes_guidance(own):
            if wanted is not None:
                raise FieldError("guidance", f"{wanted:g}: {self.component} takes no guidance")
            return None
        if wanted is None:
            return family.teacher_guidance
        least = family.unguided
        if not family.embeds_guidance and wanted < least and wanted != family.no_guidance:
            # the pipeline would draw as with the least, and the sidecar say otherwise
            raise FieldError(
                "guidance", f"{wanted:g}: the pipeline guides above {least:g}; {least:g} is without"
            )
        return float(wanted)

    def _levels(self, drawing: Drawing) -> list[float] | None:
        """A student's noise levels, noisy to clean; None: the teacher's own schedule."""
        levels = self.family.levels
        if self.student is None:
            if drawing.levels is not None:
                raise FieldError("levels", "are a student's anchors: a teacher is given steps")
            return None
        try:
            if drawing.levels is not None:
                chosen = levels.among(self.anchors, list(drawing.levels))
            else:
                steps = drawing.steps or len(self.anchors)
                chosen = levels.of_steps(self.anchors, steps, drawing.two_steps)
        except ValueError as error:
            field = "steps" if drawing.levels is None else "levels"
            raise FieldError(field, str(error)) from error
        return self.family.rounded(self.card.anchors, chosen) if self.card else chosen

    def settings(self, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
        """What an image depends on besides its prompt: its sidecar, and what a repeat must equal.

        Paths do not tell weights apart: files may have been replaced under the same name.
        """
        base, lora = self.paths.base, self.paths.lora
        files = self.student.files if self.student else None
        lora_files = [] if lora is None else [lora] if lora.is_file() else stored_weights(lora)
        return {
            "family": self.family.name,
            "base": str(base.resolve()),
            "base_weights": _short(stored_weights(base, "*/*")),
            "checkpoint": str(files.weights.resolve()) if files else None,
            "checkpoint_weights": _short(files.parts) if files else None,
            "ema": self.paths.ema or None,
            "iteration": self.card.iteration if self.card else None,
            "config": self.student.config_name if self.student else None,
            "lora": str(lora.resolve()) if lora else None,
            "lora_weights": _short(lora_files) if lora else None,
            "lora_unused_layers": len(self.lora.lost) or None if self.lora else None,
            "steps": plan.steps,
            "sampler": plan.sampler,
            "eta": plan.eta,
            self.family.levels.name: plan.levels,
            "guidance": plan.guidance,
            "max_sequence_length": plan.max_sequence_length,
            "height": plan.height,
            "width": plan.width,
            "dtype": str(dtype).removeprefix("torch."),
        }


def _short(files: list[Path]) -> str:
    """The fingerprint of weights, as much of it as tells files apart."""
    return fingerprint(files)[:16]


def student_guidance(
    family: Family, card: StudentCard | None, config: dict[str, Any]
) -> float | None:
    """What a student with this config is fed; None: it takes no guidance."""
    if not family.takes_guidance(config):
        return None
    return card.guidance if card and card.guidance is not None else family.teacher_guidance


def find_model(family: Family, paths: Paths) -> Model:
    """The student of a checkpoint, or without one the base itself; weights stay on the disk.

    Raises ValueError when the checkpoint is not of this family, or is no checkpoint.
    """
    student = _find(family, paths, paths.checkpoint) if paths.checkpoint else None
    own = student.weights if student and isinstance(student.weights, Weights) else None
    return Model(family, paths, student, lora_on_top(family, paths, own))


def _find(family: Family, paths: Paths, checkpoint: Path) -> Student:
    files = find_student(checkpoint, paths.ema)
    _check_card(family, paths, checkpoint, files.card)
    weights = open_weights(files.weights, files.ema)
    check_keys(family, files.weights, weights.keys)
    if is_lora(weights.keys):
        if paths.config:
            raise FieldError("config", f"{paths.config}: a LoRA is for the base's own network")
        own = paths.base / family.component / "config.json"
        logger.info("LoRA: %s\nbase: %s", files.weights, own.parent)
        if files.card is None:
            logger.warning(
                "warning: the LoRA %s has no senseflow.json and is drawn as a student, in a few "
                "steps without guidance; one that is no student goes to --lora, on a teacher or a "
                "student",
                files.weights,
            )
        lora = lora_student(family, paths.base, files.weights)
        return Student(files, lora, read_json(own), str(own))
    config, config_name = _choose_config(family, paths, files, weights)
    logger.info("weights: %s\nconfig: %s", files.weights, config_name)
    weights = in_diffusers_names(family, weights, config)
    return Student(files, weights, config, config_name)


def _check_card(family: Family, paths: Paths, checkpoint: Path, card: StudentCard | None) -> None:
    """The card must be of this family; another base than the trained one is only warned of."""
    if card is None:
        return
    check_card_family(family, checkpoint, card.family)
    family.levels.check(card.anchors)
    if checkpoint.resolve() == paths.base.resolve():
        return  # an exported pipeline, whose network is the student
    try:
        same = base_fingerprint(paths.base / family.component) == card.base_fingerprint
    except ValueError:
        logger.warning("warning: %s has no weights to compare with the student's base", paths.base)
        return
    if not same:
        logger.warning(
            "warning: the student was distilled from another %s than %s", card.base_name, paths.base
        )


def _choose_config(
    family: Family, paths: Paths, files: StudentFiles, weights: Weights
) -> tuple[dict[str, Any], str]:
    """The one asked for; else the checkpoint's own; else the base's, fitted; else the last one."""
    own = paths.config or files.config
    in_base = paths.base / family.component / "config.json"
    file = own or (in_base if in_base.is_file() else family.last_config)
    if file is None:
        raise FieldError(
            "config",
            f"is missing: neither the checkpoint nor {in_base} says of what network the weights "
            "are",
        )
    config = read_json(file)
    check_config(family, file, config)
    if own or file != in_base:
        return config, str(file)
    fitted = family.fit_config(config, weights.keys)
    changed = {k: v for k, v in fitted.items() if config.get(k) != v}
    said = ", ".join(f"{k} {json.dumps(v)}" for k, v in changed.items())
    return fitted, f"{file} with {said}" if said else str(file)
