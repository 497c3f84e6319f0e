"""What the JSON files of a teacher's pipeline folder say, and what a run asks of them.

Light: needs neither torch nor diffusers, so that a wrong folder is answered at once.
"""

import codecs
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import read_json
from senseflow.common.hub_names import in_cache, said_missing

if TYPE_CHECKING:
    import torch

    from senseflow.weights.lora_settings import LoraSettings

INDEX = "model_index.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class TeacherSettings:
    """What the configuration of a run tells a family of its teacher and student."""

    folder: Path  # the teacher's diffusers pipeline
    resolution: tuple[int, int]  # height, width in pixels
    max_sequence_length: int | None  # tokens of a prompt
    shift: float | None  # of the anchors' times; None: the scheduler's own
    compute_dtype: "torch.dtype"
    vae_dtype: "torch.dtype"
    student_config: Path | None = None  # config.json of the student; None: the teacher's
    linked: Path | None = None  # folder with links to the teacher's weights (FLUX)
    fold_guidance: float | None = None  # FLUX
    guidance: float | None = None  # FLUX: the constant fed to a LoRA student's embedding
    lora: "LoraSettings | None" = None  # None: student and fake score are networks of their own


def name_of(folder: Path) -> str:
    """What a teacher's folder is called: its own name, or that of what it is a part of, where its
    own says nothing: the Hub's cache names folders by commits, others say `pipeline`."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.parent.name if folder.name == "pipeline" else folder.name


def base_config(base: Path, part: str) -> dict[str, Any]:
    """config.json of a base's part, {} without one."""
    file = base / part / "config.json"
    return read_json(file) if file.is_file() else {}


def scheduler_config(folder: Path, **defaults: Any) -> dict[str, Any]:
    """The scheduler's config of a pipeline folder; `defaults`: of its class, for keys not said."""
    return defaults | read_json(folder / "scheduler" / "scheduler_config.json")


def vae_factor(base: Path) -> int:
    """Pixels of one latent: 8 for all full-size bases."""
    file = base / "vae" / "config.json"
    config = read_json(file)
    levels = config.get("block_out_channels", config.get("dim_mult"))
    if levels is None:
        raise ValueError(f"{file} is not an autoencoder's: it has no block_out_channels")
    return int(2 ** (len(levels) - 1))


def latent_channels(base: Path) -> int:
    """Channels of a base's VAE's latents, which a VAE of videos calls z_dim."""
    config = read_json(base / "vae" / "config.json")
    return int(config.get("latent_channels", config.get("z_dim", 4)))


def encoder_classes(folder: Path) -> dict[str, str | None]:
    """The class of each text encoder in the model_index.json of a pipeline folder, by component.

    None: a component that this folder leaves out (SD3.5 without T5).
    """
    return {
        name: entry[1]
        for name, entry in read_json(folder / INDEX).items()
        if name.startswith("text_encoder")
    }


def stated_length(tokenizer: Path, most: int) -> int:
    """The tokens that a tokenizer states, at most `most`."""
    file = tokenizer / "tokenizer_config.json"
    stated = read_json(file).get("model_max_length") if file.is_file() else None
    return int(min(stated or most, most))


def require_pipeline(folder: Path, pipeline_class: str) -> None:
    """Raise ValueError unless `folder` is a diffusers pipeline of this class."""
    name = pipeline_class_of(folder, f"{folder} is not a diffusers pipeline folder")
    if name != pipeline_class:
        raise ValueError(f"{folder} holds a {name}, this recipe distils a {pipeline_class}")


def pipeline_class_of(folder: Path, wrong: str) -> str:
    """The class that the model_index.json of a pipeline folder names.

    wrong: how the ValueError begins for a path that is no such folder, or lacks its index.
    """
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{wrong}: {_what_it_is(folder)}")
    try:
        name = read_json(index).get("_class_name")
    except ValueError as error:
        raise ValueError(f"{wrong}: its {INDEX} names no pipeline ({error})") from error
    if not isinstance(name, str):
        raise ValueError(f"{wrong}: its {INDEX} names no pipeline")
    require_no_marks(folder)
    return name


def _what_it_is(path: Path) -> str:
    """What a path is that is no pipeline folder, and how to come by one."""
    if path.is_file():
        return (
            "it is a file; load it in diffusers (from_single_file) and name the folder that "
            "save_pretrained makes of it"
        )
    if held := in_cache(path):
        return f"it is a folder of the Hub's cache; the pipeline in it is {held}"
    if (path.parent / INDEX).is_file():
        return f"it is a part of one, {path.parent}"
    if path.is_dir():
        return f"no {INDEX} in it"
    return f"there is no such folder{said_missing(path).removeprefix('does not exist')}"


def require_no_marks(folder: Path) -> None:
    """Raise ValueError for a JSON file of a pipeline that begins with a byte order mark."""
    for file in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        if file.is_file():
            with file.open("rb") as stream:
                begins = stream.read(3)
            # An editor's doing: diffusers and transformers, here and elsewhere, cannot read it.
            if begins.startswith(MARKS):
                raise ValueError(
                    f"{file} begins with a byte order mark, which diffusers does not read: save it "
                    "as UTF-8 without one"
                )


def left_out(folder: Path) -> list[str]:
    """The components that the index of a pipeline folder says are null."""
    entries = read_json(folder / INDEX).items()
    return [name for name, entry in entries if isinstance(entry, list) and entry[:1] == [None]]


def require_vocabularies(folder: Path) -> None:
    """Raise ValueError for a pipeline folder that lacks a tokenizer of its index: transformers
    makes up one that knows no word."""
    absent = left_out(folder)
    for name in read_json(folder / INDEX):
        held = (folder / name / file for file in VOCABULARIES)
        if name.startswith("tokenizer") and name not in absent and not any(map(Path.is_file, held)):
            raise ValueError(f"{folder / name} holds no vocabulary ({', '.join(VOCABULARIES)})")


def require_components(folder: Path, optional: Collection[str]) -> None:
    """Raise ValueError for a pipeline whose index leaves out an encoder or a tokenizer that is
    needed, or one of such a pair; `optional`: those that may be left out."""
    parts = ("text_encoder", "tokenizer", "vae", "scheduler")
    missing = {name for name in left_out(folder) if name.startswith(parts)}
    if needed := sorted(missing - set(optional)):
        raise ValueError(f"{folder / INDEX} leaves out {', '.join(needed)}, which is needed")
    if missing and missing != set(optional):
        raise ValueError(
            f"{folder / INDEX} leaves out {', '.join(sorted(missing))}, and not "
            f"{', '.join(sorted(set(optional) - missing))}: it is both or neither"
        )
