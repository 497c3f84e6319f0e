"""Activation checkpointing: the same numbers, fewer saved activations, and the work it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flux_pipeline
import pytest
import sd35_pipeline
import sdxl_pipeline
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from senseflow.common.files import ROOT
from senseflow.common.ranks import start_ranks
from senseflow.config.config import load_config
from senseflow.config.sections import ParallelConfig
from senseflow.distill.bottleneck import add_encoder_pass
from senseflow.distill.state import frozen
from senseflow.engine.build import lighten
from senseflow.engine.parallel import recompute, shard
from senseflow.teachers.flux import adapter as flux
from senseflow.teachers.sd35 import adapter as sd35
from senseflow.teachers.sdxl import adapter as sdxl
from senseflow.weights.meta import NetworkSource


@dataclass(frozen=True)
class Case:
    """A network, its units of recomputation and of sharding, and a call of it."""

    make: Callable[[], nn.Module]
    recomputed: Callable[[Any], list[nn.Module]]
    blocks: Callable[[Any], list[nn.Module]]
    call: Callable[[nn.Module, Tensor], Tensor]
    sample: tuple[int, ...]


def flux_call(network: nn.Module, x: Tensor) -> Tensor:
    return network(
        hidden_states=x,
        encoder_hidden_states=torch.ones(2, 5, 32),
        pooled_projections=torch.ones(2, 32),
        timestep=torch.tensor([0.7, 0.2]),
        txt_ids=torch.zeros(5, 3),
        img_ids=flux.position_ids(4, 4, x.device),
        return_dict=False,
    )[0]


def sd35_call(network: nn.Module, x: Tensor) -> Tensor:
    config = network.config
    return network(
        hidden_states=x,
        encoder_hidden_states=torch.ones(2, 5, config.joint_attention_dim),
        pooled_projections=torch.ones(2, config.pooled_projection_dim),
        timestep=torch.tensor([700.0, 200.0]),
        return_dict=False,
    )[0]


def sdxl_inputs(network: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    config = network.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.ones(2, pooled), "time_ids": torch.ones(2, 6)}
    return torch.tensor([700.0, 200.0]), torch.ones(2, 5, config.cross_attention_dim), added


def sdxl_call(network: nn.Module, x: Tensor) -> Tensor:
    t, states, added = sdxl_inputs(network)
    return network(x, t, states, added_cond_kwargs=added, return_dict=False)[0]


CASES = {
    "flux": Case(
        lambda: flux_pipeline.transformer(guidance_embeds=False),
        flux.blocks_of,
        flux.blocks_of,
        flux_call,
        (2, 16, 16),
    ),
    "sd35": Case(
        sd35_pipeline.transformer, sd35.blocks_of, sd35.blocks_of, sd35_call, (2, 4, 16, 16)
    ),
    "sdxl": Case(sdxl_pipeline.unet, sdxl.repeated_of, sdxl.blocks_of, sdxl_call, (2, 4, 16, 16)),
}


@dataclass
class Outcome:
    """One forward and backward."""

    loss: Tensor
    grads: list[Tensor]  # of the weights, and of the input
    saved: int  # bytes kept for the backward outside of recomputed blocks
    per_block: list[int]  # of them, by unit of recomputation
    inputs: list[int]  # bytes of what such a unit is given by position, which its second run needs
    flops: int
    alive: int  # bytes made in the forward and still there at its end


class Made(TorchDispatchMode):
    """Remembers the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def prepared(
    case: Case,
    every: int,
    selective: bool = False,
    compiled: bool = False,
    sharded: bool = False,
    by_diffusers: bool = False,
) -> tuple[nn.Module, list[nn.Module], Tensor]:
    """A network, its units and an input: the same weights and input each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = case.make().train()
        x = torch.randn(case.sample).requires_grad_()
    blocks = case.recomputed(network)
    source = NetworkSource(network, lambda key: torch.empty(0), [], blocks)
    lighten(source, ParallelConfig(1, every, "selective" if selective else "full", compiled))
    if by_diffusers:
        network.enable_gradient_checkpointing()
    if sharded:
        shard(network, case.blocks(network), start_ranks().mesh)
    return network, blocks, x


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Whole, of the weights and of the input."""
    found = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in network.parameters()]
    return [*found, x.grad]


