"""What a metric is, and what metrics share.

A metric is a file that ends in its `Spec`, here where it can be a reward and in
`senseflow/evaluate/metrics` where it cannot, and a line in `METRICS` there. From there
`evaluate score` has its flags, results and the table their columns, the published rows theirs. No
module that holds a spec imports torch or a model's library at its top, so that --help and the table
answer at once: what needs them is imported where the metric is prepared or opened.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from senseflow.common.fields import PathText, short
from senseflow.common.weights_files import DAMAGES, fault_of, words_of

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

T = TypeVar("T")

UP, DOWN = "\u2191", "\u2193"  # which way is better
LOCAL = "local-dir:"  # before a folder, where open_clip and timm take a name
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """How a metric is headed in the table, and its numbers written."""

    metric: str  # as results name it
    title: str
    better: str = UP
    digits: int = 4  # behind the point


@dataclass(frozen=True)
class Flag(Generic[T]):
    """A flag of `evaluate score` that metrics read; several metrics may share one.

    Pixels are 0 where there is to be no resizing.
    """

    name: str  # with its dashes
    kind: Literal["file", "folder", "pixels", "text"]
    help: str
    default: T | None = None
    required: bool = False  # by every metric that has it
    choices: tuple[str, ...] | None = None

    def check(self, value: Any) -> None:
        """Raise ValueError for a path that is not there."""
        if self.kind == "file" and value and not value.is_file():
            raise ValueError(f"{self.name} {value} is not a file")
        if self.kind == "folder" and value and not value.is_dir():
            raise ValueError(f"{self.name} {value} is not a folder")
        if self.kind == "text" and value and (refusal := PathText().refusal(value)):  # local-dir:
            raise ValueError(f"{self.name} {short(value)} {refusal}")


@dataclass(frozen=True)
class Given:
    """What flags were given, by their names; the others have their defaults."""

    values: Mapping[str, Any]

    def __getitem__(self, flag: Flag[T]) -> T:
        return cast(T, self.values.get(flag.name, flag.default))


@dataclass(frozen=True)
class Machine:
    """Where and in which type a model runs."""

    device: "torch.device"
    dtype: "torch.dtype"


@dataclass(frozen=True)
class Reads:
    """What a text encoder reads of a prompt."""

    most: int  # tokens, those of begin and end among them
    is_cut: Callable[[list[str]], list[bool]]  # of which prompts that is not all

    def notes(self, prompts: list[str]) -> list[str]:
        """How many prompts are judged without their ends, where any is."""
        num = sum(self.is_cut(prompts))
        if not num:
            return []
        return [
            f"{num} of {len(prompts)} prompts are longer than the {self.most} tokens that this "
            "model reads: it does not judge their ends"
        ]


def reads_of(tokenizer: Any, most: int) -> Reads:
    """What is read of the tokens of a tokenizer of transformers."""

    def is_cut(prompts: list[str]) -> list[bool]:
        return [len(ids) > most for ids in tokenizer(prompts, verbose=False)["input_ids"]]

    return Reads(most, is_cut)


@dataclass(frozen=True)
class Judge:
    """A model that is ready, and what it makes of images (B, ...) and their prompts.

    judge gives what the metric's `needs` ask for: "reference": features (B, D), for the distance
    between two sets of them; "prompts": a score per image (B,); "seeds": distances between every
    two of one prompt's images (P,).
    """

    preprocessing: str
    load: "Callable[[Image.Image], Tensor]"  # a decoded image -> what the model takes, on the CPU
    judge: "Callable[[Tensor, list[str]], Tensor]"
    reads: Reads | None = None  # of one that reads prompts
    # Images (B, 3, H, W) in [0, 1] -> what the model takes, with their gradient: of a reward.
    tensors: "Callable[[Tensor], Tensor] | None" = None
    network: "nn.Module | None" = None  # all that it holds, frozen: of a reward


@dataclass(frozen=True)
class Prepared:
    """A metric with its flags, before its model is loaded: all that its value depends on."""

    model: str  # in words
    weights: list[Path]
    settings: dict[str, Any]
    open: Callable[[Machine], Judge]


@dataclass(frozen=True)
class Spec:
    """A metric, whole.

    needs: what there must be besides the images: those of a reference (the metric is a distance),
    their prompts (a mean over images), or several images of each prompt (a diversity).
    prepare: raises ValueError for flags or files that it cannot do with; loads no model.
    """

    column: Column
    about: str  # in docs/evaluation_metrics.md and --help
    needs: Literal["reference", "prompts", "seeds"]
    prepare: Callable[[Given], Prepared]
    flags: tuple[Flag[Any], ...] = ()
    float32: bool = False  # whatever --dtype says
    published: Column | None = None  # of published values that do not say which version they are of

    @property
    def name(self) -> str:
        """What `--metrics` and results call it."""
        return self.column.metric


def weights_in(folder: Path, *patterns: str) -> list[Path]:
    """A folder's weights, whole or in shards: the files of the first pattern that has any."""
    found = (sorted(folder.glob(pattern)) for pattern in patterns)
    return next((files for files in found if files), [])


