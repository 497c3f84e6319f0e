"""What a configuration may choose between by name; apart from the equations, which take torch."""

from typing import Literal

TimeLaw = Literal["uniform", "logit_normal"]  # of t: `senseflow.core.anchors`
IsgLoss = Literal["charbonnier", "l2"]  # `senseflow.core.isg`
TextLayer = Literal["equalized", "linear"]  # of the prompt in a head: `distill.vfm_heads`
NormSchedule = Literal["converged", "release"]  # of spectral norm: `distill.vfm_heads`
States = Literal["float32", "bfloat16", "8bit"]  # of moments: `senseflow.optim.compact_adamw`
BaseForm = Literal["bfloat16", "int8", "nf4"]  # of a LoRA run's base: `weights.packed`