def run(
    case: Case,
    every: int,
    sharded: bool = False,
    by_diffusers: bool = False,
    selective: bool = False,
) -> Outcome:
    network, blocks, x = prepared(case, every, selective, False, sharded, by_diffusers)
    per_block, inputs, running = [0] * len(blocks), [0] * len(blocks), []

    def enter(number: int, args: tuple[Any, ...]) -> None:
        running.append(number)
        inputs[number] = sum(a.nbytes for a in args if isinstance(a, Tensor))

    def leave(*_: Any) -> None:
        running.pop()

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, n=number: enter(n, args))
        block.register_forward_hook(leave)
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        for number in running:
            per_block[number] += tensor.nbytes
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Made() as made:
            loss = case.call(network, x).square().mean()
        alive = made.alive()
        loss.backward()
    grads = gradients(network, x)
    flops = counter.get_total_flops()
    return Outcome(loss.detach(), grads, saved, per_block, inputs, flops, alive)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_the_same_bit_for_bit(name, sharded):
    plain = run(CASES[name], 0, sharded)
    for every, selective in ((1, False), (2, False), (1, True)):
        again = run(CASES[name], every, sharded, selective=selective)
        assert torch.equal(again.loss, plain.loss)
        assert all(torch.equal(a, b) for a, b in zip(again.grads, plain.grads, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_recomputed_blocks_keep_their_inputs_alone(name):
    """The other blocks and the rest save what they save without recomputation."""
    plain = run(CASES[name], 0)
    blocks = plain.per_block
    assert len(blocks) > 1 and all(blocks)
    for every in (1, 2, 3):
        given_up = sum(blocks[every - 1 :: every]) - sum(plain.inputs[every - 1 :: every])
        assert run(CASES[name], every).saved == plain.saved - given_up
    assert run(CASES[name], 1).saved < 0.5 * plain.saved


@pytest.mark.parametrize("name", CASES)
def test_every_block_saves_as_much_as_diffusers_own_switch(name):
    """Which leaves the first residual block of a UNet's middle as it is."""
    ours, theirs = run(CASES[name], 1), run(CASES[name], 0, by_diffusers=True)
    assert ours.saved <= theirs.saved
    assert theirs.flops <= ours.flops <= 1.01 * theirs.flops
    plain = run(CASES[name], 0)
    assert plain.flops < ours.flops < 4 / 3 * plain.flops  # 3 forwards become at most 4


@pytest.mark.parametrize("name", CASES)
def test_selective_recomputation_spends_no_product_twice(name):
    plain, full = run(CASES[name], 0), run(CASES[name], 1)
    selective = run(CASES[name], 1, selective=True)
    assert selective.flops == plain.flops < full.flops
    assert full.alive < selective.alive < 0.8 * plain.alive


COMPILED = [("flux", 1, True)]
LATER = (("flux", 0, False), ("flux", 1, False), ("sd35", 1, True), ("sdxl", 1, True))
COMPILED += [pytest.param(*how, marks=pytest.mark.long) for how in LATER]


@pytest.mark.parametrize(("name", "every", "selective"), COMPILED)
def test_compiled_blocks_give_the_same_gradients(name, every, selective, monkeypatch):
    """All but the code generator, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    found = []
    for times, compiled in ((0, False), (every, True)):
        network, _, x = prepared(CASES[name], times, selective, compiled, sharded=True)
        loss = CASES[name].call(network, x).square().mean()
        loss.backward()
        found.append([loss.detach(), *gradients(network, x)])
    for plain, again in zip(*found, strict=True):
        assert (again - plain).norm() <= 1e-4 * plain.norm() + 1e-7
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_frozen_networks_gradient_is_the_same_where_it_runs_again(every):
    """DMD2's generator loss: through the encoder half of a sharded UNet, frozen meanwhile."""
    case = CASES["sdxl"]
    grads = []
    for times in (0, every):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = case.make().train()
            x = torch.randn(case.sample).requires_grad_()
        recompute(case.recomputed(network), times)
        shard(network, case.blocks(network), start_ranks().mesh)
        add_encoder_pass(network)
        with frozen(network):
            features = network.encode(x, *sdxl_inputs(network))
            grads += torch.autograd.grad(features.square().mean(), x)
        assert all(p.grad is None for p in network.parameters())
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("every", [-1, True])
def test_the_configuration_takes_a_number_of_blocks(every):
    file = ROOT / "configs" / "FLUX" / "flux_senseflow_tiny.yaml"
    with pytest.raises(ValueError, match=r"parallel\.activation_checkpointing"):
        load_config(file, [f"parallel.activation_checkpointing={str(every).lower()}"])
