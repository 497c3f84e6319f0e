"""Which cache a run may use: what its parts must be made with, and that they hold what is needed.

The command that makes one is `senseflow.cache`.
"""

import hashlib
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from senseflow.config.config import Config
from senseflow.config.sections import PathsConfig
from senseflow.data.cache_index import KEY_DTYPE, Part, differences, key_of, keys_of, read_index
from senseflow.data.cached import Cache, Rows
from senseflow.data.items import Samples
from senseflow.data.json_images import JsonImages
from senseflow.teachers.family import Family
from senseflow.teachers.folder import encoder_classes
from senseflow.weights.fingerprint import base_fingerprint, fingerprint, stored_weights

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch")
SETTINGS = (".json", ".txt", ".model", ".jinja")  # files that say how weights and tokens are read
COMMAND = "`python -m senseflow.cache CONFIG --output {}` with this run's CONFIG and overrides"


def versions() -> dict[str, str]:
    """The versions of the libraries that encode."""
    return {name: version(name) for name in LIBRARIES}


# ------------------------------------------------------------------------- what a part is made with


def facts_of(name: str, config: Config, family: Family) -> dict[str, Any]:
    """What the rows of a part depend on; None for weights that are not there (any longer)."""
    folder = Path(config.paths.pretrained_model)
    if name == "prompts":
        return prompt_facts(config, family, folder)
    if name == "clip":
        return clip_facts(config.paths)
    return {
        **component_facts(folder, "vae"),
        "train.resolution": list(config.train.resolution),
        "data.crop": config.data.crop,
        "precision.vae": config.precision.vae,
    }


def prompt_facts(config: Config, family: Family, folder: Path) -> dict[str, Any]:
    """What prompt_embeds and pooled depend on: text encoders, tokenizers, length, type, and how a
    language model is asked."""
    names = [name for name, kind in encoder_classes(folder).items() if kind]
    facts: dict[str, Any] = {"family": family.name}
    for name in names:
        facts |= component_facts(folder, name)
        tokenizer = name.replace("text_encoder", "tokenizer")
        facts[tokenizer] = settings_digest(folder / tokenizer)
    length = config.data.max_sequence_length
    chat = (
        {f"chat: {key}": value for key, value in family.chat.facts.items()} if family.chat else {}
    )
    return {
        **facts,
        **chat,
        "data.max_sequence_length": length,
        "precision.compute": config.precision.compute,
    }


def clip_facts(paths: PathsConfig) -> dict[str, Any]:
    """What the discriminator's features of prompts depend on: its text tower."""
    facts: dict[str, Any] = {"paths.clip_quick_gelu": str(paths.clip_quick_gelu)}
    local = paths.clip.removeprefix("local-dir:")
    if local != paths.clip:
        return {"paths.clip": "local-dir", **component_facts(Path(local), ""), **facts}
    weights = paths.clip_weights
    if weights and "/" in weights:
        held = Path(weights).is_file()
        weights = fingerprint([Path(weights)]) if held else None
    return {"paths.clip": paths.clip, "paths.clip_weights": weights, **facts}


def component_facts(folder: Path, name: str) -> dict[str, Any]:
    """The weights and the settings of one folder of a pipeline ("": of a folder of its own)."""
    name, folder = name or "paths.clip", folder / name
    return {
        f"{name}'s weights": base_fingerprint(folder) if stored_weights(folder) else None,
        f"{name}'s settings": settings_digest(folder),
    }


def settings_digest(folder: Path) -> str | None:
    """A sha256 of the names and contents of a folder's small files; None without any."""
    files = sorted(file for file in folder.glob("*") if file.suffix in SETTINGS)
    digest = hashlib.sha256()
    for file in files:
        if not file.name.endswith(".index.json"):  # the weights' own
            digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest() if files else None


# ------------------------------------------------------------------------------ what a run reads


def wanted_keys(name: str, config: Config, family: Family, data: Samples) -> np.ndarray:
    """The keys (N,) of the rows that a data set needs of a part, each once."""
    if name == "latents":
        assert isinstance(data, JsonImages)
        pairs = zip(data.paths, data.prompts, strict=True)
        return np.array(list(dict.fromkeys(key_of(*pair) for pair in pairs)), KEY_DTYPE)
    # The null prompt too: CFG needs its encoding, and no encoder will be there to make it.
    null = family.null_prompt_of(Path(config.paths.pretrained_model))
    needed = [] if name == "clip" or null is None else [null]
    return keys_of([*needed, *data.all_prompts()])


def read_cache(config: Config, family: Family, data: Samples) -> Cache:
    """What of `paths.cache` a run reads: all parts that its data and its adversary can use.

    Raises ValueError, naming what differs and the command that mends it, for a cache of other
    encoders, settings or samples, one that is not finished, or a damaged file.
    """
    if config.paths.cache is None:
        return Cache()
    folder = Path(config.paths.cache)
    parts = read_index(folder)
    if "prompts" in parts and config.adversarial.in_use == "vfm" and "clip" not in parts:
        raise ValueError(
            f"paths.cache {folder} has no CLIP features, which adversarial.kind vfm needs; "
            f"complete it: {COMMAND.format(folder)}"
        )
    used = {name: part for name, part in parts.items() if _is_used(name, parts, config, data)}
    if not used:
        raise ValueError(
            f"paths.cache {folder} holds nothing for this run: {COMMAND.format(folder)}"
        )
    rows = {name: checked(folder, name, part, config, family, data) for name, part in used.items()}
    clip = rows.get("clip")
    text_dim = None if clip is None else clip.fields["text"].shape[0]
    return Cache(rows.get("prompts"), clip, rows.get("latents"), text_dim)


def _is_used(name: str, parts: dict[str, Part], config: Config, data: Samples) -> bool:
    if name == "clip":
        return "prompts" in parts and config.adversarial.in_use == "vfm"
    return name == "prompts" or isinstance(data, JsonImages)


def checked(
    folder: Path, name: str, part: Part, config: Config, family: Family, data: Samples
) -> Rows:
    """A part of a cache, if it is made with what this run has and holds all that it needs."""
    if differing := differences(part.made_with, facts_of(name, config, family)):
        raise ValueError(
            f"paths.cache {folder} ({name}) is of another run: {'; '.join(differing)}. Make one in "
            f"another DIR: {COMMAND.format('DIR')}"
        )
    rows, keys = Rows(folder, part), wanted_keys(name, config, family, data)
    places = rows.places(keys)
    what = "images" if name == "latents" else "prompts"
    if num := int((places < 0).sum()):
        raise ValueError(
            f"paths.cache {folder} ({name}) lacks {num} of the {len(keys)} {what} of "
            f"{config.paths.dataset}; complete it: {COMMAND.format(folder)}"
        )
    needed = [part.shards[number] for number in np.unique(rows.shards(places))]
    if faults := [fault for shard in needed if (fault := part.fault(folder, shard))]:
        raise ValueError(
            f"paths.cache: {faults[0]} ({len(faults)} of {len(needed)} files of {name} are not "
            f"whole); complete it: {COMMAND.format(folder)}"
        )
    return rows


def warn_of_versions(config: Config) -> None:
    """Say which libraries have moved since a cache was made; their numbers may differ a little."""
    if config.paths.cache is None:
        return
    now = versions()
    for name, part in read_index(Path(config.paths.cache)).items():
        if differing := differences(part.versions, now):
            logger.warning("paths.cache (%s): %s", name, "; ".join(differing))
