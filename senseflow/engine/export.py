"""A student as a diffusers component folder, written tensor by tensor."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from senseflow.common.files import PARTIAL
from senseflow.engine.disk import HostGroup, empty_folder, publish, sync, writing
from senseflow.weights.card import StudentCard, write_card
from senseflow.weights.safetensors_writer import ALIGNMENT, write_safetensors
from senseflow.weights.stored import LORA_FILE

MAX_FILE_SIZE = "10GB"
FILE_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"

Describe = Callable[[Path], None]  # writes what else belongs into the folder


@dataclass(frozen=True)
class Layout:
    """Which tensors of a component, or of a LoRA for it, go into which file, in which order."""

    component: Any  # a ModelMixin on the meta device, for config.json; None: a LoRA, which has none
    dtype: torch.dtype
    files: dict[str, dict[str, Tensor]]  # file name -> key -> meta tensor
    index: dict[str, Any] | None = None  # of the files, when they are more than one
    names: Mapping[str, str] = field(default_factory=dict)  # of keys in the files, if others
    scale: float = 1.0  # of a LoRA's products B A; B is written times it

    @classmethod
    def of_lora(
        cls,
        tensors: dict[str, Tensor],
        dtype: torch.dtype,
        name: Callable[[str], str],
        scale: float = 1.0,
    ) -> "Layout":
        """One file of adapters, in the order of `tensors`, by key in the network.

        name: a key's in the file.
        """
        shapes = {key: value.to("meta", dtype) for key, value in tensors.items()}
        return cls(
            None, dtype, {LORA_FILE: shapes}, names={k: name(k) for k in shapes}, scale=scale
        )

    def written(self, key: str, tensor: Tensor) -> Tensor:
        """What is written of a tensor, before it is rounded.

        Readers of LoRA look for alpha in the header, in tensors, or nowhere, and then take alpha /
        rank for 1: so it is in B.
        """
        return tensor * self.scale if self.scale != 1 and ".lora_B." in key else tensor

    @classmethod
    def plan(
        cls, component: nn.Module, dtype: torch.dtype, max_file_size: str | int = MAX_FILE_SIZE
    ) -> "Layout":
        """Split as diffusers does; the order of keys is the component's own, but `aligned`."""
        tensors = {k: v.to("meta", dtype) for k, v in component.state_dict().items()}
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern=FILE_PATTERN, max_shard_size=max_file_size
        )
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files = {
            name: aligned({k: tensors[k] for k in ks})
            for name, ks in split.filename_to_tensors.items()
        }
        return cls(component, dtype, files, index if split.is_sharded else None)

    @property
    def keys(self) -> list[str]:
        """All keys of all files, in the order in which they are written."""
        return [key for tensors in self.files.values() for key in tensors]


def aligned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of odd sizes last: every other one then begins on a multiple of ALIGNMENT."""
    return dict(sorted(tensors.items(), key=lambda item: item[1].nbytes % ALIGNMENT > 0))


@dataclass(frozen=True)
class StudentExport:
    """What the folders of a run's student share."""

    layout: Layout
    card: StudentCard

    def describe(self, iteration: int, ema: float | None) -> Describe:
        """Writes the card of one iteration's student, or of its EMA with this decay."""
        card = dataclasses.replace(self.card, iteration=iteration, ema=ema)
        return lambda folder: write_card(folder, card)


def export_student(
    state: dict[str, Tensor], layout: Layout, folder: Path, host: HostGroup, describe: Describe
) -> None:
    """Write a sharded network as a diffusers component folder; appears whole or not at all.

    state: its tensors by key, sharded. One at a time is gathered in rank 0's host memory. Raises
    the same OSError on all ranks.
    """
    # Lazily: the next tensor is gathered when the one before it is on the disk.
    stream = (host.whole(layout.written(key, state[key]), layout.dtype) for key in layout.keys)

    def take() -> None:
        try:
            if host.is_main:
                write_component(folder, layout, stream, describe)
        finally:
            for _ in stream:  # rank 0 takes what the others send, also after an error
                pass

    host.on_all(take)


def write_component(
    folder: Path, layout: Layout, tensors: Iterator[Tensor | None], describe: Describe
) -> None:
    """Write a component folder from its tensors in the layout's order, whole or not at all."""
    with whole_folder(folder) as partial:
        fill_component(partial, layout, tensors)
        describe(partial)


def fill_component(folder: Path, layout: Layout, tensors: Iterator[Tensor | None]) -> None:
    """Write config.json and weights into a folder that is there."""
    if layout.component:
        layout.component.save_config(folder)
    for name, shapes in layout.files.items():
        named = {layout.names.get(key, key): like for key, like in shapes.items()}
        write_safetensors(folder / name, named, tensors)
    if layout.index:
        index = json.dumps(layout.index, indent=2, sort_keys=True) + "\n"
        (folder / f"{FILE_PATTERN.format(suffix='')}.index.json").write_text(index)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which then appears under this name whole, or not at all.

    An OSError inside says what could not be written.
    """
    partial = folder.with_name(f"{PARTIAL}_{folder.name}")
    with writing(folder):
        try:
            empty_folder(partial)
            yield partial
            for path in partial.rglob("*"):
                if not path.is_symlink():
                    sync(path)
            publish(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
