"""CPU time of the host for a denoiser's passes: what a GPU waits for where its kernels are short.

    python -m benchmarks.host [--config FILE.yaml ...] [--compiled] [--repeats 5] [--output FILE.md]

The denoiser of each recipe of FLUX.1, SD3.5 and SDXL with its real blocks, their kinds and their
number, 32 wide on 16 tokens, so that operations cost what it costs to start them; sharded by the
run's own code (FSDP2, one process with gloo), called by the run's own adapter. CPU milliseconds of
the process (one thread, the least of --repeats) for a forward with gradients, its backward and a
forward without, under every kind of recomputation, eager and, with --compiled, by torch.compile's
inductor after it has compiled.

ATen operations are counted in the eager forward. The milliseconds of a unit are what sharding adds
to a forward and a backward, divided by the units. The mean iteration is made of a network's passes
as the recipe asks for them (docs/benchmarks.md): k simulated steps and, on a plain turn, the
student without gradients and the fake score both ways; on a generator's turn both of them both
ways, and teacher and fake score without gradients for each of DMD and ISG. Both halves of
classifier-free guidance are one pass.

Where networks stay gathered (parallel.reshard_after_forward: false), a network is resharded and
gathered anew once after each of its steps, and the fake score once more after IDA.
"""

import argparse
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.common.commands import number
from senseflow.common.fields import Count
from senseflow.common.files import ROOT
from senseflow.common.quiet import quiet_libraries
from senseflow.common.ranks import start_ranks
from senseflow.common.templates import markdown_table
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.config.sections import ParallelConfig
from senseflow.core.path import FlowPath, VPPath
from senseflow.engine.build import lighten
from senseflow.engine.parallel import shard
from senseflow.optim.resharding import reshard
from senseflow.plan.tracker import Tracker
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.family import Family
from senseflow.teachers.folder import TeacherSettings
from senseflow.weights.meta import NetworkSource

WIDTH, TOKENS, SIDE = 32, 16, 8
NARROW: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": dict(
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=[4, 6, 6],
    ),
    "SD3Transformer2DModel": dict(
        sample_size=SIDE,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIDE,
    ),
    "UNet2DConditionModel": dict(
        sample_size=SIDE,
        block_out_channels=[WIDTH, WIDTH, WIDTH],
        attention_head_dim=[2, 2, 2],
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    ),
}
logger = logging.getLogger(__name__)
RECOMPUTED = {"nothing": (0, "full"), "full": (1, "full"), "selective": (1, "selective")}


@dataclass(frozen=True)
class Passes:
    """CPU seconds of a network's three passes."""

    forward: float  # with gradients
    backward: float
    no_grad: float
    anew: float = 0  # what a pass takes more after resharding; 0: every pass gathers

    def mean(self, config: Config) -> float:
        """Of an iteration, as the recipe draws its turns, anchors and simulation."""
        anchors = config.anchors.times
        simulated = config.backward_simulation.probability * (len(anchors) - 1) / 2
        terms = (config.dmd.weight > 0) + (config.isg.weight > 0)
        often, both = 1 / config.fake_score.ttur, self.forward + self.backward
        generator, plain = both + 2 * terms * self.no_grad, self.no_grad
        passes = simulated * self.no_grad + both + often * generator + (1 - often) * plain
        changes = 1 + often + often * (config.ida.lam is not None)
        return passes + changes * self.anew


def narrow(family: Family) -> NetworkSource:
    """The family's published denoiser, all of its blocks, little in each."""
    made = family.networks()
    config = family.published.denoiser
    config = config | NARROW[config["_class_name"]]
    network: Any = made.network_class.from_config(config)
    return NetworkSource(network, no_weights, made.blocks_of(network), made.repeated_of(network))


def no_weights(key: str) -> Any:
    """They are random here."""
    raise KeyError(key)


def call_of(family: Family) -> Callable[[nn.Module], Tensor]:
    """One sample through a network, by the family's adapter."""
    settings = TeacherSettings(
        Path(), (8 * SIDE, 8 * SIDE), TOKENS, None, torch.float32, torch.float32
    )
    vp = family.component == "unet"
    channels = 4 if vp else 16
    path = VPPath(torch.linspace(0.999, 0.005, 1000)) if vp else FlowPath()
    adapter = family.networks().adapter(None, path, (channels, SIDE, SIDE), settings)
    cond = Conditioning(torch.randn(1, TOKENS, WIDTH), torch.randn(1, WIDTH))
    x_t, t = torch.randn(1, channels, SIDE, SIDE), torch.tensor([500.0 if vp else 0.5])
    return lambda network: adapter.predict(network, x_t, t, cond)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the process's own CPU seconds."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


