"""Whole iterations on fake CUDA tensors: nothing is where it does not belong, and the host waits
for the device nowhere but where a table says why.

Forward, backward, steps, IDA and EMA are the run's own, on rank 0 of two; each case in a process of
its own, because a process group and CUDA's guard are the process's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp
from fake_cuda import Watch, fake_cuda

from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.distill import algorithm
from senseflow.distill.measures import Measures
from senseflow.plan.blank import PlanData
from senseflow.plan.plan import Wanted, configure
from senseflow.plan.rehearsal import Kind, Rehearsal, rehearse

NORM = "one number, of shards on the host: the sum over ranks is NCCL's"
DOWN = "FSDP2 waits for gradients that come down, before AdamW on the host"
ADDED = "FSDP2 waits for gradients that it adds to those on the host: of a micro-batch, or a loss"
TABLE = "a network's tables of positions, no buffers in diffusers: once, at its first forward"
ONCE = {  # (what, where): why
    ("a copy of pageable memory", "teachers/z_image/adapter.py predict"): TABLE,
    ("a copy of pageable memory", "teachers/qwen_image/adapter.py predict"): TABLE,
    ("a copy of pageable memory", "weights/lora.py forward"): TABLE,  # of both, with adapters
}
HEADS_AWAY = {  # all of it with parallel.offload=heads
    ("a copy of pageable memory", "optim/trained.py total_norm"): NORM,
    ("a copy that is waited for", "optim/trained.py total_norm"): NORM,
    ("Event.synchronize", "distill/algorithm.py discriminator_backward"): DOWN,
    ("a copy that is waited for", "distill/algorithm.py discriminator_backward"): ADDED,
}
TRAINED_AWAY = HEADS_AWAY | {  # with parallel.offload=trained; DMD2's L_D is a loss of phi too
    ("Event.synchronize", "distill/algorithm.py generator_backward"): DOWN,
    ("Event.synchronize", "distill/algorithm.py fake_score_backward"): DOWN,
    ("a copy that is waited for", "distill/algorithm.py generator_backward"): ADDED,
    ("a copy that is waited for", "distill/algorithm.py fake_score_backward"): ADDED,
}
"""Where the host waits, or hands a kernel a tensor of its own."""

FLUX = "configs/FLUX/flux_senseflow_tiny.yaml"
MEDIUM = "configs/SD35/sd35_senseflow_tiny.yaml"
LARGE = "configs/SD35/sd35_large_senseflow_tiny.yaml"
SDXL = "configs/sdxl/sdxl_senseflow_tiny.yaml"
DMD2 = "configs/sdxl/sdxl_dmd2_tiny.yaml"
KLEIN = "configs/FLUX2/flux2_klein_senseflow_tiny.yaml"
Z_IMAGE = "configs/Z-Image/z_image_senseflow_tiny.yaml"
QWEN_IMAGE = "configs/Qwen-Image/qwen_image_senseflow_tiny.yaml"
TEACHERS = {
    FLUX: "flux_folder",
    MEDIUM: "sd35_folder",
    LARGE: "sd35_large_folder",
    SDXL: "sdxl_folder",
    DMD2: "sdxl_folder",
    KLEIN: "flux2_folder",
    Z_IMAGE: "z_image_folder",
    QWEN_IMAGE: "qwen_image_folder",
}
GPU = (
    "parallel.compile=false",  # fakes are not compiled
    "precision.compute=bfloat16",
    "precision.heads=bfloat16",
    "train.batch_size=4",
)
HEADS = ("adversarial.taps=[0]",)
CHAT = (*HEADS, "data.max_sequence_length=40")  # of the published templates
SMALL = {
    DMD2: ("adversarial.norm_groups=4",),
    **dict.fromkeys((KLEIN, Z_IMAGE, QWEN_IMAGE), CHAT),
}
FEW_BITS = ("precision.masters=bfloat16", "optimizer.states=8bit")
HEAD_BITS = ("precision.head_masters=bfloat16", "optimizer.head_states=8bit")
TWICE = ("train.grad_accumulation=2", "ema.decay=0.9", "parallel.activation_checkpointing=1")
OFFLOAD, HEADS_OFFLOAD = "parallel.offload=trained", "parallel.offload=heads"
NAMED = {OFFLOAD: TRAINED_AWAY, HEADS_OFFLOAD: HEADS_AWAY}
LORA = ("lora.rank=4",)
GUIDED = {FLUX: ("student.guidance=3.5",)}  # what FLUX's adapters are fed

TOP, FROM_DATA, SIMULATED = (
    Kind(True, anchor, simulate, 4) for anchor, simulate in ((0, False), (1, False), (2, True))
)
PLAIN = Kind(False, 1, False, 4)


@dataclass(frozen=True)
class Case:
    """A recipe's YAML, overrides, what it reads, and its iterations."""

    config: str
    kinds: tuple[Kind, ...]
    overrides: tuple[str, ...] = ()
    data: PlanData = "images"


