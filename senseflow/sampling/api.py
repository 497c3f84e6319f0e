"""Drawing from Python: `load_student` or `load_teacher`, then `sample`.

Torch and diffusers are imported by the first call, so that command lines answer at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.common.fields import FieldError, check_whole
from senseflow.config.families import family_of
from senseflow.sampling.drawing import Drawing, Machine, Paths
from senseflow.sampling.prompts import checked_prompt

if TYPE_CHECKING:
    from PIL import Image

    from senseflow.sampling.pipeline import Pipeline

DEFAULT = Drawing()


def load_student(
    base: Path | str,
    checkpoint: Path | str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    offload: bool = False,
    ema: bool = False,
    config: Path | str | None = None,
    lora: Path | str | None = None,
    lora_partial: bool = False,
) -> "Pipeline":
    """A student, ready to draw; the arguments are the flags of the sampling scripts.

    base: the teacher's diffusers folder, which tells the family. checkpoint: a run folder, or the
    student in any other form. dtype: bfloat16, float16 or float32; None is bfloat16 on a GPU,
    float32 on a CPU. Raises ValueError for what cannot be read, or is of another family.
    """
    paths = Paths(
        _path("base", base),
        _path("checkpoint", checkpoint),
        ema,
        None if config is None else _path("config", config),
        None if lora is None else _path("lora", lora),
        lora_partial,
    )
    return _load(paths, Machine(device, dtype, offload))


def load_teacher(
    base: Path | str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    offload: bool = False,
    lora: Path | str | None = None,
    lora_partial: bool = False,
) -> "Pipeline":
    """The base itself, ready to draw with its own schedule.

    dtype: bfloat16, float16 or float32; None is bfloat16 on a GPU, float32 on a CPU. offload: keep
    idle parts in host memory. lora: a folder or file to add; lora_partial: also one of which a part
    fits nowhere. Raises ValueError for what cannot be read.
    """
    paths = Paths(
        _path("base", base),
        lora=None if lora is None else _path("lora", lora),
        lora_partial=lora_partial,
    )
    return _load(paths, Machine(device, dtype, offload))


def _path(field: str, path: Path | str) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise FieldError(field, f"{path!r} is not a path")
    return Path(path)


def _load(paths: Paths, machine: Machine) -> "Pipeline":
    from senseflow.sampling.model import find_model  # torch and diffusers, seconds
    from senseflow.sampling.pipeline import Pipeline

    model = find_model(family_of(paths.base, "base"), paths)
    pipeline = Pipeline(model, machine)
    pipeline.put(model)
    return pipeline


def sample(
    pipeline: "Pipeline",
    prompts: str | Sequence[str],
    drawing: Drawing = DEFAULT,
    batch_size: int = 1,
) -> list["Image.Image"]:
    """The images of the prompts, or of one, those that the scripts save at this batch size.

    Image i has the seed drawing.seed + i. A prompt whose end the text encoders do not read is
    warned of. Raises ValueError for what this model cannot draw.
    """
    from senseflow.sampling.cut import warn_of_cuts  # with diffusers, which the pipeline has

    check_whole("batch_size", batch_size, 1)
    if not isinstance(drawing, Drawing):
        raise FieldError("drawing", f"{drawing!r} is not a Drawing")
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [checked_prompt(f"prompt {number}", text) for number, text in enumerate(given)]
    plan = pipeline.model.plan(drawing)
    warn_of_cuts(texts, pipeline.cuts(texts, plan) if texts else [])
    images = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        seeds = [drawing.seed + start + index for index in range(len(batch))]
        images += pipeline.draw(batch, seeds, plan)[0]
    return images