# What several metrics do with a picture


def centre_crop(picture: "Image.Image", side: int) -> "Image.Image":
    """The square of `side` pixels at the centre; half a pixel goes to the even side."""
    left, top = (round((length - side) / 2) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def square(picture: "Image.Image", side: int | None) -> "Image.Image":
    """The square at the centre, brought to `side` pixels with LANCZOS; None: left at its size."""
    from PIL.Image import Resampling

    cropped = centre_crop(picture, min(picture.size))
    return cropped.resize((side, side), Resampling.LANCZOS) if side else cropped


def square_in_words(side: int | None) -> str:
    """What `square` does, for the results."""
    return f"centre square{f', LANCZOS to {side}' if side else ''}"


def cosine_distances(embeddings: "Tensor") -> "Tensor":
    """1 - cos of every two of (S, D), in the order of itertools.combinations."""
    wide = embeddings.double()
    units = wide / wide.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    first, second = zip(*combinations(range(len(units)), 2), strict=True)
    distances: Tensor = 1 - (units[list(first)] * units[list(second)]).sum(-1)
    return distances


# Files of weights: read as tensors only, and wrong ones named


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """A library's error about a file of weights or a config becomes one line that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (*DAMAGES, SafetensorError) as error:
        known = fault_of(Path(source)) if Path(source).is_file() else None
        other = f"cannot be loaded, it is damaged or of another kind: {words_of(error)}"
        raise ValueError(f"{source} {known or other}") from error


def digest_of(folder: Path, names: Iterable[str]) -> str:
    """The beginning of a sha256 of those small files of a folder that are there, and their names.

    Configs, processors and tokenizers change a value as weights do.
    """
    digest = hashlib.sha256()
    for file in (folder / name for name in names):
        if file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def read_tensors(file: Path) -> "dict[str, Tensor]":
    """The tensors of a .safetensors, or of a .pth/.pt/.bin, bare or under 'state_dict'.

    Raises ValueError naming a file that holds anything else; no code in it is run.
    """
    import safetensors.torch
    import torch

    with reading(file):
        state: Any
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{file} is not a table of weights by name")
    return state


def fill(
    load: Callable[[], Any],
    network: "nn.Module",
    file: Path,
    wanted: str,
    spare: str | tuple[str, ...] = " ",
) -> None:
    """Load weights without strictness by `load`, then raise ValueError unless all fitted.

    load: returns torch's missing and unexpected keys. spare: how keys begin that may be left over.
    """
    try:
        missing, unexpected = load()
    except RuntimeError as error:
        misfits = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        reason = misfits[0].rstrip(".") if misfits else str(error).splitlines()[0]
        raise ValueError(
            f"{file} holds weights of another model than {wanted}: {reason}"
        ) from error
    unexpected = [key for key in unexpected if not key.startswith(spare)]
    if missing or unexpected:
        raise ValueError(
            f"{file} holds weights of another model than {wanted}: of its "
            f"{len(network.state_dict())} keys {_such(missing)} missing, and {_such(unexpected)} "
            "not part of it"
        )


def _such(keys: list[str]) -> str:
    return f"{len(keys)} (such as {sorted(keys)[0]}) are" if keys else "none are"
