"""A LoRA of the difference between a full student and its teacher, layer by layer.

The best approximation of rank R to a matrix is its truncated SVD (Eckart and Young 1936); what it
keeps of the sum of squares is that of its singular values.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from senseflow.common.devices import find_device
from senseflow.common.files import only_writer, read_json
from senseflow.config.families import check_keys
from senseflow.config.sections import Dtype
from senseflow.engine.export import Layout, fill_component, whole_folder
from senseflow.teachers.family import Family
from senseflow.teachers.weights import in_diffusers_names, lora_key
from senseflow.weights.card import write_card
from senseflow.weights.lora_files import is_lora
from senseflow.weights.meta import meta_network
from senseflow.weights.stored import Weights, component_weights
from senseflow.weights.student import find_student, open_weights

logger = logging.getLogger("senseflow")


@dataclass
class Energy:
    """Sums of squares of student minus base."""

    total: float = 0.0  # of all tensors that both have
    layers: float = 0.0  # of the weights of linear layers and convolutions
    kept: float = 0.0  # of those, by the LoRA


@dataclass(frozen=True)
class Extraction:
    """From what is extracted, and to where: the flags."""

    base: Path
    student: Path
    rank: int
    skip: list[str]  # ends of the names of layers
    output: Path
    ema: bool
    dtype: Dtype
    device: str


def extract(family: Family, wanted: Extraction) -> None:
    """Write the LoRA folder and say what it keeps; raises ValueError for another network's
    student."""
    folder, files = wanted.base / family.component, find_student(wanted.student, wanted.ema)
    base, student = component_weights(folder), open_weights(files.weights, wanted.ema)
    if is_lora(student.keys):
        raise ValueError(f"--student {wanted.student} is a LoRA already")
    check_keys(family, files.weights, student.keys)
    config = read_json(folder / "config.json")
    student = in_diffusers_names(family, student, family.fit_config(config, student.keys))
    both = _shared_keys(base, student, wanted)
    network = meta_network(getattr(diffusers, family.network_class), config)
    kinds = nn.Linear | nn.Conv2d
    names = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    layers = [name for name in names if f"{name}.weight" in both]
    layers = _without(layers, wanted.skip)
    _require_rank(wanted.rank, base, layers)
    dtype = getattr(torch, wanted.dtype)
    device, energy = find_device(wanted.device), Energy()
    layout = Layout.of_lora(
        _factors(base, layers, wanted.rank), dtype, lora_key(family, wanted.base)
    )

    def tensors() -> Iterator[Tensor]:
        for name in tqdm(layers, unit="layer", disable=None):
            difference = _difference(base, student, f"{name}.weight", device)
            energy.layers += float(difference.square().sum())
            for factor in truncated(difference, wanted.rank, energy):
                yield factor.to("cpu", dtype).contiguous()

    guidance = family.teacher_guidance if family.takes_guidance(config) else None
    card = files.card
    if card and guidance is not None:  # what the base's embedding is fed
        card = dataclasses.replace(card, guidance=guidance)
    with only_writer(wanted.output), whole_folder(wanted.output) as partial:
        fill_component(partial, layout, tensors())
        if card:
            write_card(partial, card)
    others = [key for key in both if key.removesuffix(".weight") not in layers]
    rest = sum(float(_difference(base, student, k, device).square().sum()) for k in others)
    energy.total = energy.layers + rest
    only = sorted(set(base.keys) ^ set(student.keys))
    logger.info("%s", "\n".join(report(wanted, energy, only, guidance)))


def report(
    wanted: Extraction, energy: Energy, only: list[str], guidance: float | None
) -> list[str]:
    """What was kept and what was left out, in lines."""
    kept, rest = (
        f"{100 * part / energy.total if energy.total else 0:.2f} %"
        for part in (energy.kept, energy.total - energy.layers)
    )
    lines = [
        f"{wanted.output} keeps {kept} of the energy of student minus base",
        f"left out: {rest} of it in biases, norms and other tensors that a LoRA cannot hold"
        + (f", and in {', '.join(wanted.skip)}" if wanted.skip else ""),
    ]
    if only:
        more = ", ..." if len(only) > 3 else ""
        lines.append(
            f"left out: {len(only)} tensors that only one of the two has "
            f"({', '.join(only[:3])}{more})"
        )
    if guidance is not None and any("guidance_embedder" in key for key in only):
        lines.append(
            "the base keeps its guidance embedding, the student has none: base and LoRA are not "
            f"exactly the student, unless it was trained with student.fold_guidance and is sampled "
            f"at that guidance (here {guidance:g})"
        )
    return lines


def truncated(difference: Tensor, rank: int, energy: Energy) -> tuple[Tensor, Tensor]:
    """A (rank, in, ...) and B (out, rank, ...) with B A nearest to a weight's difference (out, in,
    ...), float32; rows and columns beyond its own rank are zero. Adds to `energy` what they keep.
    """
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    num = min(rank, len(s))
    energy.kept += float(s[:num].square().sum())
    a, b = s.new_zeros(rank, v.shape[1]), s.new_zeros(len(u), rank)
    # half of each singular value to either side: both are of one size, and round alike in bfloat16
    a[:num], b[:, :num] = s[:num].sqrt()[:, None] * v[:num], u[:, :num] * s[:num].sqrt()
    ones = (1,) * (difference.dim() - 2)
    return a.view(rank, *difference.shape[1:]), b.view(len(u), rank, *ones)


def _shared_keys(base: Weights, student: Weights, wanted: Extraction) -> list[str]:
    """Keys of both, in the base's order; raises ValueError unless shapes are the same."""
    held = set(student.keys)
    both = [key for key in base.keys if key in held]
    other = [key for key in both if base.read(key).shape != student.read(key).shape]
    if other or not both:
        what = f"{len(other)} tensors have another shape, such as {other[0]}" if other else "no key"
        raise ValueError(f"--student {wanted.student} is not a student of {wanted.base}: {what}")
    return both


def _without(layers: list[str], skip: list[str]) -> list[str]:
    """Raises ValueError for the end of no layer's name, or of all."""
    for end in skip:
        if not any(f".{layer}".endswith(f".{end}") for layer in layers):
            raise ValueError(f"--skip {end}: no layer is called so, but such as {layers[-1]}")
    kept = [x for x in layers if not f".{x}".endswith(tuple(f".{end}" for end in skip))]
    if not kept:
        raise ValueError(f"--skip {' '.join(skip)}: no layer is left")
    return kept


def _require_rank(rank: int, base: Weights, layers: list[str]) -> None:
    """Raise ValueError for a rank beyond that of every layer: the rest would be zeros."""
    shapes = [base.read(f"{name}.weight").shape for name in layers]
    most = max((min(shape[0], shape[1:].numel()) for shape in shapes), default=0)
    if rank > most:
        raise ValueError(f"--rank {rank}: no layer has a rank above {most}")


def _difference(base: Weights, student: Weights, key: str, device: torch.device) -> Tensor:
    """Student minus base, float32."""
    try:
        mine, theirs = (weights.read(key)[...].to(device).float() for weights in (student, base))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{key} cannot be read: {error}") from error
    return mine - theirs


def _factors(base: Weights, layers: list[str], rank: int) -> dict[str, Tensor]:
    """Without memory: A before B, layer by layer."""
    tensors = {}
    for name in layers:
        shape = base.read(f"{name}.weight").shape
        ones = (1,) * (len(shape) - 2)
        for factor, size in (("A", (rank, *shape[1:])), ("B", (shape[0], rank, *ones))):
            tensors[f"{name}.lora_{factor}.weight"] = torch.empty(size, device="meta")
    return tensors
