"""What `senseflow.data.convert` does: images or DMD2's shards to an LMDB of latents.

A source yields its samples in chunks, in a fixed order, from any chunk's end on. A row depends on
the settings and on its place in the source alone (and on the batch size, by rounding), so that an
interrupted conversion that goes on ends with the same rows.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from senseflow.common.devices import find_device
from senseflow.common.tables import text_fault
from senseflow.core.draws import Draws
from senseflow.data.ahead import in_groups
from senseflow.data.convert.dmd2_shards import read_shard
from senseflow.data.convert.latents_writer import Chunk, LatentsWriter
from senseflow.data.image_lists import read_lists, resolve, said
from senseflow.data.items import UnreadableItem
from senseflow.data.json_images import read_image
from senseflow.data.latents_lmdb import DTYPE, LatentsScaling, read_vae_config
from senseflow.data.make.captioned import NO_IMAGE, Columns, from_folder
from senseflow.weights.filling import whole
from senseflow.weights.meta import component

logger = logging.getLogger(__name__)

SHARD_ROWS = 256  # rows per commit

Posterior = Literal["sample", "mode"]


# ------------------------------------------------------------------------------- DMD2's shards


@dataclass(frozen=True)
class Shards:
    """Latents in .pt files, in the order of their names, as DMD2 reads them."""

    files: list[Path]
    scaling: LatentsScaling | None = None
    channels: int | None = None  # of the VAE, if one is named
    num = None

    @classmethod
    def open(cls, files: list[Path], vae: Path | None) -> "Shards":
        """Shards and the diffusers VAE folder they are said to be of."""
        if vae is None:
            return cls(files)
        return cls(files, LatentsScaling.of_vae(vae), read_vae_config(vae)["latent_channels"])

    def settings(self) -> dict[str, Any]:
        """What the result depends on: the files' names and sizes, and the VAE of their scaling."""
        files = [[file.name, file.stat().st_size] for file in self.files]
        sha256 = self.scaling.vae_sha256 if self.scaling else None
        return {"source": "shards", "files": _digest(files), "vae_sha256": sha256}

    def chunks(self, start: list[int]) -> Iterator[Chunk]:
        """The usable rows of the shards from `start` = [shard, row] on, in order."""
        first, row = start or [0, 0]
        for number in range(first, len(self.files)):
            logger.info("shard %d of %d: %s", number + 1, len(self.files), self.files[number])
            latents, prompts = read_shard(self.files[number])
            if self.channels is not None and latents.shape[1] != self.channels:
                raise ValueError(
                    f"{self.files[number]} holds latents {list(latents.shape[1:])}, the teacher's "
                    f"VAE has {self.channels} channels"
                )
            while row < len(prompts):
                end = min(row + SHARD_ROWS, len(prompts))
                names = [f"{self.files[number]}: row {i}" for i in range(row, end)]
                following = [number, end] if end < len(prompts) else [number + 1, 0]
                yield usable_chunk(latents[row:end], prompts[row:end], names, [], following)
                row = end
            row = 0


