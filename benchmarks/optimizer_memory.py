"""Bytes that a network which learns takes, at full size, for every type of masters and moments.

    python -m benchmarks.optimizer_memory [--network NAME ...] [--output FILE.md]

The students are built from the real configurations, given gradients, and moved once by
`Trained`'s own optimizer on fake tensors (shapes and types without memory); what is counted are the
bytes of the tensors that are there afterwards: parameters, gradients, and the optimizer's state. A
run holds two such networks, sharded over its GPUs.
"""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.full_size import fake
from senseflow.common.templates import markdown_table
from senseflow.config.recipes import FAMILIES
from senseflow.config.sections import OptimizerConfig
from senseflow.engine.parallel import keep_parameters_in
from senseflow.optim import stretches
from senseflow.optim.trained import Trained
from senseflow.teachers.family import Family
from senseflow.weights.meta import meta_network

TEACHERS = {family.title: family for family in FAMILIES}
KINDS = [(m, s) for m in ("float32", "bfloat16") for s in ("float32", "bfloat16", "8bit")]


def student_of(family: Family) -> tuple[type[ModelMixin], dict[str, Any]]:
    """The class and config of a full-size student: the teacher's without a guidance embedding."""
    config = family.fit_config(family.published.denoiser, [])
    return getattr(diffusers, family.network_class), config


def held(name: str, masters: str, states: str) -> tuple[int, int, int, int]:
    """Number of parameters; bytes of them, of their gradients and of the optimizer's state."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    network = meta_network(*student_of(TEACHERS[name]))
    keep_parameters_in(network, {"float32": torch.float32, "bfloat16": torch.bfloat16}[masters])
    fake(network, mode)
    config = OptimizerConfig(lr=1e-5, fake_score_lr=1e-5, discriminator_lr=1e-5, states=states)
    parameters = list(network.parameters())
    with mode:
        trained = Trained.build(network, config.lr, config)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        gradients = sum(p.grad.nbytes for p in parameters)
        trained.optimizer.step()
        state = sum(v.nbytes for s in trained.optimizer.state.values() for v in s.values())
    return (
        sum(p.numel() for p in parameters),
        sum(p.nbytes for p in parameters),
        gradients,
        state,
    )


def report(names: list[str]) -> str:
    """A row per kind: bytes per parameter (of the first network), GB of two networks of each."""
    heads = ["masters", "moments", "parameters", "gradients", "moments", "sum"]
    heads += [f"{name}, GB" for name in names]
    rows = []
    for masters, states in KINDS:
        counted = [held(name, masters, states) for name in names]
        num, *parts = counted[0]
        row = [masters, states, *(f"{part / num:.2f}" for part in (*parts, sum(parts)))]
        row += [f"{2 * sum(bytes_of) / 1e9:.1f}" for _, *bytes_of in counted]
        rows.append(row)
    return markdown_table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network", nargs="+", choices=list(TEACHERS), default=list(TEACHERS), help="which ones"
    )
    parser.add_argument("--output", type=Path, help="write the table there too")
    args = parser.parse_args()
    stretches.GROUP = 2**40  # nothing is computed: all elements at once
    text = report(args.network)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
