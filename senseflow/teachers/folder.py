"""What the JSON files of a teacher's pipeline folder say, and what a run asks of them.

Light: needs neither torch nor diffusers, so that a wrong folder is answered at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import read_json

if TYPE_CHECKING:
    import torch

    from senseflow.weights.lora_settings import LoraSettings

INDEX = "model_index.json"


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
    if "block_out_channels" not in config:
        raise ValueError(f"{file} is not an autoencoder's: it has no block_out_channels")
    return int(2 ** (len(config["block_out_channels"]) - 1))


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
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline folder: no {INDEX}")
    name = read_json(index).get("_class_name")
    if name != pipeline_class:
        raise ValueError(f"{folder} holds a {name}, this recipe distils a {pipeline_class}")
