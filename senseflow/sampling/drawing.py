"""What is asked for: how images are drawn, with which weights, on which machine.

Command lines check all of it before torch is imported; what only the weights or the base can tell,
such as a student's own steps, `senseflow.sampling.model` checks.
"""

from dataclasses import dataclass
from pathlib import Path

from senseflow.common.fields import (
    FieldError,
    PathText,
    check,
    check_choice,
    check_finite,
    check_flag,
    check_range,
    check_whole,
)
from senseflow.common.hub_names import said_missing

CPS = "cps"
SAMPLERS = ("x0", "euler", CPS)
TWO_STEPS = ("spread", "first")
DTYPES = ("bfloat16", "float16", "float32")
MOST_STEPS = 1000  # the teachers' own schedules have no more
MOST_SIDE = 2**16 - 1  # pixels
MOST_SEED = 2**63 - 1  # the images' own, counted on from it, stay below torch's limit, 2**64
WHOLE: dict[str, tuple[int, int | None]] = {  # the numbers of a drawing, and their ranges
    "steps": (1, MOST_STEPS),
    "height": (1, MOST_SIDE),
    "width": (1, MOST_SIDE),
    "max_sequence_length": (1, None),
    "seed": (0, MOST_SEED),
}


@dataclass(frozen=True)
class Drawing:
    """How images are drawn; None is the student's own, as its card says, or the teacher's.

    Raises FieldError, a ValueError, for what no student or teacher can draw.
    """

    steps: int | None = None  # student: as many as its anchors, a divisor of their number, 2x
    # x0 re-noises its prediction, euler follows the ODE, cps is between them; teacher: euler
    sampler: str | None = None
    levels: tuple[float, ...] | None = None  # in place of steps: which of the trained anchors
    two_steps: str = "spread"  # of two steps: evenly spread over the anchors, or the first two
    guidance: float | None = None  # a teacher's scale, or what a student's embedding is fed
    height: int | None = None  # pixels
    width: int | None = None
    max_sequence_length: int | None = None  # tokens of a prompt
    seed: int = 0  # of the first image; image i has seed + i
    eta: float | None = None  # of cps, and to be named with it: from 0, euler, to 1, x0

    def __post_init__(self) -> None:
        for field, (least, most) in WHOLE.items():
            value = getattr(self, field)
            check_whole(field, value, least, most)
            if value is not None:  # numpy's integers wrap around, and torch takes none as a seed
                object.__setattr__(self, field, int(value))
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("two_steps", self.two_steps, TWO_STEPS)
        check_finite("guidance", self.guidance)
        for field in ("two_steps", "seed"):
            if getattr(self, field) is None:
                raise FieldError(field, "is None: leave it out for its default")
        self._check_eta()
        self._check_levels()

    def _check_eta(self) -> None:
        check_finite("eta", self.eta)
        check_range("eta", self.eta, 0, 1)
        if self.sampler == CPS and self.eta is None:
            raise FieldError("eta", "is missing: cps takes one from 0, which is euler, to 1, x0")
        if self.sampler != CPS and self.eta is not None:
            raise FieldError("eta", f"{self.eta:g} is of the sampler cps: name it, or leave it out")

    def _check_levels(self) -> None:
        levels = self.levels
        if levels is not None and not (isinstance(levels, tuple | list) and levels):
            raise FieldError("levels", f"{levels!r} is not a list of noise levels")
        for level in levels or ():
            if level is None:
                raise FieldError("levels", "None is not a number")
            check_finite("levels", level)
        if self.levels is not None and self.steps is not None:
            said = ", ".join(f"{level:g}" for level in self.levels)
            raise FieldError("levels", f"{said} and steps {self.steps} exclude each other")


@dataclass(frozen=True)
class Paths:
    """The weights that draw: a student's on its base, or, without a checkpoint, the base's own.

    Raises FieldError, a ValueError, for files that are not there.
    """

    base: Path  # a diffusers pipeline folder: text encoders, VAE, scheduler, the teacher's network
    checkpoint: Path | None = None  # the student, in any form that `weights.student.FORMS` lists
    ema: bool = False  # the average of the student's weights
    config: Path | None = None  # config.json of the student's network; None: its own, or the base's
    lora: Path | None = None  # LoRA folder or file to add
    lora_partial: bool = False  # also one of which a part fits nowhere

    def __post_init__(self) -> None:
        check_flag("ema", self.ema)
        check_flag("lora_partial", self.lora_partial)
        for field, given in (("ema", self.ema), ("config", self.config)):
            if given and not self.checkpoint:
                raise FieldError(field, "is of a student: name its checkpoint, or leave it out")
        if self.lora_partial and not self.lora:
            raise FieldError("lora_partial", "is of a LoRA: name it, or leave it out")
        for field in ("base", "checkpoint", "config", "lora"):
            if path := getattr(self, field):
                check(field, str(path), PathText())
        for field, path in (("checkpoint", self.checkpoint), ("lora", self.lora)):
            if path and not path.exists():
                raise FieldError(field, f"{path} {said_missing(path)}")
        if self.config and not self.config.is_file():
            raise FieldError("config", f"{self.config} is not a file")


@dataclass(frozen=True)
class Machine:
    """Where is drawn, and in which type; None: a GPU in bfloat16 if there is one, else the CPU in
    float32.
    """

    device: str | None = None  # cpu, cuda, cuda:1, ...
    dtype: str | None = None
    offload: bool = False  # idle parts are kept in host memory
    compile: bool = False  # torch.compile the network's blocks

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_flag("offload", self.offload)
        check_flag("compile", self.compile)