# -------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Encoder:
    """Images to scaled latents; the posterior's noise is a function of seed and sample."""

    vae: AutoencoderKL
    scaling: LatentsScaling
    posterior: Posterior
    seed: int

    @classmethod
    def load(
        cls, folder: Path, posterior: Posterior, seed: int, dtype: str, device: str | None
    ) -> "Encoder":
        """A diffusers VAE folder; raises ValueError when it is none or damaged.

        dtype: torch's name. device: torch's name; None: cuda if there is one.
        """
        place = find_device(device, dtype)
        scaling = LatentsScaling.of_vae(folder)
        vae = whole(component(folder, getattr(torch, dtype), AutoencoderKL), place)
        return cls(cast(AutoencoderKL, vae), scaling, posterior, seed)

    @torch.no_grad()
    def __call__(self, images: Tensor, places: list[int]) -> np.ndarray:
        """(b, 3, H, W) in [-1, 1] to (b, C, h, w) float32; places: of the samples in the source."""
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if self.posterior == "sample":
            eps = Draws(self.seed, 0, tuple(places)).normal("posterior", tuple(latents.shape[1:]))
            latents = latents + posterior.std.float() * eps.to(latents.device)
        return self.scaling.apply(latents).cpu().numpy()

    def settings(self) -> dict[str, Any]:
        """What the latents depend on besides the images."""
        return {
            "vae_sha256": self.scaling.vae_sha256,
            "scaling_factor": self.scaling.factor,
            "shift_factor": self.scaling.shift,
            "posterior": self.posterior,
            "seed": self.seed if self.posterior == "sample" else None,
            "dtype": str(self.vae.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Picture:
    """An image file and its prompt."""

    path: Path
    prompt: str
    name: list[str]  # what identifies it, whatever folder it is in
    fault: str | None = None  # why it is passed over, without a look at the image


@dataclass(frozen=True)
class Pictures:
    """Images, resized to cover the resolution and cropped in the middle, through the VAE."""

    pictures: list[Picture]
    encoder: Encoder
    resolution: tuple[int, int]
    batch_size: int
    num_workers: int

    @property
    def num(self) -> int:
        """How many pictures there are."""
        return len(self.pictures)

    @property
    def scaling(self) -> LatentsScaling:
        """What brings the encoder's latents to those the diffusion model sees."""
        return self.encoder.scaling

    def settings(self) -> dict[str, Any]:
        """What the result depends on: names of the files, their size in pixels, the encoder."""
        return {
            "source": "images",
            "files": _digest([picture.name for picture in self.pictures]),
            "resolution": list(self.resolution),
            **self.encoder.settings(),
        }

    def chunks(self, start: list[int]) -> Iterator[Chunk]:
        """Latents of the pictures from `start` = [place] on, in order, read ahead by threads."""
        begins = range((start or [0])[0], self.num, self.batch_size)
        groups = [range(begin, min(begin + self.batch_size, self.num)) for begin in begins]
        for places, reads in in_groups(self._read, groups, self.num_workers):
            yield self._encode(list(places), reads)

    def _read(self, place: int) -> tuple[Tensor, str] | UnreadableItem:
        picture = self.pictures[place]
        if picture.fault:
            return UnreadableItem(str(picture.path), picture.fault)
        try:
            return read_image(picture.path, self.resolution, (0.5, 0.5)), picture.prompt
        except UnreadableItem as error:
            return error

    def _encode(self, places: list[int], reads: list[tuple[Tensor, str] | UnreadableItem]) -> Chunk:
        found = list(zip(places, reads, strict=True))
        skipped = [(r.source, r.reason) for _, r in found if isinstance(r, UnreadableItem)]
        whole = [(place, *r) for place, r in found if not isinstance(r, UnreadableItem)]
        following = [places[-1] + 1]
        if not whole:
            return Chunk(np.empty((0, 0, 0, 0), DTYPE), [], skipped, following)
        latents = self.encoder(torch.stack([r[1] for r in whole]), [r[0] for r in whole])
        names = [str(self.pictures[r[0]].path) for r in whole]
        return usable_chunk(latents, [r[2] for r in whole], names, skipped, following)


Source = Shards | Pictures


def convert(source: Source, writer: LatentsWriter, max_unreadable: int) -> None:
    """Write all chunks that are not written yet; the caller finishes the writer.

    Raises ValueError, with the list written, when more than max_unreadable samples cannot be read;
    the chunk that went past the limit is not written.
    """
    done = writer.progress.num_rows + writer.progress.num_skipped
    with tqdm(total=source.num, initial=done, unit="sample", smoothing=0.05) as bar:
        for chunk in source.chunks(writer.progress.next):
            for path, reason in chunk.skipped:
                logger.warning("skipped %s: %s", said(path), said(reason))
            num = writer.progress.num_skipped + len(chunk.skipped)
            if num > max_unreadable:
                file = writer.list_skipped(chunk.skipped)
                raise ValueError(
                    f"{num} samples could not be read, --max_unreadable allows {max_unreadable}; "
                    f"they are listed in {file}"
                )
            writer.add(chunk)
            bar.update(len(chunk))


def json_pictures(file: Path) -> list[Picture]:
    """The images of a JSON data set."""
    _, paths, prompts = read_lists(file)
    listed = zip(paths, prompts, strict=True)
    return [Picture(resolve(file.parent, path), prompt, [path, prompt]) for path, prompt in listed]


def captioned_pictures(folder: Path) -> list[Picture]:
    """The images of a folder with their captions, as `senseflow.data.make` reads them."""
    found = from_folder(folder, Columns())
    pictures = [Picture(pair.image, pair.caption, [pair.key]) for pair in found.pairs]
    pictures += [
        Picture(folder / name, "", [name], fault)
        for name, fault in found.left_out
        if fault != NO_IMAGE
    ]
    return sorted(pictures, key=lambda picture: picture.path)


def require_captions(pictures: list[Picture], max_unreadable: int) -> None:
    """Say how many have no caption; raise ValueError when it is more than allowed."""
    faults = [picture for picture in pictures if picture.fault]
    if not faults:
        return
    text = (
        f"{len(faults)} of {len(pictures)} images have no caption (x.txt beside x.jpg, or a "
        f"metadata table), such as {said(str(faults[0].path))}: {faults[0].fault}"
    )
    if len(faults) > max_unreadable:
        raise ValueError(f"{text}; --max_unreadable allows {max_unreadable}")
    logger.warning("%s; they are skipped", text)


def usable_chunk(
    latents: np.ndarray,
    prompts: list[str],
    names: list[str],
    skipped: list[tuple[str, str]],
    following: list[int],
) -> Chunk:
    """A chunk of the rows that can be stored; the others join those skipped."""
    with np.errstate(over="ignore"):
        # What float16 cannot hold becomes infinite here, and is passed over as a fault below.
        rows = latents.astype(DTYPE)
    faults = [fault(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    kept = [i for i, reason in enumerate(faults) if reason is None]
    found = [(name, reason) for name, reason in zip(names, faults, strict=True) if reason]
    return Chunk(rows[kept], [prompts[i] for i in kept], skipped + found, following)


def fault(latents: np.ndarray, prompt: str) -> str | None:
    """Why a row cannot be stored."""
    if not np.isfinite(latents).all():
        return "latents that are not finite in float16"
    why = text_fault(prompt)
    return f"its prompt holds {why}" if why else None


def _digest(names: list[Any]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
