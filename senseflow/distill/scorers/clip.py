"""The CLIP score: cosine of image and prompt."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.distill.scorers import metric

if TYPE_CHECKING:
    from torch import Tensor

    from senseflow.distill.scorers.open_clips import Clip

MODEL = metric.Flag[str](
    "--clip_model", "text",
    "open_clip architecture, or local-dir:FOLDER with open_clip_config.json (ViT-g-14)", "ViT-g-14",
)  # fmt: skip
WEIGHTS = metric.Flag[Path | None]("--clip_weights", "file", "in open_clip's keys")
QUICK_GELU = metric.Flag[str | None](
    "--clip_quick_gelu", "text", "true for OpenAI's weights", choices=("true", "false")
)
RESIZE = metric.Flag[int](
    "--clip_resize", "pixels", "LANCZOS to this before the model's own; 0: none (256)", 256
)  # fmt: skip
PREFIX = metric.Flag[str](
    "--clip_prefix", "text", "before each prompt ('A photo depicts ')", "A photo depicts "
)


def prepare(given: metric.Given) -> metric.Prepared:
    """Preprocessed and prefixed as DMD2 does."""
    prefix = given[PREFIX]

    def score(clip: "Clip", pixels: "Tensor", prompts: list[str]) -> "Tensor":
        return clip.cosines(pixels, [prefix + prompt for prompt in prompts])

    return prepare_clip(given, {"prefix": prefix}, score, prefix)


def prepare_clip(
    given: metric.Given,
    settings: dict[str, Any],
    judge: "Callable[[Clip, Tensor, list[str]], Tensor]",
    prefix: str | None = None,
) -> metric.Prepared:
    """The CLIP that the flags name, and what it makes of squares and their prompts.

    prefix: before each prompt that is read; None: prompts are not. Raises ValueError for a CLIP
    that cannot be loaded.
    """
    from senseflow.distill.scorers.open_clips import Clip, find_source
    from senseflow.distill.scorers.pixels import on_tensors

    told, side = given[QUICK_GELU], given[RESIZE] or None
    quick_gelu = None if told is None else told == "true"
    source = find_source(given[MODEL], given[WEIGHTS], quick_gelu, "--clip")

    def open_it(machine: metric.Machine) -> metric.Judge:
        clip = Clip(source, machine)
        reads = None if prefix is None else clip.reads(prefix)
        tensors = on_tensors(clip.config)
        judged = partial(judge, clip)
        return metric.Judge(*clip.on_squares(side), judged, reads, tensors, clip.model)

    settings = {**settings, "resize": side, **source.settings}
    return metric.Prepared(source.model, [source.weights], settings, open_it)


SPEC = metric.Spec(
    metric.Column("clip", "CLIP"),
    about='mean cosine of image and "A photo depicts " + prompt (`--clip_prefix`)',
    needs="prompts",
    prepare=prepare,
    flags=(MODEL, WEIGHTS, QUICK_GELU, RESIZE, PREFIX),
)
