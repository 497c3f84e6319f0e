"""Units, collectives, precision, prefetch and accumulation of sharded networks, on gloo ranks."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.config.sections import ParallelConfig, PrecisionConfig
from senseflow.core.path import FlowPath
from senseflow.distill.bottleneck import ClassifierHead, add_encoder_pass
from senseflow.distill.vfm_heads import Heads
from senseflow.engine.build import build_network, build_trained
from senseflow.engine.parallel import shard
from senseflow.optim.resharding import reshard
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.flux.adapter import FluxAdapter
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.folder import TeacherSettings
from senseflow.teachers.sdxl.family import SDXL
from senseflow.weights.filling import fill_shards
from senseflow.weights.meta import NetworkSource, in_turn

CPU = torch.device("cpu")
DOUBLE, SINGLE = 2, 3
NUM_UNITS = DOUBLE + SINGLE + 1  # one per block and the rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A FLUX transformer of five blocks, with weights that are not zero anywhere."""
    folder = tmp_path_factory.mktemp("flux_of_five")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=DOUBLE,
            num_single_layers=SINGLE,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ).save_pretrained(folder / "transformer")
    return folder


def settings_of(folder: Path, dtype: torch.dtype = torch.float32) -> TeacherSettings:
    return TeacherSettings(folder, (32, 32), 4, None, dtype, torch.float32)


def config_of(compute: str = "float32", recomputed: int = 0) -> Any:
    """The two sections of a run's configuration that a network is built by."""
    return SimpleNamespace(
        precision=PrecisionConfig(compute=compute),
        parallel=ParallelConfig(activation_checkpointing=recomputed),
    )


def predict(network: nn.Module, dtype: torch.dtype, samples: list[int]) -> Tensor:
    """FLUX's output for these samples of a batch whose numbers are drawn one by one."""
    adapter = FluxAdapter(None, FlowPath(), (4, 8, 8), settings_of(Path(), dtype))
    draws = [torch.Generator().manual_seed(sample) for sample in samples]
    x_t = torch.stack([torch.randn(4, 8, 8, generator=g) for g in draws])
    embeds = torch.stack([torch.randn(4, 8, generator=g) for g in draws])
    pooled = torch.stack([torch.randn(8, generator=g) for g in draws])
    t = torch.full((len(samples),), 0.7)
    return adapter.predict(network, x_t, t, Conditioning(embeds, pooled))


def loss_of(network: nn.Module, dtype: torch.dtype, samples: list[int]) -> Tensor:
    return (predict(network, dtype, samples) - 0.3).square().mean()


# ---------------------------------------------------------------------------------------- ranks


def on_ranks(num: int, work: Callable[..., None], *args: Any, replicas: int = 1) -> None:
    """Run `work(ranks, *args)` on gloo ranks; an assertion that fails there fails here."""
    with patch.dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT="0", OMP_NUM_THREADS="1"):
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        mp.spawn(_rank, (num, replicas, work, args), nprocs=num)
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]


def _rank(rank: int, num: int, replicas: int, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num)}
    try:
        work(start_ranks(replicas), *args)
    finally:
        dist.destroy_process_group()


def same(found: Any, expected: Any) -> None:
    """An assertion that says what it found, where pytest rewrites none."""
    assert found == expected, f"{found} is not {expected}"


COLLECTIVES = (
    "all_gather_single",
    "reduce_scatter_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_reduce",
    "all_gather",
    "broadcast",
    "barrier",
)


