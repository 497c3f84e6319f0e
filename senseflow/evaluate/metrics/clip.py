"""The CLIP score: cosine of image and prompt."""

from typing import TYPE_CHECKING

from senseflow.evaluate.metrics.metric import (
    Column,
    Flag,
    Given,
    Machine,
    Prepared,
    Scorer,
    Spec,
    file_flag,
    name_flag,
    resize_flag,
    square,
    square_in_words,
)

if TYPE_CHECKING:
    from torch import Tensor

    from senseflow.evaluate.metrics.open_clips import Source

MODEL = name_flag(
    "--clip_model", "ViT-g-14",
    "open_clip architecture, or local-dir:FOLDER with open_clip_config.json (ViT-g-14)",
)  # fmt: skip
WEIGHTS = file_flag("--clip_weights", "in open_clip's keys")
QUICK_GELU = Flag[str | None](
    "--clip_quick_gelu", None, "true for OpenAI's weights", str, "BOOL", ("true", "false")
)
RESIZE = resize_flag("--clip_resize", 256)  # before the model's own preprocessing, as DMD2 does
PREFIX = Flag(
    "--clip_prefix", "A photo depicts ", "before each prompt ('A photo depicts ')", str, "TEXT"
)


def source_of(given: Given) -> "Source":
    """The CLIP that the flags name; raises ValueError for one that cannot be loaded."""
    from senseflow.evaluate.metrics.open_clips import find_source

    told = given[QUICK_GELU]
    quick_gelu = None if told is None else told == "true"
    return find_source(given[MODEL], given[WEIGHTS], quick_gelu, "--clip")


def prepare(given: Given) -> Prepared:
    """Preprocessed and prefixed as DMD2 does."""
    source, side, prefix = source_of(given), given[RESIZE] or None, given[PREFIX]

    def open_it(machine: Machine) -> Scorer:
        from senseflow.evaluate.metrics.open_clips import Clip, in_words

        clip = Clip(source, machine)

        def score(pixels: "Tensor", prompts: list[str]) -> "Tensor":
            return clip.cosines(pixels, [prefix + prompt for prompt in prompts])

        return Scorer(
            f"{square_in_words(side)}, {in_words(clip.config)}",
            lambda picture: clip.transform(square(picture, side)),
            score,
        )

    settings = {"prefix": prefix, "resize": side, **source.settings}
    return Prepared(source.model, [source.weights], settings, open_it)


SPEC = Spec(
    Column("clip", "CLIP"),
    about='mean cosine of image and "A photo depicts " + prompt (`--clip_prefix`)',
    needs="prompts",
    prepare=prepare,
    flags=(MODEL, WEIGHTS, QUICK_GELU, RESIZE, PREFIX),
)
