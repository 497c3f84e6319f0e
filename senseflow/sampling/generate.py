"""From checked flags to image files: choose the network, sample in batches, write, picture."""

import argparse
import itertools
import json
import logging
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

import senseflow
from senseflow.pictures import save_whole
from senseflow.sampling.families import check_keys
from senseflow.sampling.plan import Family, Plan, Prompt, shard_of
from senseflow.sampling.planning import check_card, choose_config, make_plan
from senseflow.sampling.student import StudentFiles, build_student, find_student, open_weights

logger = logging.getLogger(__name__)

GRID_CELLS = 64
GRID_SIDE = 512  # pixels at most of one cell


def generate(family: Family, args: argparse.Namespace, prompts: list[Prompt]) -> None:
    """Sample the images that are not there yet; raises ValueError for input that cannot be used."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = find_device(args.device, args.offload)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    files = None if args.teacher else find_student(args.checkpoint, args.ema)
    check_card(family, files.card if files else None, args)
    weights, config, config_name = None, None, None
    if files:
        weights = open_weights(files.weights, files.ema)
        check_keys(family, files.weights, weights.keys)
        config, config_name = choose_config(family, files, weights, args)
        logger.info("weights: %s\nconfig: %s", files.weights, config_name)
    plan = make_plan(family, args, files, config)
    settings = describe(family, args, plan, files, config_name, dtype)
    todo = missing_images(family, prompts, settings, args)
    if todo:
        network = build_student(weights, config, dtype, config_name) if files else None
        pipeline = family.open_pipeline(args.base, network, dtype)
        pipeline.scheduler = family.make_scheduler(pipeline.scheduler, plan)
        prepare(pipeline, family, args, device)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        sample_all(family, pipeline, plan, todo, settings, args)
    logger.info("%d images in %s, %d of them new", len(prompts), args.output_dir, len(todo))
    write_grid([image_file(args.output_dir, p) for p in prompts], args)


def find_device(name: str | None, offload: bool) -> torch.device:
    """The device named, or the rank's GPU, or the CPU."""
    if name is None:
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        name = gpu if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    if offload and device.type == "cpu":
        raise ValueError("--offload moves idle parts from a GPU to the host: it needs a GPU")
    return device


def prepare(
    pipeline: DiffusionPipeline, family: Family, args: argparse.Namespace, device: torch.device
) -> None:
    """Add the LoRA, compile, move to the device."""
    pipeline.set_progress_bar_config(disable=True)
    if args.lora:
        add_lora(pipeline, family, args.lora)
    if args.compile:
        for module in getattr(pipeline, family.component).modules():
            if type(module).__name__ in family.blocks:
                module.compile()
    if args.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def add_lora(pipeline: DiffusionPipeline, family: Family, path: Path) -> None:
    """Load a LoRA folder or file; raises ValueError when it changes nothing."""
    file = path.name if path.is_file() else None
    try:
        pipeline.load_lora_weights(path.parent if file else path, weight_name=file)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"--lora {path} does not fit: {error}") from error
    if not pipeline.get_active_adapters():
        raise ValueError(f"--lora {path} holds nothing for the {family.component}")


def describe(
    family: Family,
    args: argparse.Namespace,
    plan: Plan,
    files: StudentFiles | None,
    config_name: str | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What an image depends on besides its prompt: the sidecar, and what a repeat must equal."""
    return {
        "family": family.name,
        "base": str(args.base.resolve()),
        "checkpoint": str(files.weights.resolve()) if files else None,
        "ema": args.ema or None,
        "iteration": files.card.iteration if files and files.card else None,
        "config": config_name,
        "lora": str(args.lora.resolve()) if args.lora else None,
        "steps": plan.steps,
        "sampler": plan.sampler,
        family.levels.name: plan.levels,
        "guidance": plan.guidance,
        "max_sequence_length": plan.max_sequence_length,
        "height": plan.height,
        "width": plan.width,
        "dtype": str(dtype).removeprefix("torch."),
    }


def image_file(folder: Path, prompt: Prompt) -> Path:
    """`00007_a-red-fox.png`: the prompt's number, then its words."""
    words = re.sub(r"[\W_]+", "-", prompt.text.lower()).strip("-")[:50].strip("-")
    return folder / f"{prompt.index:05d}_{words or 'image'}.png"


def missing_images(
    family: Family, prompts: list[Prompt], settings: dict[str, Any], args: argparse.Namespace
) -> list[Prompt]:
    """The prompts without an image; raises ValueError when one was made with other settings."""
    if args.overwrite:
        return prompts
    todo = []
    for prompt in prompts:
        file = image_file(args.output_dir, prompt)
        if not file.is_file():
            todo.append(prompt)
            continue
        expected = {"prompt": prompt.text, "seed": args.seed + prompt.index, **settings}
        if args.teacher:
            del expected[family.levels.name]  # known once the scheduler has run
        changed = _changed(file.with_suffix(".json"), expected)
        if changed:
            raise ValueError(
                f"{file} is there already, made with other settings ({changed}): choose another "
                "--output_dir, or --overwrite"
            )
    return todo


def _changed(sidecar: Path, expected: dict[str, Any]) -> str:
    """Which settings a sidecar has otherwise, in words; empty when all agree."""
    try:
        found = json.loads(sidecar.read_text())
    except (OSError, ValueError):
        return "its .json is not there or not readable"
    differing = [k for k, v in expected.items() if found.get(k) != v]
    return ", ".join(f"{k} {found.get(k)}, now {expected[k]}" for k in differing[:4])


def sample_all(
    family: Family,
    pipeline: DiffusionPipeline,
    plan: Plan,
    todo: list[Prompt],
    settings: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Sample in batches; an image depends on its own seed, seed + index, alone."""
    versions = {
        "senseflow": senseflow.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    levels = family.levels.name
    with tqdm(total=len(todo), unit="image") as bar:
        for batch in _batches(todo, args.batch_size):
            seeds = [args.seed + prompt.index for prompt in batch]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            images = family.sample(pipeline, [prompt.text for prompt in batch], generators, plan)
            used = plan.levels or getattr(pipeline.scheduler, levels)[: plan.steps].tolist()
            for prompt, seed, image in zip(batch, seeds, images, strict=True):
                sidecar = {"prompt": prompt.text, "index": prompt.index, "seed": seed, **settings}
                sidecar |= {levels: used, "versions": versions}
                write_image(image_file(args.output_dir, prompt), image, sidecar)
                bar.update()


def _batches(todo: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    iterator = iter(todo)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def write_image(file: Path, image: Image.Image, sidecar: dict[str, Any]) -> None:
    """The sidecar, then the image: an image that is there is whole and described."""
    file.with_suffix(".json").write_text(json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    save_whole(image, file)


def write_grid(files: list[Path], args: argparse.Namespace) -> None:
    """The first images side by side in `grid.png` (`grid_IofN.png` of one shard)."""
    shard, num_shards = shard_of(args.shard)
    images = [Image.open(file).convert("RGB") for file in files[:GRID_CELLS]]
    if not images:
        return
    for image in images:
        image.thumbnail((GRID_SIDE, GRID_SIDE), Image.Resampling.LANCZOS)
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * width, number // columns * height))
    name = "grid.png" if num_shards == 1 else f"grid_{shard}of{num_shards}.png"
    save_whole(grid, args.output_dir / name)