def passes(network: nn.Module, call: Callable[[nn.Module], Tensor], repeats: int) -> Passes:
    """The least of so many, after two that warm up."""

    def once() -> tuple[float, ...]:
        output, forward = timed(lambda: call(network))
        loss = output.square().mean()
        backward = timed(loss.backward)[1]
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            _, no_grad = timed(lambda: call(network))
            _, freed = timed(lambda: reshard(network))
            _, first = timed(lambda: call(network))
        return forward, backward, no_grad, freed + first

    found = [once() for _ in range(2 + repeats)][2:]
    forward, backward, no_grad, first = (min(times) for times in zip(*found, strict=True))
    return Passes(forward, backward, no_grad, first - no_grad)


def measured(
    config: Config, parallel: ParallelConfig, repeats: int, sharded: bool = True
) -> Passes:
    """The passes of the recipe's denoiser, made anew."""
    family = RECIPES[config.recipe].family
    gc.collect()
    torch._dynamo.reset()
    source = narrow(family)
    lighten(source, parallel)
    if sharded:
        reshards, mesh = parallel.reshard_after_forward, start_ranks().mesh
        shard(source.network, source.blocks, mesh, reshard_after_forward=reshards)
    found = passes(source.network, call_of(family), repeats)
    return replace(found, anew=0) if parallel.reshard_after_forward else found


def rows_of(config: Config, compiled: bool, repeats: int) -> list[list[str]]:
    """A line for each way to run a recipe's denoiser."""
    source = narrow(RECIPES[config.recipe].family)
    with Tracker() as tracker:
        call_of(RECIPES[config.recipe].family)(source.network)
    operations = sum(cost.operations for cost in tracker.phases.values())
    units = 1 + len(source.blocks)
    nothing = replace(config.parallel, activation_checkpointing=0, compile=False)
    alone = measured(config, nothing, repeats, sharded=False)
    rows = []
    for compile in (False, True)[: 1 + compiled]:
        for (name, (every, how)), reshards in product(RECOMPUTED.items(), (True, False)):
            parallel = replace(
                nothing,
                activation_checkpointing=every,
                recomputation=how,
                compile=compile,
                reshard_after_forward=reshards,
            )
            found = measured(config, parallel, repeats)
            times = (found.forward, found.backward, found.no_grad, found.anew, found.mean(config))
            kinds = [name, "compiled" if compile else "eager", "" if reshards else "gathered"]
            rows.append([*kinds, *map(milliseconds, times)])
            logger.info("%s", " ".join([config.recipe, *rows[-1]]))
    sharding = float(rows[0][3]) + float(rows[0][4]) - 1e3 * (alone.forward + alone.backward)
    facts = [
        f"{config.recipe}, {operations:,} operations, {units} units",
        f"{1e6 * alone.forward / operations:.1f} us an operation, {sharding / units:.2f} ms a unit",
    ]
    blank = [""] * max(0, len(rows) - len(facts))
    return [[fact, *row] for fact, row in zip([*facts, *blank], rows, strict=True)]


def milliseconds(seconds: float) -> str:
    """Whole ones."""
    return f"{1e3 * seconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=Path, nargs="+", help="YAMLs (those of FLUX.1, SD3.5 and SDXL)"
    )
    parser.add_argument("--compiled", action="store_true", help="by inductor too; minutes")
    parser.add_argument("--repeats", type=number(Count), default=5, help="of which the least (5)")
    parser.add_argument("--output", type=Path, help="markdown file to write to")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    quiet_libraries()
    torch.set_num_threads(1)
    narrow_ones = [r for r in RECIPES.values() if r.family.network_class in NARROW]
    files = [ROOT / recipe.config for recipe in narrow_ones]
    # Those with rewards have the networks of their recipes without.
    files = args.config or [f for f in files if not load_config(f).reward.in_use]
    rows = [row for f in files for row in rows_of(load_config(f), args.compiled, args.repeats)]
    heads = ["recipe", "recomputed", "", "", "forward, ms", "backward", "without gradients"]
    text = markdown_table([*heads, "gathered anew", "mean iteration"], rows)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
