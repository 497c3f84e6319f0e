"""Small shared networks with random adapters, for tests of LoRA."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flux_pipeline
import sd35_pipeline
import sdxl_pipeline
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from senseflow.common.files import read_json
from senseflow.common.ranks import start_ranks
from senseflow.core.names import BaseForm
from senseflow.engine.parallel import compile_blocks, recompute, shard
from senseflow.teachers.flux import adapter as flux
from senseflow.teachers.sd35 import adapter as sd35
from senseflow.teachers.sdxl import adapter as sdxl
from senseflow.teachers.sdxl.original import layer_name
from senseflow.weights.filling import fill_shards
from senseflow.weights.lora import ADAPTERS, Role, share
from senseflow.weights.lora_files import Component, Lora, layer_shapes, read_lora
from senseflow.weights.lora_settings import LoraSettings
from senseflow.weights.meta import NetworkSource
from senseflow.weights.stored import component_weights
from senseflow.weights.student import open_lora

CPU = torch.device("cpu")


def flux_call(network: nn.Module, x: Tensor) -> Tensor:
    return network(
        hidden_states=x,
        encoder_hidden_states=torch.ones(2, 5, 32, dtype=x.dtype),
        pooled_projections=torch.ones(2, 32, dtype=x.dtype),
        timestep=torch.tensor([0.7, 0.2], dtype=x.dtype),
        guidance=torch.tensor([3.5, 3.5]),
        txt_ids=torch.zeros(5, 3),
        img_ids=flux.position_ids(4, 4, x.device),
        return_dict=False,
    )[0]


def sd35_call(network: nn.Module, x: Tensor) -> Tensor:
    config = sd35_pipeline.transformer().config
    return network(
        hidden_states=x,
        encoder_hidden_states=torch.ones(2, 5, config.joint_attention_dim, dtype=x.dtype),
        pooled_projections=torch.ones(2, config.pooled_projection_dim, dtype=x.dtype),
        timestep=torch.tensor([700.0, 200.0]),
        return_dict=False,
    )[0]


def sdxl_call(network: nn.Module, x: Tensor) -> Tensor:
    config = sdxl_pipeline.unet().config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {
        "text_embeds": torch.ones(2, pooled, dtype=x.dtype),
        "time_ids": torch.ones(2, 6, dtype=x.dtype),
    }
    num = 2 * 5 * config.cross_attention_dim  # tokens that differ: else attention has no gradient
    states = torch.linspace(-1, 1, num).sin().view(2, 5, -1).to(x.dtype)
    t = torch.tensor([700.0, 200.0])
    return network(x, t, states, added_cond_kwargs=added, return_dict=False)[0]


@dataclass(frozen=True)
class Case:
    """A network, its units, which of its layers get adapters, and a call of it."""

    make: Callable[[], nn.Module]
    blocks: Callable[[Any], list[nn.Module]]
    recomputed: Callable[[Any], list[nn.Module]]
    targets: tuple[str, ...]
    call: Callable[[nn.Module, Tensor], Tensor]
    sample: tuple[int, ...]


CASES = {
    "flux": Case(
        flux_pipeline.transformer,
        flux.blocks_of,
        flux.blocks_of,
        ("to_q", "to_out.0", "ff.net.2", "proj_out"),
        flux_call,
        (2, 16, 16),
    ),
    "sd35": Case(
        sd35_pipeline.transformer,
        sd35.blocks_of,
        sd35.blocks_of,
        ("to_v", "add_q_proj", "ff.net.0.proj"),
        sd35_call,
        (2, 4, 16, 16),
    ),
    "sdxl": Case(
        sdxl_pipeline.unet,
        sdxl.blocks_of,
        sdxl.repeated_of,
        ("to_q", "conv1", "time_emb_proj"),
        sdxl_call,
        (2, 4, 16, 16),
    ),
}


@dataclass
class Shared:
    """The plain network, and the same as three roles."""

    case: Case
    plain: nn.Module
    teacher: Role
    generator: Role
    fake_score: Role
    optimizer: torch.optim.Optimizer | None = None

    def input(self) -> Tensor:
        x = torch.randn(self.case.sample, generator=torch.Generator().manual_seed(1))
        return x.to(next(self.plain.parameters()).dtype)

    def run(self, network: nn.Module) -> Tensor:
        return self.case.call(network, self.input()).float()


def make_shared(
    name: str | Case,
    train: str = "B",
    every: int = 0,
    dtype: torch.dtype = torch.float32,
    moved: bool = True,
    remember: bool = True,
    selective: bool = False,
    compiled: bool = False,
    base: BaseForm = "bfloat16",
) -> Shared:
    """Sharded on this process's ranks; scale 2.

    moved: both adapters are away from B = 0. remember: a recomputation has its first run's role.
    """
    case = CASES[name] if isinstance(name, str) else name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = case.make().to(dtype).eval().requires_grad_(False)
    state = plain.state_dict() | dict(plain.named_buffers())
    with torch.device("meta"):
        network = case.make().to(dtype).eval().requires_grad_(False)
    units = case.recomputed(network)
    source = NetworkSource(network, lambda key: state[key], case.blocks(network), units)
    settings = LoraSettings(rank=4, alpha=8.0, train=train, targets=case.targets, seed=3, base=base)
    source, base = share(source, settings)
    context = source.recompute_context if remember else noop_context_fn
    if compiled:
        compile_blocks(source.repeated, every, selective)
    else:
        recompute(source.repeated, every, selective, context)
    shard(source.network, source.blocks, start_ranks().mesh, dtype)
    fill_shards(source.network, source.read, CPU)
    shared = Shared(case, plain, Role(base, None), *(Role(base, adapter) for adapter in ADAPTERS))
    if moved:
        for number, role in enumerate((shared.generator, shared.fake_score)):
            move(role, seed=number)
    return shared


def move(role: Role, seed: int) -> None:
    """Draw the trained factors anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in role.parameters():
            new = torch.randn(value.shape, generator=generator) * 0.2
            value.copy_(torch.distributed.tensor.distribute_tensor(new, value.device_mesh))


def component_of(folder: Path) -> Component:
    """A saved network as LoRA files know it."""
    kohya = partial(layer_name, config=read_json(folder / "config.json"))
    shapes = layer_shapes(component_weights(folder))
    return Component(folder.name, shapes, kohya if folder.name == "unet" else None)


def adapters_for(file: Path, folder: Path) -> Lora:
    """A LoRA file, read for a saved network."""
    return read_lora(open_lora(file), [component_of(folder)])


def whole(tensor: Tensor) -> Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Those that are there, unsharded."""
    return {k: whole(p.grad) for k, p in network.named_parameters() if p.grad is not None}
