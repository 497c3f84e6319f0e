"""A student's folders: its component, a whole pipeline, one file in diffusers' names or in those of
the teacher's authors, a LoRA."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers

from senseflow.common.files import read_json, require_room
from senseflow.engine.export import fill_component
from senseflow.export.source import Source, fused, in_original_names
from senseflow.weights.card import write_card
from senseflow.weights.stored import component_file, component_files, open_safetensors, plain_name

SCHEDULER = "scheduler"
WEIGHTS = (".safetensors", ".bin")
OTHER_WEIGHTS = (".onnx", ".onnx_data", ".xml", ".msgpack", ".h5", ".ckpt", ".pt", ".pth")


def fill(form: str, partial: Path, source: Source, name: str, link: bool) -> None:
    """Write a student into an empty folder in one of the forms.

    name: of the finished folder, and of a single file. link: the teacher's files as links.
    Raises ValueError for a form that this student has not.
    """
    if form in ("pipeline", "comfyui", "original"):
        source = fused(source)
    if form == "original":
        source = in_original_names(source)
    tensors = [like for shapes in source.layout.files.values() for like in shapes.values()]
    copied = [] if link or form != "pipeline" else [source.base / part for part in parts_of(source)]
    others = sum(file.stat().st_size for part in copied for file in files_of(part))
    require_room("--output", partial.parent, sum(like.nbytes for like in tensors) + others)
    if form == "pipeline":
        fill_pipeline(partial, source, link)
    elif form in ("comfyui", "original"):
        fill_single_file(partial, source, name)
    else:
        fill_component(partial, source.layout, source.tensors())
        write_card(partial, source.card)


def parts_of(source: Source) -> list[str]:
    """What of the teacher's pipeline stands beside the student, by the names in its index; raises
    ValueError for one that is not there."""
    index = read_json(source.base / "model_index.json")
    named = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
    parts = [name for name in named if name not in (source.family.component, SCHEDULER)]
    for part in parts:
        if not (source.base / part).is_dir():
            raise ValueError(f"the teacher's {source.base / part} is not there")
    return parts


def fill_pipeline(partial: Path, source: Source, link: bool) -> None:
    """The student, the teacher's other parts beside it, and the scheduler that samples it."""
    component, base = source.family.component, source.base
    index, parts = read_json(base / "model_index.json"), parts_of(source)
    (partial / component).mkdir()
    fill_component(partial / component, source.layout, source.tensors())
    write_card(partial / component, source.card)
    for part in parts:
        copy_part(base / part, partial / part, link)
    # the teacher's noise schedule, and the steps that sample at the student's anchors
    stock, scheduler = source.stock, getattr(diffusers, source.stock.scheduler)
    fields = source.family.schedule(base) | stock.changes
    scheduler(**fields).save_pretrained(partial / SCHEDULER)
    changes = {
        component: ["diffusers", source.family.network_class],
        SCHEDULER: ["diffusers", stock.scheduler],
        "_diffusers_version": diffusers.__version__,
    }
    kept = {key: value for key, value in index.items() if key != "_name_or_path"}
    text = json.dumps({**kept, **changes}, indent=2, sort_keys=True) + "\n"
    (partial / "model_index.json").write_text(text)


def copy_part(part: Path, to: Path, link: bool) -> None:
    """A teacher's text encoder, tokenizer or VAE: the files diffusers reads, or links to them.

    Raises ValueError for a damaged one.
    """
    for file, name in files_of(part).items():
        if file.suffix == ".safetensors":
            open_safetensors(file)  # its header and size
        place = to / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if link:
            place.symlink_to(file.resolve())
        else:
            shutil.copyfile(file, place)  # what a link of a cache stands for, in a stream


def files_of(part: Path) -> dict[Path, Path]:
    """A part's files and their names in a copy, without weights that are not read.

    A variant that stands alone, such as fp16, loses its mark: diffusers does not look for it.
    """
    files = sorted(Path(at) / name for at, _, names in os.walk(part) for name in names)
    kept = [f for f in files if not f.name.startswith(".") and not is_weights(f)]
    names = {file: file.relative_to(part) for file in kept}
    if any(file.suffix in WEIGHTS for file in files):
        stands = component_file(part)
        names |= {file: Path(file.name) for file in component_files(part)}
        names[stands] = Path(plain_name(stands.name))
    return names


def is_weights(file: Path) -> bool:
    """Weights in any format, or the index of their shards."""
    return file.suffix in (*WEIGHTS, *OTHER_WEIGHTS) or ".index." in file.name


def fill_single_file(partial: Path, source: Source, name: str) -> None:
    """All tensors in one file, by the names they have in the source, whatever its size."""
    tensors = {key: like for shapes in source.layout.files.values() for key, like in shapes.items()}
    layout = replace(
        source.layout, component=None, files={f"{name}.safetensors": tensors}, index=None
    )
    fill_component(partial, layout, source.tensors())
    write_card(partial, source.card)