@contextmanager
def collectives():
    """A list that (name, dtype) of every collective is added to."""
    seen: list[tuple[str, torch.dtype | None]] = []

    def spy(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            dtypes = {t.dtype for t in tensors}
            assert len(dtypes) <= 1
            seen.append((name, *dtypes))
            return real(*args, **kwargs)

        return call

    with patch.multiple(dist, **{name: spy(name, getattr(dist, name)) for name in COLLECTIVES}):
        yield seen


def groups(network: nn.Module) -> list[Any]:
    """FSDP2's parameter groups of all units that have parameters of their own."""
    units = [m for m in network.modules() if isinstance(m, FSDPModule)]
    found = (unit._get_fsdp_state()._fsdp_param_group for unit in units)
    return [group for group in found if group]


GATHER, REDUCE = "all_gather_single", "reduce_scatter_single"


def check_collectives(ranks: Ranks, folder: Path) -> None:
    """One gathering per unit and pass, one reduction per unit and backward; their types."""
    gathered = [(GATHER, torch.bfloat16)] * NUM_UNITS
    for every in (0, 1, 2):
        config = config_of("bfloat16", every)
        network = build_network(FLUX.student(settings_of(folder)), config, ranks)
        same(len(groups(network)), NUM_UNITS)
        with collectives() as seen, torch.no_grad():
            predict(network, torch.bfloat16, [ranks.rank])
        same(seen, gathered)
        with collectives() as seen:
            loss = loss_of(network, torch.bfloat16, [ranks.rank])
        same(seen, gathered)
        with collectives() as seen:
            loss.backward()
        reduced = [(REDUCE, torch.float32)] * NUM_UNITS
        same(sorted(seen), gathered + reduced)
        for p in network.parameters():
            assert p.dtype == p.grad.dtype == torch.float32
            assert p.grad.to_local().numel() <= -(-p.shape[0] // 2) * p[0].numel()


def check_types(ranks: Ranks, folder: Path) -> None:
    """Weights are computed with in bfloat16, also where a block runs again."""
    seen: list[torch.dtype] = []
    for every, times in ((0, 1), (1, 2)):
        source = FLUX.student(settings_of(folder))
        network = build_network(source, config_of("bfloat16", every), ranks)
        linear = network.transformer_blocks[1].attn.to_q
        linear.register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
        loss_of(network, torch.bfloat16, [ranks.rank]).backward()
        same(seen, [torch.bfloat16] * times)
        seen.clear()


def check_prefetch(ranks: Ranks, folder: Path) -> None:
    """Each unit's weights are asked for before the one in front of it computes."""
    network = build_network(FLUX.student(settings_of(folder)), config_of(), ranks)
    events: list[Any] = []
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    for number, block in enumerate(blocks):
        attention = block.attn
        attention.register_forward_pre_hook(lambda *_, n=number: events.append(n))
    gather = dist.all_gather_single

    def spy(*args: Any, **kwargs: Any) -> Any:
        events.append("gather")
        return gather(*args, **kwargs)

    with patch.object(dist, GATHER, spy), torch.no_grad():
        predict(network, torch.float32, [0])
    ahead = [event for number in range(len(blocks) - 1) for event in ("gather", number)]
    same(events, ["gather", "gather", *ahead, len(blocks) - 1])


def check_accumulation(ranks: Ranks, folder: Path) -> None:
    """Every micro-batch is reduced at once; between two, a rank holds gradients of its shards."""
    build = [build_network(FLUX.student(settings_of(folder)), config_of(), ranks) for _ in "ab"]
    network, one_by_one = build
    micro = [[2 * i + ranks.rank] for i in range(3)]
    for samples in micro:
        with collectives() as seen:
            loss_of(network, torch.float32, samples).backward()
        same(seen.count((REDUCE, torch.float32)), NUM_UNITS)
        for p in (p for group in groups(network) for p in group.fsdp_params):
            assert p.unsharded_accumulated_grad is None
            assert p.sharded_state.name == "SHARDED"
            assert p.unsharded_param.untyped_storage().size() == 0
            assert p.unsharded_param.grad is None
    total = [torch.zeros_like(p.to_local()) for p in one_by_one.parameters()]
    for samples in micro:
        loss_of(one_by_one, torch.float32, samples).backward()
        for sum_, p in zip(total, one_by_one.parameters(), strict=True):
            sum_ += p.grad.to_local()
            p.grad = None
    for sum_, p in zip(total, network.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_local(), sum_)


def check_record(ranks: Ranks, folder: Path) -> None:
    """What FSDP2 notes of forwards does not grow with a run."""
    teacher = build_network(FLUX.teacher(settings_of(folder)), config_of(), ranks)
    student = build_network(FLUX.student(settings_of(folder)), config_of(), ranks)
    adapter = FluxAdapter(None, FlowPath(), (4, 8, 8), settings_of(folder))
    cond, one = Conditioning(torch.ones(1, 4, 8), torch.ones(1, 8)), torch.ones(1)
    for _ in range(3):
        with torch.no_grad():
            adapter.predict_guided(teacher, torch.ones(1, 4, 8, 8), one, cond, one)
            predict(student, torch.float32, [0])
        loss_of(student, torch.float32, [0]).backward()
        for network in (teacher, student):
            context = network._get_fsdp_state()._comm_ctx
            assert context.post_forward_order == []
            assert all(group._post_forward_indices == [] for group in groups(network))
            assert all(group.is_sharded for group in groups(network))


def check_kept(ranks: Ranks, folder: Path) -> None:
    """Not resharded after its forward, a network is gathered once until it is asked to reshard."""
    parallel = ParallelConfig(reshard_after_forward=False)
    config = SimpleNamespace(precision=PrecisionConfig(compute="bfloat16"), parallel=parallel)
    settings = settings_of(folder, torch.bfloat16)
    teacher = build_network(FLUX.teacher(settings), config, ranks, reshard_after_forward=False)
    student = build_trained(FLUX.student(settings_of(folder)), config, ranks, "student")
    gathered = [(GATHER, torch.bfloat16)] * NUM_UNITS
    adapter = FluxAdapter(None, FlowPath(), (4, 8, 8), settings)
    cond, one = Conditioning(torch.ones(1, 4, 8), torch.ones(1, 8)), torch.ones(1)
    for first in (True, False):
        with collectives() as seen, torch.no_grad():
            adapter.predict_guided(teacher, torch.ones(1, 4, 8, 8), one, cond, one)
        same(seen, gathered if first else [])
        with collectives() as seen:
            with torch.no_grad():
                predict(student, torch.bfloat16, [ranks.rank])
            loss_of(student, torch.bfloat16, [ranks.rank]).backward()
        same(sorted(seen), gathered + [(REDUCE, torch.float32)] * NUM_UNITS)
        with collectives() as seen, torch.no_grad():
            predict(student, torch.bfloat16, [ranks.rank])
        same(seen, [])
        context = teacher._get_fsdp_state()._comm_ctx
        assert context.post_forward_order == []
        reshard(student)
        assert all(group.is_sharded for group in groups(student))
    reshard(teacher)
    assert all(p.to_local().numel() < p.numel() for p in teacher.parameters() if len(p) > 1)


def check_encoder_pass(ranks: Ranks, sdxl_folder: Path) -> None:
    """DMD2's pass through half a UNet gathers that half, and leaves nothing gathered ahead."""
    settings = TeacherSettings(sdxl_folder, (32, 32), None, None, torch.float32, torch.float32)
    network = build_network(SDXL.student(settings), config_of(), ranks)
    add_encoder_pass(network)
    up = len([m for b in network.up_blocks for m in b.modules() if isinstance(m, FSDPModule)])
    num_units, width = len(groups(network)), network.config.cross_attention_dim
    added = network.config.projection_class_embeddings_input_dim
    added -= 6 * network.config.addition_time_embed_dim
    given = (
        torch.ones(1, 4, 16, 16),
        torch.ones(1),
        torch.ones(1, 3, width),
        {"text_embeds": torch.ones(1, added), "time_ids": torch.ones(1, 6)},
    )
    same(up, 4)  # two blocks, and two attentions in one of them
    for _ in range(2):
        with collectives() as seen:
            features = network.encode(*given)
        same(seen, [(GATHER, torch.float32)] * (num_units - up))
        assert all(group._all_gather_result is None for group in groups(network))
        with collectives() as seen:
            features.square().mean().backward()
        half = num_units - up
        same(sorted(seen), [(GATHER, torch.float32)] * half + [(REDUCE, torch.float32)] * half)
    with collectives() as seen, torch.no_grad():
        network(*given[:3], added_cond_kwargs=given[3])
    same(seen, [(GATHER, torch.float32)] * num_units)


def check_on_two(ranks: Ranks, folder: Path, sdxl_folder: Path) -> None:
    check_collectives(ranks, folder)
    check_types(ranks, folder)
    check_prefetch(ranks, folder)
    check_accumulation(ranks, folder)
    check_record(ranks, folder)
    check_kept(ranks, folder)
    check_encoder_pass(ranks, sdxl_folder)


def test_collectives_precision_prefetch_and_accumulation_on_two_ranks(folder, sdxl_folder):
    on_ranks(2, check_on_two, folder, sdxl_folder)


def check_alone(ranks: Ranks, folder: Path) -> None:
    """On one rank what is frozen is not gathered, in its own type; what learns, or is cast, is."""
    settings, config = settings_of(folder, torch.bfloat16), config_of("bfloat16")
    teacher = build_network(FLUX.teacher(settings), config, ranks)
    same(groups(teacher), [])
    source = FLUX.teacher(settings)
    sharded = shard(source.network, source.blocks, ranks.mesh, torch.bfloat16)
    fill_shards(sharded, source.read, CPU)
    adapter = FluxAdapter(None, FlowPath(), (4, 8, 8), settings)
    x_t, cond = torch.randn(1, 4, 8, 8), Conditioning(torch.randn(1, 4, 8), torch.randn(1, 8))
    t, scale = torch.tensor([0.7]), torch.tensor([3.5])
    with torch.no_grad():
        found, expected = (
            adapter.predict_guided(n, x_t, t, cond, scale) for n in (teacher, sharded)
        )
    assert torch.equal(found, expected) and found.abs().max() > 0
    same(len(groups(build_network(FLUX.student(settings), config, ranks))), NUM_UNITS)
    same(len(groups(build_network(FLUX.teacher(settings_of(folder)), config, ranks))), NUM_UNITS)


def test_a_frozen_network_on_one_rank_is_not_gathered(folder):
    on_ranks(1, check_alone, folder)


def whole(source: NetworkSource) -> nn.Module:
    """The same network without sharding."""
    fill_shards(source.network, source.read, CPU)
    return source.network


def check_hsdp(ranks: Ranks, folder: Path) -> None:
    """Two steps on 2 replicas x 2 shards are those of one network on the whole batch."""
    same(ranks.mesh.mesh_dim_names, ("replicate", "shard"))
    same(ranks.mesh.shape, (2, 2))
    network = build_network(FLUX.student(settings_of(folder)), config_of(), ranks)
    reference = whole(FLUX.student(settings_of(folder)))
    steps = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (network, reference)]
    for step in range(2):
        loss_of(reference, torch.float32, [4 * step + rank for rank in range(4)]).backward()
        with collectives() as seen:
            loss_of(network, torch.float32, [4 * step + ranks.rank]).backward()
        for name in (REDUCE, "all_reduce"):  # over the shards, then over the replicas
            same(seen.count((name, torch.float32)), NUM_UNITS)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    with_start = whole(FLUX.student(settings_of(folder)))
    moved = 0.0
    for ours, theirs, start in zip(
        network.parameters(), reference.parameters(), with_start.parameters(), strict=True
    ):
        assert ours.to_local().shape[0] in (-(-len(theirs) // 2), len(theirs) // 2)
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((theirs - start).abs().max()))
    assert moved > 1e-3


@pytest.mark.long
def test_hsdp_on_four_ranks_is_one_network(folder):
    on_ranks(4, check_hsdp, folder, replicas=2)


# ----------------------------------------------------------------------------------------- filling


class Masked(nn.Module):
    """A layer with a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(2), persistent=False)


def test_a_buffer_that_nothing_fills_is_refused():
    with torch.device("meta"):
        network = Masked()
    shard(network, [], start_ranks().mesh)
    weights = {"linear.weight": torch.ones(2, 2), "linear.bias": torch.ones(2)}
    with pytest.raises(ValueError, match="mask is neither in the weights nor computed"):
        fill_shards(network, weights.__getitem__, CPU)
    fill_shards(network, (weights | {"mask": torch.full((2,), 3.0)}).__getitem__, CPU)
    assert network.mask.tolist() == [3.0, 3.0]


def heads() -> tuple[nn.Module, Callable[[], nn.Module], str]:
    return Heads(3, 16, 6, reference=True, seed=4), lambda: Heads(3, 16, 6, True, seed=4), "heads"


def classifier() -> tuple[nn.Module, Callable[[], nn.Module], str]:
    return ClassifierHead(8, 2, 4, seed=4), lambda: ClassifierHead(8, 2, 4, seed=4), "layers"


@pytest.mark.parametrize("parts", [heads, classifier])
def test_new_heads_in_shards_are_those_made_in_one_piece(parts):
    """Weights and the buffers of spectral norm, bit for bit; torch's own generator is untouched."""
    whole, make, name = parts()
    with torch.device("meta"):
        sharded = make()
    state = torch.get_rng_state()
    shard(sharded, [], start_ranks().mesh)
    fill_shards(sharded, in_turn(name, sharded.draw()), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = sharded.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(getattr(tensor, "full_tensor", lambda t=tensor: t)(), theirs[key]), key
