"""What a configuration says of LoRA; light, where `senseflow.weights.lora` takes seconds (peft)."""

from dataclasses import dataclass
from typing import Literal

from senseflow.core.names import BaseForm


@dataclass(frozen=True)
class LoraSettings:
    """Student and fake score as adapters W + (alpha / rank) B A on the frozen teacher's W."""

    rank: int
    alpha: float  # their scale is alpha / rank
    train: Literal["B", "AB"]
    targets: tuple[str, ...]  # ends of the names of layers
    seed: int  # of A
    base: BaseForm = "bfloat16"  # the linear layers of the frozen blocks; bfloat16: as they are
