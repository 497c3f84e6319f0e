"""What a model card says of one student's sampling: its call, its guidance, ComfyUI's node."""

import math
from typing import Any

from senseflow.core.levels import one_shift
from senseflow.export.source import Source

SD35_SHIFT = 3.0  # that ComfyUI gives every SD3


def call_of(source: Source) -> dict[str, Any]:
    """The arguments of the pipeline's call besides the prompt, at the size trained at."""
    card, stock = source.card, source.stock
    guidance = stock.guidance if source.guidance is None else source.guidance
    call = {"height": card.height, "width": card.width, **stock.levels, "guidance_scale": guidance}
    if card.max_sequence_length is not None:
        call["max_sequence_length"] = card.max_sequence_length
    return call


def imported_of(source: Source, form: str) -> list[str]:
    """The classes of diffusers that the script on the card names."""
    names = [source.family.pipeline_class]
    names += [source.family.network_class] if form != "pipeline" and not source.is_lora else []
    return sorted([*names, source.stock.scheduler] if form != "pipeline" else names)


def typed(values: dict[str, Any]) -> list[str]:
    """As a call's arguments are typed; those that are None are left out."""
    return [f"{key}={value!r}" for key, value in values.items() if value is not None]


def guidance_of(source: Source) -> str:
    """Which guidance the student draws with."""
    if source.guidance is not None:
        return f"{source.guidance:g}, fed to the network's guidance embedding"
    if source.family.name == "flux":
        return "none: the network has no guidance embedding, so `guidance_scale` changes nothing"
    off = source.stock.guidance
    return f"none: `guidance_scale={off:g}` leaves out the unconditional half"


def shift_node(source: Source) -> str:
    """The node between ComfyUI's loader and sampler by which it draws at the trained levels."""
    anchors = source.card.anchors
    if source.family.name == "sdxl":
        if "timesteps" in source.stock.levels:
            return _by_hand([f"{t:g}" for t in anchors], "timesteps")
        return "That samples at the trained timesteps; no other node is needed."
    shift = one_shift(anchors)
    if shift is None:
        return _by_hand([f"{sigma:.4g}" for sigma in anchors], "sigmas")
    if source.family.name == "sd35":
        if math.isclose(shift, SD35_SHIFT, abs_tol=1e-3):
            return "ComfyUI's own shift for SD3.5, 3, is the trained one: no other node is needed."
        return f"Between loader and sampler the node ModelSamplingSD3 with shift {shift:.4g}."
    mu = f"{math.log(shift):.4g}"
    node = (
        f"the node ModelSamplingFlux with max_shift and base_shift both {mu} (the shift e^{mu} = "
        f"{shift:.4g} at every size)"
    )
    if source.guidance is not None:
        return f"The node FluxGuidance with {source.guidance:g}, and {node}."
    return (
        "A FLUX without guidance embedding is taken for Schnell, whose shift is 1: between loader "
        f"and sampler put {node}, or ModelSamplingAuraFlow with shift {shift:.4g}. Not "
        "ModelSamplingSD3: it feeds the network 1000 sigma in place of sigma."
    )


def _by_hand(levels: list[str], name: str) -> str:
    return (
        f"No scheduler of ComfyUI gives the trained {name}, {', '.join(levels)}: hand them to a "
        "custom sampler."
    )
