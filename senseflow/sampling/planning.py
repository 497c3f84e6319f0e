"""From flags, card and base to a plan: which config, levels, size, guidance and text length."""

import argparse
import json
import logging
from typing import Any

from senseflow.config.families import check_card_family, check_config
from senseflow.teachers.family import Family, Plan
from senseflow.weights.card import StudentCard
from senseflow.weights.fingerprint import base_fingerprint
from senseflow.weights.stored import Weights
from senseflow.weights.student import StudentFiles, read_config

logger = logging.getLogger(__name__)

MAX_T5_LENGTH = 512  # what the pipelines allow


def check_card(family: Family, card: StudentCard | None, args: argparse.Namespace) -> None:
    """The card must be of this family; another base than the trained one is only warned of."""
    if card is None:
        return
    check_card_family(family, args.checkpoint, card.family)
    family.levels.check(card.anchors)
    if args.checkpoint.resolve() == args.base.resolve():
        return  # an exported pipeline, whose network is the student
    try:
        same = base_fingerprint(args.base / family.component) == card.base_fingerprint
    except ValueError:
        logger.warning("warning: %s has no weights to compare with the student's base", args.base)
        return
    if not same:
        logger.warning(
            "warning: the student was distilled from another %s than %s", card.base_name, args.base
        )


def choose_config(
    family: Family, files: StudentFiles, weights: Weights, args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """The flag's config; else the checkpoint's own; else the base's, fitted; else the last one."""
    own = args.config or files.config
    in_base = args.base / family.component / "config.json"
    file = own or (in_base if in_base.is_file() else family.last_config)
    if file is None:
        raise ValueError(
            f"{family.config_flag} is missing: neither the checkpoint nor {in_base} says what "
            "network the weights are of"
        )
    config = read_config(file)
    check_config(family, file, config)
    if own or file != in_base:
        return config, str(file)
    fitted = family.fit_config(config, weights.keys)
    changed = {k: v for k, v in fitted.items() if config.get(k) != v}
    said = ", ".join(f"{k} {json.dumps(v)}" for k, v in changed.items())
    return fitted, f"{file} with {said}" if said else str(file)


def make_plan(
    family: Family,
    args: argparse.Namespace,
    files: StudentFiles | None,
    config: dict[str, Any] | None,
) -> Plan:
    """Steps, levels, size, guidance and T5 length, from the flags, else the card, else the base.

    files and config are the student's; None for the teacher.
    """
    card = files.card if files else None
    height, width = _size(family, args, card, config)
    length = _t5_length(family, args, card)
    guidance = _guidance(family, args, card, config)
    levels = _levels(family, args, card) if files else None
    return Plan(
        steps=len(levels) if levels else args.steps or family.teacher_steps,
        sampler=args.sampler or ("x0" if files else "euler"),
        levels=levels,
        guidance=guidance,
        max_sequence_length=length,
        height=height,
        width=width,
    )


def _size(
    family: Family,
    args: argparse.Namespace,
    card: StudentCard | None,
    config: dict[str, Any] | None,
) -> tuple[int, int]:
    sides = family.sides(args.base, config)
    trained = (card.height, card.width) if card else (sides.default, sides.default)
    height = trained[0] if args.height is None else args.height
    width = trained[1] if args.width is None else args.width
    for flag, side in (("--height", height), ("--width", width)):
        if side < sides.multiple or side % sides.multiple:
            raise ValueError(f"{flag} {side} is not a positive multiple of {sides.multiple}")
        if sides.largest and side > sides.largest:
            raise ValueError(f"{flag} {side}: the network has positions for {sides.largest} pixels")
    return height, width


def _t5_length(family: Family, args: argparse.Namespace, card: StudentCard | None) -> int | None:
    if family.tokenizer is None:
        return None
    trained = card.max_sequence_length if card else None
    length = args.max_sequence_length or trained or family.t5_length(args.base)
    if length > MAX_T5_LENGTH:
        raise ValueError(f"--max_sequence_length {length}: the pipeline allows {MAX_T5_LENGTH}")
    return length


def _guidance(
    family: Family,
    args: argparse.Namespace,
    card: StudentCard | None,
    config: dict[str, Any] | None,
) -> float | None:
    if config is None:
        return family.teacher_guidance if args.guidance is None else float(args.guidance)
    trained = student_guidance(family, card, config)
    if args.guidance is None:
        return trained
    if trained is None:
        raise ValueError(f"--guidance {args.guidance:g}: this student takes no guidance")
    return float(args.guidance)


def student_guidance(
    family: Family, card: StudentCard | None, config: dict[str, Any]
) -> float | None:
    """What a student with this config is fed; None: it takes no guidance."""
    if not family.takes_guidance(config):
        return None
    return card.guidance if card and card.guidance is not None else family.teacher_guidance


def trained_anchors(
    family: Family, args: argparse.Namespace, card: StudentCard | None
) -> list[float]:
    """The noise levels a student was trained at: its card's, else those of students of the base."""
    return list(card.anchors) if card else family.default_anchors(args.base, 4)


def _levels(family: Family, args: argparse.Namespace, card: StudentCard | None) -> list[float]:
    """A student's noise levels, noisy to clean."""
    levels, anchors = family.levels, trained_anchors(family, args, card)
    try:
        if args.levels:
            chosen = levels.among(anchors, args.levels)
        else:
            chosen = levels.of_steps(anchors, args.steps or len(anchors), args.two_steps)
    except ValueError as error:
        raise ValueError(f"{levels.flag if args.levels else '--steps'} {error}") from error
    return family.rounded(card.anchors, chosen) if card else chosen
