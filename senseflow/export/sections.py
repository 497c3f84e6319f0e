"""What a model card says of one student's sampling: its call, its guidance, ComfyUI's node."""

from typing import Any

from senseflow.export.source import Source


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
    """`key=value` for each keyword argument of a call in Python; those that are None are left
    out."""
    return [f"{key}={value!r}" for key, value in values.items() if value is not None]


def guidance_of(source: Source) -> str:
    """Which guidance the student draws with."""
    if source.guidance is not None:
        return f"{source.guidance:g}, fed to the network's guidance embedding"
    if source.family.embeds_guidance:
        return "none: the network has no guidance embedding, so `guidance_scale` changes nothing"
    off = source.stock.guidance
    return f"none: `guidance_scale={off:g}` leaves out the unconditional half"


def shift_node(source: Source) -> str:
    """The node between ComfyUI's loader and sampler by which it draws at the trained levels."""
    family, anchors = source.family, source.card.anchors
    return family.comfyui(anchors, source.guidance) or (
        f"No scheduler of ComfyUI gives the trained {family.levels.name}, "
        f"{', '.join(f'{a:.4g}' for a in anchors)}: hand them to a custom sampler."
    )
