"""Processes, devices and sharding: one path of numerics from one CPU process to many nodes.

Student, fake score, teacher, text encoders and the discriminator's heads are sharded with FSDP2, on
one rank too. They are built on the meta device, sharded there, and filled tensor by tensor: of a
weights file a rank reads its own rows alone, and of new heads it draws one layer or head at a time,
so no rank ever holds a whole network. VAE, DINOv2 and the discriminator's CLIP are small and whole.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from torch.utils.flop_counter import flop_registry

from senseflow.engine.recomputation import Contexts, spare_products


def shard(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
    prefetch: bool = True,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """FSDP2: one unit per block and one for the rest; parameters become DTensors.

    blocks: in the order in which they run; one that holds others comes before them. offload: shards
    and their gradients stay in host memory (pinned, beside a GPU) and are copied to the device when
    they are gathered.

    reshard_after_forward: false keeps every unit, once gathered, until
    `senseflow.optim.resharding.reshard`, through backwards too. True, the root reshards as well:
    IDA and the optimizer write the shards between two forwards of one network, and a gathered copy
    left behind would be stale.

    Gradients are reduced in float32. Inputs are not cast: the network's time must reach it in the
    adapter's own type.

    Prefetch: in a forward each unit gathers the next one before it computes, so that the two
    overlap also where the host is no faster than the device, and two units are whole at a time; not
    for blocks that run one at a time, each to the end of its backward, which drops the next one. In
    a backward FSDP2's own rule stays: the unit whose forward was recorded before. It is the same
    order, and right for a pass through half a network (DMD2's) too. The record is cleared at the
    end of a backward; a network without any would keep every forward's, so a frozen one forgets it.
    """
    # Sums over ranks in float32: in bfloat16 small gradients vanish beside large ones.
    # Inputs uncast: 904.5 would reach the network as 904.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    pinned = mesh.device_type == "cuda"
    place = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    units = [network, *blocks]
    # Not None, with which a root would stay gathered, and a copy stale that IDA and AdamW outdate.
    reshard = reshard_after_forward
    for unit in reversed(units):  # an inner one before the one around it
        sharded = fully_shard(
            unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=place
        )
        sharded.set_reshard_after_backward(reshard, recurse=False)
    for first, following in pairwise(cast(list[FSDPModule], units) if prefetch else []):
        first.set_modules_to_forward_prefetch([following])
    if not any(p.requires_grad for p in network.parameters()):
        network.register_forward_hook(forget_forward)
    return network


def forget_forward(network: nn.Module, args: Any, output: Any) -> None:
    """Clear the record of a forward that no backward will follow."""
    if torch.is_grad_enabled():
        return
    # What the end of a backward clears. The public reset_iter_state of later torch than 2.11
    # reshards as well, and a network may be kept gathered.
    state = cast(Any, network)._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for inner in state._state_ctx.all_states:
        if inner._fsdp_param_group is not None:
            inner._fsdp_param_group._post_forward_indices.clear()


def recompute(
    blocks: Sequence[nn.Module],
    every: int,
    selective: bool = False,
    context: Contexts = noop_context_fn,
) -> None:
    """Activation checkpointing of every `every`-th block; 0: of none.

    context: made at each first run, the contexts of that run and of the second.

    Such a block keeps its inputs alone and runs again on the way back; the others keep their
    activations. selective: it also keeps what matrix products, convolutions and attention gave, so
    that the second run is of norms, activations and the like: no counted FLOP is spent twice.
    The second run is of the block's own forward, inside FSDP2's hooks: its weights have been
    gathered for the backward, and no collective is added. Nothing random is drawn in it.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=context)
    for block in blocks[every - 1 :: every] if every else ():
        # Its forward and no wrapper around it: keys stay diffusers', and FSDP2's hooks outside.
        if selective:
            spare_products(block, context)
        else:
            block.forward = partial(again, block.forward)


def recompute_decoder(
    decoder: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    norms: Mapping[type[nn.Module], tuple[tuple[str, str], ...]],
) -> None:
    """Recompute a VAE's decoder on the way back, a residual block at a time; gradients are the same
    to the bit.

    kinds: its residual blocks and the like, and, where even their inputs are not to be kept, what
    holds several of them: it is run again first. norms: by a part's kind the names of its norms,
    each with that of the activation behind it; both together keep the norm's input alone, and are
    run again by themselves within a block's second run.
    """
    blocks = []
    for part in decoder.modules():
        pairs = norms.get(type(part), ())
        forwards = {name: getattr(part, name).forward for pair in pairs for name in pair}
        for norm, activation in pairs:
            getattr(part, norm).forward = partial(_both, forwards[norm], forwards[activation])
            getattr(part, activation).forward = _nothing
            recompute([getattr(part, norm)], every=1)
        if isinstance(part, kinds):
            blocks.append(part)
    assert blocks, f"{type(decoder).__name__} has none of the adapter's decoder_blocks"
    recompute(blocks, every=1)


def _both(norm: Callable[..., Tensor], activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return activation(norm(x))


def _nothing(x: Tensor) -> Tensor:
    return x


def compile_blocks(blocks: Sequence[nn.Module], every: int, selective: bool = False) -> None:
    """Compile each block, with its recomputation (`recompute`) in what is compiled.

    FSDP2's hooks stay outside. What is compiled takes the block as an argument: all of one class
    and shapes share it. It is compiled once for every way they are called: with and without
    gradients, by each role of a LoRA run (the list of active adapters is looked at before every
    call), alone and as both halves of CFG, in training and in an image strip.
    """
    torch._dynamo.config.recompile_limit = 256  # per function: classes, shapes, roles, ways to call
    contexts = {"context_fn": kept_products} if selective else {}
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, **contexts)

    def compiled(cls: type[nn.Module], recomputed: bool) -> Any:
        # Its class's forward by name: dynamo does not look one up by type(block) in every class.
        forward: Any = cls.forward

        def run_again(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return again(forward, block, *args, **kwargs)

        return torch.compile(run_again if recomputed else forward, dynamic=False)

    classes = {type(block) for block in blocks}
    forwards = {(c, r): compiled(c, r) for c in classes for r in (False, True)}
    for number, block in enumerate(blocks, 1):
        recomputed = bool(every) and number % every == 0
        block.forward = partial(forwards[type(block), recomputed], block)


def kept_products() -> tuple[Any, Any]:
    """Torch's own contexts of selective checkpointing, which a compiler reads."""
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(keep_products)
    return contexts


def keep_products(
    context: SelectiveCheckpointContext, op: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Keep the outputs of the operations that torch counts FLOPs of."""
    counted = op.overloadpacket in flop_registry
    return CheckpointPolicy.MUST_SAVE if counted else CheckpointPolicy.PREFER_RECOMPUTE


def keep_parameters_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of the parameters of a meta network; buffers keep theirs."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
