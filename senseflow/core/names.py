"""What a configuration may choose between by name; apart from the equations, which take torch."""

from typing import Literal

TimeLaw = Literal["uniform", "logit_normal"]  # of t: `senseflow.core.anchors`
IsgLoss = Literal["charbonnier", "l2"]  # `senseflow.core.isg`
