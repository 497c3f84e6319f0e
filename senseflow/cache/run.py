"""The work of python -m senseflow.cache, from its arguments to its files."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from senseflow.cache.encoders import Encode, Row, fields_of, open_encoder
from senseflow.cache.index import Job, plan_cache
from senseflow.common.devices import find_device
from senseflow.common.files import PARTIAL, alone_in
from senseflow.common.quiet import quiet_libraries
from senseflow.common.weights_files import size_in_words
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.data.cache_index import Part, Shard
from senseflow.data.json_images import JsonImages
from senseflow.data.prompt_list import PromptList
from senseflow.engine.build import check_teacher
from senseflow.engine.caches import facts_of, versions, wanted_keys
from senseflow.engine.disk import sync
from senseflow.engine.inputs import Inputs, check_vfm_paths, read_inputs
from senseflow.engine.share import Share
from senseflow.weights.safetensors_writer import write_safetensors

logger = logging.getLogger("senseflow")


@dataclass(frozen=True)
class Wanted:
    """Which cache, of what: the flags."""

    config: Path
    overrides: list[str]
    output: Path
    prompts: bool  # alone
    latents: bool  # alone
    shard_rows: int | None  # of a file; None: by its size


def run(wanted: Wanted) -> None:
    """Raises ValueError for wrong input, OSError for what cannot be read or written."""
    quiet_libraries()
    config = load_config(wanted.config, wanted.overrides)
    # What is made here must not be read here.
    config = replace(config, paths=replace(config.paths, cache=None))
    inputs = read_inputs(config, RECIPES[config.recipe].family)
    if config.adversarial.in_use == "vfm":
        check_vfm_paths(config.paths, inputs.cache)
    check_teacher(inputs)
    names = parts_of(wanted.prompts, wanted.latents, inputs)
    share = Share.of_torchrun()
    if not share.is_main:
        logger.setLevel(logging.WARNING)
    with ExitStack() as until_the_end:
        share.of_main(lambda: until_the_end.enter_context(only_cache_in(wanted.output)))
        jobs = share.of_main(lambda: plan(wanted, names, inputs))
        for job in jobs:
            logger.info("%s", job.said())
        whole = size_in_words(sum(job.num_bytes for job in jobs))
        logger.info("in all %s to write to %s", whole, wanted.output)
        unreadable = sum(make(job, wanted.output, inputs, share) for job in jobs)
        if share.is_main:
            report(wanted.output, jobs, unreadable)


def only_cache_in(folder: Path) -> AbstractContextManager[None]:
    """While this command, on all its ranks, writes a folder; raises ValueError for a second one on
    this machine, whose unfinished files would have the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    return alone_in(
        folder,
        f"--output {folder} is being written by another process: wait for it, or name another",
    )


def parts_of(prompts: bool, latents: bool, inputs: Inputs) -> list[str]:
    """The parts to make: those asked for, by default all there are; raises ValueError for latents
    that cannot be cached."""
    config, names = inputs.config, []
    if prompts or not latents:
        names += ["prompts", "clip"] if config.adversarial.in_use == "vfm" else ["prompts"]
    if not latents and prompts:
        return names
    if not isinstance(inputs.data, JsonImages):
        alone = isinstance(inputs.data, PromptList)
        held = "prompts alone" if alone else "latents already, which need no cache"
        if latents:
            raise ValueError(f"--latents: {config.paths.dataset} holds {held}")
        logger.info("%s holds %s: prompts are cached", config.paths.dataset, held)
        return names
    if config.data.crop == "random":
        raise ValueError(
            "data.crop random: an image has no one posterior to cache; say data.crop=center, or "
            "--prompts for the prompts alone"
        )
    return [*names, "latents"]


def plan(wanted: Wanted, names: list[str], inputs: Inputs) -> list[Job]:
    """What there is to do, by the index that it writes."""
    config, family = inputs.config, inputs.family
    fresh = {
        name: Part(facts_of(name, config, family), versions(), fields_of(name, inputs))
        for name in names
    }
    keys = {name: wanted_keys(name, config, family, inputs.data) for name in names}
    return plan_cache(wanted.output, fresh, keys, wanted.shard_rows)


def make(job: Job, folder: Path, inputs: Inputs, share: Share) -> int:
    """Make the files of one part, each rank its own; returns how many images cannot be read.

    The ranks wait for each other after every file, so that an error of one ends all at once.
    """
    if not job.todo:
        return 0
    device = find_device(None)
    encode = share.agreed(lambda: open_encoder(job.name, inputs, device))
    mine, unreadable = share.mine(job.todo), 0
    bar = tqdm(total=sum(map(len, mine)), unit=" rows", desc=job.name, disable=not share.is_main)
    with bar:
        for number in range(-(-len(job.todo) // share.world_size)):
            own = mine[number : number + 1]
            found = share.agreed(partial(write_all, folder, job.part, own, encode, bar))
            unreadable += sum(share.gather(found))
            share.agreed(partial(require_few, unreadable, inputs.config.data.max_unreadable))
    return unreadable


def require_few(unreadable: int, limit: int) -> None:
    """Raise ValueError when more images than the configuration allows could not be read."""
    if unreadable > limit:
        raise ValueError(
            f"{unreadable} images could not be read, data.max_unreadable allows {limit}"
        )


def write_all(folder: Path, part: Part, shards: Sequence[Shard], encode: Encode, bar: tqdm) -> int:
    """Make some files; returns how many of their images cannot be read."""
    return sum(write(folder, part, shard, encode, bar) for shard in shards)


def write(folder: Path, part: Part, shard: Shard, encode: Encode, bar: tqdm) -> int:
    """Make one file, whole or not at all; returns how many of its images cannot be read."""
    file, shapes = folder / shard.file, part.shapes(shard)
    unfinished = file.with_name(file.name + PARTIAL)
    tensors = stacked(shapes, encode(shard.split), bar)
    try:
        # Beside its place, synced, renamed: what has this name is whole, after a power cut too.
        write_safetensors(unfinished, shapes, iter(tensors.values()))
        sync(unfinished)
        os.replace(unfinished, file)
        sync(folder)
    except OSError as error:
        raise OSError(
            f"writing {file} failed: {error}. Finished files are kept: mend this, then run the "
            "command again"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return int((tensors["readable"] == 0).sum()) if "readable" in tensors else 0


def stacked(shapes: dict[str, Tensor], rows: Iterator[Row], bar: tqdm) -> dict[str, Tensor]:
    """Rows as the tensors of a file; what a row does not have stays 0."""
    tensors = {name: torch.zeros(like.shape, dtype=like.dtype) for name, like in shapes.items()}
    for number, row in enumerate(rows):
        for name, value in row.items():
            assert value.dtype == tensors[name].dtype, name
            tensors[name][number] = value
        bar.update()
    return tensors


def report(folder: Path, jobs: list[Job], unreadable: int) -> None:
    """Say what the cache holds now, and how many images could not be read."""
    if unreadable:
        logger.warning(
            "%d images could not be read; training passes over them, and the same command tries "
            "them again",
            unreadable,
        )
    held = ", ".join(f"{sum(map(len, job.part.shards))} rows of {job.name}" for job in jobs)
    logger.info("%s holds %s; train with paths.cache=%s", folder, held, folder)
