"""How much is imported before what, and that it asks no device: what runs afterwards is a fork."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from senseflow.launch.entry import settle_environment
from senseflow.launch.launch import count_gpus
from senseflow.tiny.pictures import write_dataset

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "timm", "open_clip", "scipy")
LAUNCH = """
import sys
from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main
for line in {lines!r}:
    sys.argv = ["script", *line.split()]
    try:
        main(RECIPES["flux_senseflow"])
    except SystemExit as end:
        print(end, [name for name in {names!r} if name in sys.modules])
"""
CONFIG = "configs/FLUX/flux_senseflow_tiny.yaml"
WRONG = [  # a line, what is said of it, and what is imported by then
    (f"1 1 {CONFIG} runs/none dmd.wieght=1", "unknown key dmd.wieght", []),
    (f"1 0 {CONFIG} runs/none", "2 ", []),  # the exit status: argparse says it
    (f"1 1 {CONFIG} runs/none paths.dataset=nowhere.json", "nowhere.json", ["torch"]),
    (f"1 1 {CONFIG} runs/none paths.pretrained_model=nowhere", "nowhere", ["torch"]),
]


def run(program: str) -> str:
    """What a Python process of its own says."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_what_is_wrong_is_answered_before_the_slow_imports():
    """In one process, what needs least first."""
    said = run(LAUNCH.format(lines=[line for line, *_ in WRONG], names=LIBRARIES)).splitlines()
    for (_, message, imported), answer in zip(WRONG, said, strict=True):
        assert message in answer and answer.endswith(f"{imported}")


WORKER = """
import sys
import torch
asked = []
for place, names in [
    (torch.cuda, ["is_available", "device_count", "_lazy_init", "_raw_device_count_nvml"]),
    (torch._C, ["_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_init"]),
]:
    for name in names:
        assert hasattr(place, name), name
        setattr(place, name, lambda *args, name=name: asked.append(name))
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.engine.inputs import read_run
from senseflow.launch.launch import load_libraries
recipe = RECIPES[{recipe!r}]
overrides = [{dataset!r}, "lora.rank=4", "lora.base=nf4"]
inputs = read_run(load_config({config!r}, overrides), recipe.family)
load_libraries(inputs, num_gpus=8)
print(asked)
print([name for name in {names!r} if name in sys.modules])
"""
UNNEEDED = (  # by any recipe: of other commands, or of rank 0 where it writes
    "bitsandbytes",  # of the forks: it asks for the GPU
    *("matplotlib", "sklearn", "pandas", "tensorboard", "torch.utils.tensorboard", "gradio"),
    *("torchmetrics", "torch_fidelity", "IPython", "diffusers.pipelines.stable_diffusion_3"),
)


def test_what_the_processes_share_asks_no_device_and_is_no_more_than_they_need(tmp_path):
    """As on a machine with eight GPUs, of which nothing but their number is told."""
    write_dataset(tmp_path, num=2, seed=0, num_prompts=2)
    of_others = ("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",)
    said = run(
        WORKER.format(
            recipe="flux_senseflow",
            config=CONFIG,
            dataset=f"paths.dataset={tmp_path}/data.json",
            names=(*UNNEEDED, *of_others),
        )
    )
    assert said == "[]\n[]\n"


def test_the_trainer_modules_import_neither_torch_nor_numpy():
    said = run(
        "import sys\n"
        "import senseflow.trainer.trainer_flux_senseflow\n"
        "import senseflow.trainer.trainer_sdxl_DMD2\n"
        "print([name for name in ('torch', 'numpy', 'yaml') if name in sys.modules])"
    )
    assert said == "['yaml']\n"


def no_answer() -> int:
    raise RuntimeError("the driver is too old")


def killed() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.parametrize("fails", [no_answer, killed])
def test_gpus_that_cannot_be_counted_are_no_run_on_the_cpu(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", fails)
    with pytest.raises(ValueError, match="could not be counted"):
        count_gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert count_gpus() == 3


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_the_launcher_lets_the_allocator_grow_unless_the_user_says_how(own, kept, monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3", **own})
    settle_environment(processes=2)
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == kept
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("end", ["leave_group()", ""])
def test_the_process_group_is_left_at_the_end(end):
    said = run(
        "import atexit\n"
        "import torch.distributed as dist\n"
        "from senseflow.common.ranks import join_group, leave_group\n"
        "atexit.register(lambda: print(dist.is_initialized()))\n"  # runs last
        "join_group()\n"
        "print(dist.is_initialized())\n" + end
    )
    assert said == "True\nFalse\n"


@pytest.mark.parametrize(("own", "holds"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_idle_threads_do_not_spin_unless_the_user_says_so(own, holds):
    # What libgomp has read, by its own words, when torch is loaded.
    environment = {**os.environ, "OMP_DISPLAY_ENV": "true", "OMP_WAIT_POLICY": own or ""}
    if own is None:
        del environment["OMP_WAIT_POLICY"]
    program = [sys.executable, "-c", "import senseflow.common.devices"]
    said = subprocess.run(program, env=environment, capture_output=True, text=True).stderr
    assert f"OMP_WAIT_POLICY = '{holds}'" in said
