"""The language of the embedded teachers: scenes of two coloured digits, and their captions.

A scene is six attributes: two digits, their two (different) colours, a background and a relation.
A caption says all of them, so that a classifier can check a picture against its prompt:

    a red seven left of a blue two on white

There are 24,000 scenes; about a tenth of them, chosen by a hash of the caption, is held out of all
training, so that a teacher can be asked for combinations it has never seen.
"""

import itertools
import re
import zlib
from typing import NamedTuple

import torch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUNDS = ("white", "black", "grey", "pink")
RELATIONS = ("left of", "above")
CAPTION_WORDS = ("a", "on", "left", "of", "above", *DIGITS, *COLOURS, *BACKGROUNDS)

NUM_CLASSES = {
    "digit_a": len(DIGITS),
    "digit_b": len(DIGITS),
    "colour_a": len(COLOURS),
    "colour_b": len(COLOURS),
    "background": len(BACKGROUNDS),
    "relation": len(RELATIONS),
}
ATTRIBUTES = tuple(NUM_CLASSES)

_HELD_OUT_ONE_IN = 10
_CAPTION = re.compile(
    rf"a ({'|'.join(COLOURS)}) ({'|'.join(DIGITS)}) ({'|'.join(RELATIONS)})"
    rf" a ({'|'.join(COLOURS)}) ({'|'.join(DIGITS)}) on ({'|'.join(BACKGROUNDS)})"
)


class Scene(NamedTuple):
    """Class indices of a picture, in the order of `ATTRIBUTES`; "a" is the left or upper digit."""

    digit_a: int
    digit_b: int
    colour_a: int
    colour_b: int
    background: int
    relation: int

    def caption(self) -> str:
        """The sentence that names all six attributes."""
        first = f"a {COLOURS[self.colour_a]} {DIGITS[self.digit_a]}"
        second = f"a {COLOURS[self.colour_b]} {DIGITS[self.digit_b]}"
        return f"{first} {RELATIONS[self.relation]} {second} on {BACKGROUNDS[self.background]}"


def parse_caption(caption: str) -> Scene:
    """The scene of which `caption` is the caption; a ValueError where it is of none."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(f"not a caption of two digits: {caption!r}")
    colour_a, digit_a, relation, colour_b, digit_b, background = match.groups()
    if colour_a == colour_b:
        raise ValueError(f"the two digits must differ in colour: {caption!r}")
    return Scene(
        DIGITS.index(digit_a),
        DIGITS.index(digit_b),
        COLOURS.index(colour_a),
        COLOURS.index(colour_b),
        BACKGROUNDS.index(background),
        RELATIONS.index(relation),
    )


def is_held_out(caption: str) -> bool:
    """Whether no network may train on this caption; the same on every machine and in every run."""
    return zlib.crc32(caption.encode()) % _HELD_OUT_ONE_IN == 0


def all_scenes() -> list[Scene]:
    """Every scene there is, in a fixed order: (24,000)."""
    ranges = [range(count) for count in NUM_CLASSES.values()]
    return [s for s in map(Scene._make, itertools.product(*ranges)) if s.colour_a != s.colour_b]


def split_scenes() -> tuple[torch.Tensor, torch.Tensor]:
    """Attributes of the training and of the held-out scenes: two (num, 6) int64 tensors."""
    scenes = all_scenes()
    held_out = torch.tensor([is_held_out(scene.caption()) for scene in scenes])
    attributes = torch.tensor(scenes)
    return attributes[~held_out], attributes[held_out]


def captions_of(attributes: torch.Tensor) -> list[str]:
    """The captions of attributes (B, 6)."""
    return [Scene._make(row).caption() for row in attributes.tolist()]


def attributes_of(captions: list[str]) -> torch.Tensor:
    """The attributes (B, 6), int64, of captions."""
    return torch.tensor([parse_caption(caption) for caption in captions])
