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
from functools import cache

import torch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUNDS = ("white", "black", "grey", "pink")
RELATIONS = ("left of", "above")
CAPTION_WORDS = ("a", "on", "left", "of", "above", *DIGITS, *COLOURS, *BACKGROUNDS)

CLASSES = {
    "digit_a": DIGITS,
    "digit_b": DIGITS,
    "colour_a": COLOURS,
    "colour_b": COLOURS,
    "background": BACKGROUNDS,
    "relation": RELATIONS,
}
ATTRIBUTES = tuple(CLASSES)
NUM_CLASSES = {name: len(words) for name, words in CLASSES.items()}

_HELD_OUT_ONE_IN = 10
_ONE_OF = {name: f"(?P<{name}>{'|'.join(words)})" for name, words in CLASSES.items()}
_SENTENCE = "a {colour_a} {digit_a} {relation} a {colour_b} {digit_b} on {background}"
_CAPTION = re.compile(_SENTENCE.format(**_ONE_OF))


Scene = tuple[int, ...]  # class indices in the order of ATTRIBUTES; "a" is the left or upper digit


def caption_of(scene: Scene) -> str:
    """The sentence that names all six attributes."""
    chosen = zip(CLASSES.items(), scene, strict=True)
    return _SENTENCE.format(**{name: words[index] for (name, words), index in chosen})


def parse_caption(caption: str) -> Scene:
    """The scene of which `caption` is the caption; a ValueError where it is of none."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(f"not a caption of two digits: {caption!r}")
    if match["colour_a"] == match["colour_b"]:
        raise ValueError(f"the two digits must differ in colour: {caption!r}")
    return tuple(words.index(match[name]) for name, words in CLASSES.items())


def is_held_out(caption: str) -> bool:
    """Whether no network may train on this caption; the same on every machine and in every run."""
    return zlib.crc32(caption.encode()) % _HELD_OUT_ONE_IN == 0


def all_scenes() -> list[Scene]:
    """Every scene there is, in a fixed order: (24,000)."""
    scenes = itertools.product(*map(range, NUM_CLASSES.values()))
    a, b = ATTRIBUTES.index("colour_a"), ATTRIBUTES.index("colour_b")
    return [scene for scene in scenes if scene[a] != scene[b]]


@cache
def split_scenes() -> tuple[torch.Tensor, torch.Tensor]:
    """Attributes of the training and of the held-out scenes: two (num, 6) int64 tensors."""
    scenes = all_scenes()
    held_out = torch.tensor([is_held_out(caption_of(scene)) for scene in scenes])
    attributes = torch.tensor(scenes)
    return attributes[~held_out], attributes[held_out]


def captions_of(attributes: torch.Tensor) -> list[str]:
    """The captions of attributes (B, 6)."""
    return list(map(caption_of, attributes.tolist()))


def attributes_of(captions: list[str]) -> torch.Tensor:
    """The attributes (B, 6), int64, of captions."""
    return torch.tensor([parse_caption(caption) for caption in captions])
