"""Samples of a teacher and of students for the same prompts and seeds, side by side.

The folders are those of the sampling scripts or of `evaluate generate`: an image and, beside it, a
.json of that name with its prompt, its seed and how it was made.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from senseflow.evaluate.layouts import seed_folders
from senseflow.sampling.job import read_sidecar

NAMED = 3  # prompts named in a notice

Key = tuple[str, int]


@dataclass(frozen=True)
class Samples:
    """The images of one folder by prompt and seed."""

    label: str
    detail: str
    size: str  # such as "1024 x 1024"; "" where the .json does not say
    folder: Path
    files: dict[Key, Path]


@dataclass(frozen=True)
class Pairs:
    """The prompts and seeds that several folders share, one column per folder."""

    columns: list[Samples]
    keys: list[Key]
    notices: list[str]


def read_samples(folder: Path, flag: str, notices: list[str]) -> Samples:
    """Read a folder of samples, or its seed_* folders; raises ValueError for one without any.

    Images without a readable .json beside them are named in `notices` (but for grid.png).
    """
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} is not a folder")
    files: dict[Key, Path] = {}
    card: dict[str, Any] = {}
    odd = []
    places = seed_folders(folder) or [folder]
    for file in (file for place in places for file in sorted(place.glob("*.png"))):
        described = _sidecar(file)
        if described is None:
            odd += [] if file.name.startswith("grid") else [file.name]
            continue
        card = described
        files[described["prompt"], described["seed"]] = file
    if not files:
        raise ValueError(
            f"{flag} {folder} holds no image with its .json: name the --output_dir of a sampling "
            "script"
        )
    if odd:
        notices.append(
            f"{len(odd)} images of {folder} have no readable .json beside them and are left out: "
            f"{', '.join(odd[:NAMED])}{', ...' if len(odd) > NAMED else ''}."
        )
    size = f"{card['height']} × {card['width']}" if {"height", "width"} <= card.keys() else ""
    return Samples(_label(card), _detail(card), size, folder, files)


def match(samples: list[Samples], notices: list[str]) -> Pairs:
    """Match folders by prompt and seed to the first one, the teacher where there is one."""
    reference, others = samples[0], samples[1:]
    keys = [key for key in reference.files if not others or any(key in o.files for o in others)]
    said = list(notices)
    for other in others:
        said += _unmatched(other, reference) + _unmatched(reference, other)
        if reference.size and other.size and other.size != reference.size:
            said.append(
                f"{other.folder} is of {other.size} pixels, {reference.folder} of "
                f"{reference.size}: sample both at one size (--height, --width)."
            )
    if others and not keys:
        said.append("No prompt and seed is in more than one folder: nothing stands side by side.")
    return Pairs(_told_apart(samples), keys, said)


def _unmatched(one: Samples, other: Samples) -> list[str]:
    """What `one` has and `other` has not, in words."""
    missing = [key for key in one.files if key not in other.files]
    if not missing:
        return []
    prompts = {prompt for prompt, _ in other.files}
    named = "; ".join(
        f"“{prompt}” (seed {seed}{', another seed there' if prompt in prompts else ''})"
        for prompt, seed in missing[:NAMED]
    )
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    return [f"{len(missing)} of {len(one.files)} images of {one.folder} have no counterpart in "
            f"{other.folder}: {named}{more}."]  # fmt: skip


def _sidecar(file: Path) -> dict[str, Any] | None:
    """The .json of an image; None when it does not say prompt and seed."""
    card = read_sidecar(file.with_suffix(".json")) or {}
    good = isinstance(card.get("prompt"), str) and isinstance(card.get("seed"), int)
    return card if good else None


def _label(card: dict[str, Any]) -> str:
    """Such as "teacher, 28 steps" or "student, 4 steps"."""
    who = "student" if card.get("checkpoint") else "teacher"
    who += " (EMA)" if card.get("ema") else ""
    steps = card.get("steps")
    return f"{who}, {steps} step{'' if steps == 1 else 's'}" if steps else who


def _detail(card: dict[str, Any]) -> str:
    """How the images were made."""
    words = [str(card["sampler"])] if card.get("sampler") else []
    if isinstance(card.get("eta"), int | float):
        words.append(f"eta {card['eta']:g}")
    if card.get("iteration") is not None:
        words.append(f"iteration {card['iteration']}")
    if isinstance(card.get("guidance"), int | float):
        words.append(f"guidance {card['guidance']:g}")
    return ", ".join(words)


def _told_apart(samples: list[Samples]) -> list[Samples]:
    """Folders whose labels are alike are told apart by their names."""
    labels = [sample.label for sample in samples]
    return [
        replace(s, label=f"{s.label}, {s.folder.name}") if labels.count(s.label) > 1 else s
        for s in samples
    ]
