"""CLIP models of open_clip from local files, for all metrics that embed images or texts."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.distill.scorers.metric import (
    LOCAL,
    TOKENIZER,
    Machine,
    Reads,
    digest_of,
    fill,
    read_tensors,
    reading,
    square,
    square_in_words,
    weights_in,
)

CONFIG = "open_clip_config.json"
NAMES = (  # of a download's files, the one in open_clip's own keys
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An open_clip architecture, by name or as `local-dir:FOLDER`, and the file of its weights."""

    name: str
    weights: Path
    quick_gelu: bool

    @property
    def model(self) -> str:
        """The architecture in words; of a folder its own name, wherever it lies."""
        local = self.name.startswith(LOCAL)
        name = "open_clip " + (LOCAL + Path(self.name).name if local else self.name)
        return name + ", quick GELU" if self.quick_gelu else name

    @property
    def settings(self) -> dict[str, Any]:
        """A folder's config, with its preprocessing, and tokenizer; a name says these itself."""
        if not self.name.startswith(LOCAL):
            return {}
        folder = Path(self.name.removeprefix(LOCAL))
        return {"config": digest_of(folder, [CONFIG, *TOKENIZER])}


def find_source(name: str, weights: Path | None, quick_gelu: bool | None, flag: str) -> Source:
    """Which file holds the weights of `name`; nothing is fetched.

    Raises ValueError for an unknown architecture, for no file, and where the activation that the
    weights were trained with must be said.
    """
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if not folder.is_dir():
            raise ValueError(f"{flag}_model {name}: there is no such folder")
        config = _read_config(folder)
        file = weights or _weights_in(folder, flag)
        return Source(name, file, bool(quick_gelu or config.get("quick_gelu", False)))
    if ":" in name or name not in open_clip.list_models():
        raise ValueError(
            f"{flag}_model {name} is neither an open_clip architecture nor local-dir:FOLDER; "
            "nothing is downloaded"
        )
    if weights is None:
        raise ValueError(
            f"{flag}_weights is missing: a local file with the weights of {name} (nothing is "
            "downloaded)"
        )
    if quick_gelu is None:
        if f"{name}-quickgelu" in open_clip.list_models():
            raise ValueError(
                f"{name} exists with GELU and quick GELU: say {flag}_quick_gelu true for OpenAI's "
                "weights and those of models named *-quickgelu, false for LAION's"
            )
        quick_gelu = False
    return Source(name, weights, quick_gelu)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG).get("model_cfg")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is not a config of open_clip: it has no 'model_cfg'")
    return config


def _weights_in(folder: Path, flag: str) -> Path:
    found = weights_in(folder, *NAMES) or [
        f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".pt")
    ]
    if len(found) != 1:
        raise ValueError(
            f"{folder} holds {len(found)} files that may be the weights: say {flag}_weights FILE"
        )
    return found[0]


def architecture(source: Source, device: str = "cpu") -> Any:
    """The network of a source, random; raises ValueError for one that cannot be built."""
    with reading(source.name), _quiet(), torch.device(device):
        return open_clip.create_model(
            source.name, load_weights=False, force_quick_gelu=source.quick_gelu, device=device
        )


class Clip:
    """Unit embeddings of images and texts, float32, from open_clip."""

    def __init__(self, source: Source, machine: Machine) -> None:
        state = read_tensors(source.weights)
        model = architecture(source)
        _check_positions(model, state, source)
        file = str(source.weights)
        fill(
            lambda: open_clip.load_checkpoint(model, file, strict=False),
            model, source.weights, source.model,
        )  # fmt: skip
        self.model = model.to(machine.device, machine.dtype).eval().requires_grad_(False)
        self.machine = machine
        self.tokenizer = open_clip.get_tokenizer(source.name)
        self.config = PreprocessCfg(**model.visual.preprocess_cfg)
        self.transform = image_transform_v2(self.config, is_train=False)

    def on_squares(self, side: int | None) -> tuple[str, Callable[[Image.Image], Tensor]]:
        """In words and as a function: the model's preprocessing of `square(picture, side)`."""
        return (
            f"{square_in_words(side)}, {in_words(self.config)}",
            lambda picture: self.transform(square(picture, side)),
        )

    def images(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, D), float32, of preprocessed pixels (B, 3, H, W)."""
        pixels = pixels.to(self.machine.device, self.machine.dtype)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (B, D), float32, of B texts."""
        tokens = self.tokenizer(texts).to(self.machine.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def reads(self, prefix: str = "") -> Reads:
        """What the tokenizer leaves of prompts behind a prefix."""
        most = self.tokenizer.context_length

        def is_cut(prompts: list[str]) -> list[bool]:
            # With room for a token more, that one is not the padding after a text.
            tokens = self.tokenizer(["", *(prefix + prompt for prompt in prompts)], most + 1)
            padding, *last = tokens[:, -1].tolist()
            return [token != padding for token in last]

        return Reads(most, is_cut)

    def cosines(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """(B,) cosine of each image and its text."""
        return (self.images(pixels) * self.texts(texts)).sum(-1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that the model is random: its weights come next."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_positions(model: nn.Module, state: dict[str, Tensor], source: Source) -> None:
    """Raise ValueError for weights of another image or text size, which open_clip would resize."""
    own = model.state_dict()
    for key in ("visual.positional_embedding", "positional_embedding"):
        if key in own and key in state and own[key].shape != state[key].shape:
            raise ValueError(
                f"{source.weights} holds weights of another model than {source.model}: {key} is "
                f"{list(state[key].shape)}, not {list(own[key].shape)}"
            )


def in_words(config: PreprocessCfg) -> str:
    """A model's preprocessing in words."""
    return (
        f"{config.interpolation} to {config.size} ({config.resize_mode} side), "
        + ("zero padding" if config.resize_mode == "longest" else "centre crop")
        + f", mean {_digits(config.mean)}, std {_digits(config.std)}"
    )


def _digits(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
