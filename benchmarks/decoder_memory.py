"""What the way back through the VAE's decoder holds and costs at full size, one image of 1024 px.

    python -m benchmarks.decoder_memory [--family flux ...] [--output FILE.md]

The published decoder in float32 on fake tensors, watched as a plan watches a run: with all that it
computes kept, recomputed as diffusers does it (an up-block at a time), and as a run does it with
each parallel.recomputation (`senseflow.engine.parallel.recompute_decoder`). Weights do not count.
"""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.full_size import fake
from senseflow.common.templates import markdown_table
from senseflow.config.recipes import FAMILIES
from senseflow.engine.parallel import recompute_decoder
from senseflow.plan.costs import GIB
from senseflow.plan.tracker import Tracker
from senseflow.teachers.adapter import Adapter
from senseflow.weights.meta import meta_network

# Of diffusers' common decoder; Qwen-Image's, of videos, is called another way.
TEACHERS = {family.name: family for family in FAMILIES if family.name != "qwen_image"}
WAYS = ("nothing recomputed", "up-blocks, by diffusers", "selective", "full")


def work(vae: Any, way: str) -> list[str]:
    """A row: GiB kept after the forward, GiB at the worst moment, TFLOP of both ways."""
    mode, tracker = FakeTensorMode(allow_non_fake_inputs=True), Tracker()
    fake(vae.requires_grad_(False), mode)
    if way == WAYS[1]:
        vae.train().enable_gradient_checkpointing()
    elif way in WAYS[2:]:
        stages = Adapter.decoder_stages if way == "full" else ()
        recompute_decoder(vae.decoder, Adapter.decoder_blocks + stages, Adapter.decoder_norms)
    tracker.mark([*vae.parameters(), *vae.buffers()], "parameters")
    with mode, tracker:
        before = tracker.now
        channels = vae.config.latent_channels
        latents = torch.empty(1, channels, 128, 128, requires_grad=True)
        image: Tensor = vae.decode(latents, return_dict=False)[0]
        kept = tracker.now - before
        image.sum().backward()
    (cost,) = tracker.phases.values()
    figures = kept / GIB, (cost.peak - before) / GIB
    return [way, *(f"{figure:.2f}" for figure in figures), f"{cost.flops / 1e12:.2f}"]


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=TEACHERS, default=["flux"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.family:
        config = TEACHERS[name].published.vae
        cls: type[nn.Module] = getattr(diffusers, config["_class_name"])
        rows += [[name, *work(meta_network(cls, config), way)] for way in WAYS]
    table = markdown_table(["teacher", "decoder", "GiB kept", "GiB at most", "TFLOP"], rows)
    if args.output:
        args.output.write_text(table)
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