def cases(config: str) -> dict[str, Case]:
    """Full and LoRA, with every way to keep states, and all kinds of iterations."""
    lora, every = (*LORA, *GUIDED.get(config, ())), (TOP, FROM_DATA, SIMULATED, PLAIN)
    two = (SIMULATED, PLAIN)
    return {
        "full": Case(config, every, TWICE),
        "few bits": Case(config, two, (*FEW_BITS, *TWICE), "cached"),
        "offload": Case(config, two, (OFFLOAD, *TWICE)),
        "offload, few bits": Case(config, two, (OFFLOAD, *FEW_BITS)),
        "heads": Case(config, two, (HEADS_OFFLOAD, *TWICE)),
        "lora": Case(config, every, (*lora, *TWICE)),
        "lora, few bits": Case(config, two, (*lora, FEW_BITS[1]), "cached"),
        "lora, heads": Case(config, two, (*lora, HEADS_OFFLOAD, *HEAD_BITS)),
    }


FAST = {  # all of an iteration but the adversary of images, whose operations are many
    "flux": Case(FLUX, (TOP,), ("adversarial.kind=none", "ema.decay=0.9")),
    "medium, lora": Case(MEDIUM, (TOP,), ("adversarial.kind=none", *LORA)),
}
LONG = {f"{Path(f).stem}, {k}": case for f in TEACHERS for k, case in cases(f).items()}
CASES = [*FAST, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]


def rehearsed(
    case: Case, teacher: Path, folder: Path, use: Callable[[Rehearsal, Watch], None]
) -> None:
    """Use the parts of a run on a fake GPU."""
    heads = SMALL.get(case.config, HEADS)
    overrides = (*GPU, *heads, *case.overrides, f"paths.pretrained_model={teacher}")
    recipe = RECIPES[load_config(Path(case.config)).recipe]
    torch.set_num_threads(1)
    with fake_cuda() as watch:
        config, _ = configure(recipe, Wanted(Path(case.config), overrides, 1, 2), folder)
        with rehearse(config, recipe.family, 2, case.data) as rehearsal:
            use(rehearsal, watch)


def iterate(rehearsal: Rehearsal, watch: Watch, kind: Kind) -> None:
    """What is found in one iteration is in `watch.found`."""
    turn = kind.turn(rehearsal.parts)
    with rehearsal.mode, watch:
        algorithm.take_turn(rehearsal.parts, turn, rehearsal.micro_batches, Measures())


def look(_: int, case: Case, teacher: Path, folder: Path) -> None:
    """Every kind of iteration."""

    def every_kind(rehearsal: Rehearsal, watch: Watch) -> None:
        watch.found.clear()  # of the start
        for kind in case.kinds:
            iterate(rehearsal, watch, kind)
        write(watch, folder / "found.json")

    rehearsed(case, teacher, folder, every_kind)


def write(watch: Watch, file: Path) -> None:
    file.write_text(json.dumps([[what, where, n] for (what, where), n in watch.found.items()]))


def read(file: Path, overrides: tuple[str, ...] = ()) -> list[tuple[str, str, int]]:
    """What was found and is not in the table."""
    found = json.loads(file.read_text())
    named = ONCE | next((NAMED[o] for o in overrides if o in NAMED), {})
    return [(what, where, n) for what, where, n in found if (what, where) not in named]


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_where_the_table_says(name, request, tmp_path):
    case = (FAST | LONG)[name]
    teacher = request.getfixturevalue(TEACHERS[case.config])
    mp.spawn(look, (case, teacher, tmp_path))
    assert read(tmp_path / "found.json", case.overrides) == []


def pageable(d, tensor):
    return tensor.to(d.device, non_blocking=True)


def on_the_host(t, num, device=None):
    return torch.full((num,), t)


def reading(measures, values):
    sum(value.item() for value in values.values())


MUTANTS = {
    "a pageable copy": (algorithm, "on_device", pageable, "a copy of pageable memory"),
    "a tensor of the host": (algorithm, "times", on_the_host, "takes a tensor of the host"),
    "an item": (Measures, "add", reading, "aten._local_scalar_dense waits for its result"),
}


def mutate(_: int, teacher: Path, folder: Path) -> None:
    """One iteration, and one with each mutant."""

    def every_mutant(rehearsal: Rehearsal, watch: Watch) -> None:
        for name, (target, attribute, mutant, _) in MUTANTS.items():
            watch.found.clear()
            # The wrong device also ends the iteration, after it was seen.
            with patch.object(target, attribute, mutant):
                try:
                    iterate(rehearsal, watch, TOP)
                except RuntimeError:
                    assert name == "a tensor of the host"
            write(watch, folder / f"{name}.json")

    case = Case(FLUX, (TOP,), ("adversarial.kind=none", "isg.weight=0"))
    rehearsed(case, teacher, folder, every_mutant)


@pytest.mark.long
def test_mutants_are_found(flux_folder, tmp_path):
    mp.spawn(mutate, (flux_folder, tmp_path))
    for name, (*_, expected) in MUTANTS.items():
        found = [what for what, _, _ in read(tmp_path / f"{name}.json")]
        assert any(expected in what for what in found), (name, found)
