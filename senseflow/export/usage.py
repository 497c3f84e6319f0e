"""The script by which stock diffusers draws with a shipped student."""

import json
from typing import Any

from senseflow.export.source import Source
from senseflow.teachers.family import StockSampling

DEVICE = '"cuda" if torch.cuda.is_available() else "cpu"'


def usage(source: Source, form: str, place: str, base: str | None, prompt: str) -> str:
    """The section of the card with the script, none for a file that ComfyUI reads.

    place, base, prompt: see `snippet`; base None: a folder of that teacher's name.
    """
    if form == "comfyui":
        return (
            "## Usage\n\nThe file is for ComfyUI, see below. For diffusers, export with `--form "
            "pipeline`."
        )
    script = snippet(source, form, place, base or f"/path/to/{source.card.base_name}", prompt)
    where = "" if "/" in place else f"`{place}` is this folder, with its path. "
    return f"## Usage\n\n```python\n{script}```\n\n{where}{_seeds(source)}"


def snippet(source: Source, form: str, place: str, base: str, prompt: str) -> str:
    """At most ten lines that need torch and diffusers alone.

    place: the folder, or the repository of the Hub, that holds the student; base: its teacher;
    prompt: what is drawn.
    """
    family, stock = source.family, source.stock
    kind, dtype = family.pipeline_class, str(source.layout.dtype)
    names, lines = [kind], []
    if form == "pipeline":
        lines.append(f'pipe = {kind}.from_pretrained("{place}", dtype={dtype})')
    elif source.is_lora:
        lines.append(f'pipe = {kind}.from_pretrained("{base}", dtype={dtype})')
        lines.append(f'pipe.load_lora_weights("{place}")')
    else:
        network, part = family.network_class, family.component
        names.append(network)
        lines.append(f'{part} = {network}.from_pretrained("{place}", dtype={dtype})')
        given = f"{part}={part}, dtype={dtype}"
        lines.append(f'pipe = {kind}.from_pretrained("{base}", {given})')
    if form != "pipeline":
        names.append(stock.scheduler)
        lines += _scheduler_lines(stock)
    lines += [
        f"pipe.to({DEVICE})",
        "torch.manual_seed(0)",
        f"call = dict({arguments(call_of(source))})",
        f'pipe({json.dumps(prompt, ensure_ascii=False)}, **call).images[0].save("image.png")',
    ]
    imports = ["import torch", f"from diffusers import {', '.join(sorted(names))}", ""]
    return "\n".join([*imports, *lines]) + "\n"


def _scheduler_lines(stock: StockSampling) -> list[str]:
    changes = {key: value for key, value in stock.changes.items() if value is not None}
    name = stock.scheduler
    return [
        f"steps = dict({arguments(changes)})",
        f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, **steps)",
    ]


def call_of(source: Source) -> dict[str, Any]:
    """The arguments of the pipeline's call besides the prompt, at the size trained at."""
    card, stock = source.card, source.stock
    guidance = stock.guidance if source.guidance is None else source.guidance
    call = {"height": card.height, "width": card.width, **stock.levels, "guidance_scale": guidance}
    if card.max_sequence_length is not None:
        call["max_sequence_length"] = card.max_sequence_length
    return call


def arguments(values: dict[str, Any]) -> str:
    """As a call's arguments are typed."""
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _seeds(source: Source) -> str:
    """What fixes an image."""
    at = "Other heights and widths are drawn at the same noise levels."
    if source.family.component == "unet":
        return f"{at} A seed fixes an image; `generator=` does so too, one per image."
    return (
        f"{at} A seed fixes an image if it is set before each call: noise is drawn at every step, "
        f"from torch's own generator, since {source.family.pipeline_class} does not hand "
        "`generator=` to its scheduler."
    )
