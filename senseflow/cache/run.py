"""The work of python -m senseflow.cache, from its arguments to its files."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from senseflow.cache.encoders import Encode, Row, fields_of, open_encoder
from senseflow.cache.index import Job, plan_cache, size
from senseflow.common.devices import find_device
from senseflow.common.files import PARTIAL
from senseflow.common.quiet import quiet_libraries
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.data.cache_index import Part, Shard
from senseflow.data.items import Samples
from senseflow.data.json_images import JsonImages
from senseflow.engine.caches import facts_of, versions, wanted_keys
from senseflow.engine.disk import sync
from senseflow.engine.inputs import check_teacher, check_vfm_paths, read_data, teacher_settings
from senseflow.engine.share import Share
from senseflow.teachers.family import Family
from senseflow.weights.safetensors_writer import write_safetensors

logger = logging.getLogger("senseflow")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for wrong input, OSError for what cannot be read or written."""
    quiet_libraries()
    config = load_config(args.config, args.overrides)
    config = replace(config, paths=replace(config.paths, cache=None))
    family = RECIPES[config.recipe].family
    known = check_teacher(config, family)
    if config.adversarial.in_use == "vfm":
        check_vfm_paths(config.paths, known)
    data = read_data(config, teacher_settings(config))
    names = parts_of(args.prompts, args.latents, config, data)
    share = Share.of_torchrun()
    if not share.is_main:
        logger.setLevel(logging.WARNING)
    jobs = share.of_main(lambda: plan(args, names, config, family, data))
    announce(jobs, args.output)
    unreadable = 0
    for job in jobs:
        unreadable += make(job, args.output, config, family, data, share)
    if share.is_main:
        report(args.output, jobs, unreadable)


def parts_of(prompts: bool, latents: bool, config: Config, data: Samples) -> list[str]:
    """The parts to make: those asked for, by default all there are; raises ValueError for latents
    that cannot be cached."""
    names = []
    if prompts or not latents:
        names += ["prompts", "clip"] if config.adversarial.in_use == "vfm" else ["prompts"]
    if not latents and prompts:
        return names
    if not isinstance(data, JsonImages):
        if latents:
            raise ValueError(
                f"--latents: {config.paths.dataset} holds latents already, which need no cache"
            )
        logger.info("%s holds latents already: prompts alone", config.paths.dataset)
        return names
    if config.data.crop == "random":
        raise ValueError(
            "data.crop random: an image has no one posterior to cache; say data.crop=center, or "
            "--prompts for the prompts alone"
        )
    return [*names, "latents"]


def plan(
    args: argparse.Namespace,
    names: list[str],
    config: Config,
    family: Family,
    data: Samples,
) -> list[Job]:
    """What there is to do, by the index that it writes."""
    fresh = {
        name: Part(facts_of(name, config, family), versions(), fields_of(name, config, family))
        for name in names
    }
    wanted = {name: wanted_keys(name, config, family, data) for name in names}
    return plan_cache(args.output, fresh, wanted, args.shard_rows)


def announce(jobs: list[Job], folder: Path) -> None:
    """The size, before anything is computed."""
    for job in jobs:
        logger.info("%s", job.said())
    logger.info("in all %s to write to %s", size(sum(job.num_bytes for job in jobs)), folder)


def make(
    job: Job, folder: Path, config: Config, family: Family, data: Samples, share: Share
) -> int:
    """Make the files of one part, each rank its own; returns how many images cannot be read.

    The ranks wait for each other after every file, so that an error of one ends all at once.
    """
    if not job.todo:
        return 0
    device = find_device(None)
    encode = share.agreed(lambda: open_encoder(job.name, config, family, data, device))
    mine, unreadable = share.mine(job.todo), 0
    bar = tqdm(total=sum(map(len, mine)), unit=" rows", desc=job.name, disable=not share.is_main)
    with bar:
        for number in range(-(-len(job.todo) // share.world_size)):
            own = mine[number : number + 1]
            found = share.agreed(partial(write_all, folder, job.part, own, encode, bar))
            unreadable += sum(share.gather(found))
            share.agreed(partial(require_few, unreadable, config.data.max_unreadable))
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
    """What is there now."""
    if unreadable:
        logger.warning(
            "%d images could not be read; training passes over them, and the same command tries "
            "them again",
            unreadable,
        )
    held = ", ".join(f"{sum(map(len, job.part.shards))} rows of {job.name}" for job in jobs)
    logger.info("%s holds %s; train with paths.cache=%s", folder, held, folder)
