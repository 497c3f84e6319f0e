"""The commands of the pages a newcomer reads, run as they are written on the embedded teachers.

Full-size weights and users' files, which the pages call /path/to/..., have embedded stand-ins, and
words are added that make a run short. What is not run here is run by the test that RUN_BY names.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from doc_pages import ROOT, Page, pages, shell_commands, tracked
from doc_programs import Program, program_of, start
from embedded import EMBEDDED
from python import PYTHON

from senseflow.tiny.pictures import write_dataset

READ = ["README.md", "docs/running.md", "docs/sampling.md", "docs/xi.md"]
STAND_INS = {
    "/path/to/FLUX.1-dev": "assets/tiny/flux/pipeline",
    "/path/to/stable-diffusion-xl-base-1.0": "assets/tiny/sdxl/pipeline",
    "/path/to/dataset.json": "runs/tiny_data/data.json",
    "/path/to/coco5k.json": "runs/tiny_data/prompts_heldout.txt",
    "/path/to/lmdb": "runs/lmdb",
    "configs/FLUX/flux_senseflow.yaml": "configs/FLUX/flux_senseflow_tiny.yaml",
    ".sh 1 8 ": ".sh 1 1 ",
    "step_0012000": "step_0000001",
    '"cuda"': '"cpu"',
    "num_inference_steps=4": "num_inference_steps=4, height=32, width=32",
}
ITERATION = [
    "train.iter_num=1", "train.batch_size=2", "train.log_interval=1", "fake_score.ttur=1",
    "lr_scheduler.warmup_iterations=0", "lr_scheduler.decay_iterations=0", "data.num_workers=0",
]  # fmt: skip
SHORTER = {
    "senseflow.tiny.pictures": ["--num", "8", "--num_prompts", "2"],
    "senseflow.reconstruction_error": [
        "--num_samples",
        "2",
        "--num_times",
        "2",
        "data.num_workers=0",
    ],
    "senseflow.data.check": ["--workers", "1"],
    "senseflow.data.convert": ["--resolution", "32"],
    "senseflow.evaluate": ["--teacher_steps", "2"],
}
RUN_BY = {
    # their own tests: long ones, and what needs weights that nothing stands in for
    "benchmarks.flops": "tests/test_flops.py",
    "benchmarks.gpu": "tests/test_gpu_script.py",
    "benchmarks.host": "tests/test_host.py",
    "benchmarks.images": "tests/data/test_json_images.py",
    "benchmarks.step": "tests/test_step.py",
    "examples/ida_gaussian.py": "tests/examples/test_ida_gaussian.py",
    "examples/toy_2d.py": "tests/examples/test_toy_2d.py",
    "docs/configuration.py": "tests/docs/test_doc_configuration.py",
    "scripts_sd35/test_senseflow_sd35_large.py": "tests/sampling/test_all_families.py",
    "scripts_sdxl/test_sdxl_dmd2.py": "tests/sampling/test_all_families.py",
    "scripts_sdxl/test_sdxl_senseflow.py": "tests/sampling/test_all_families.py",
    "benchmarks.optimizer_time": "tests/optim/test_optimizer_time.py",
    "senseflow.app": "tests/app/test_app.py",
    "senseflow.cache": "tests/cache/test_cache.py",
    "senseflow.data.check": "tests/data/test_check.py",
    "senseflow.data.make": "tests/data/test_captioned.py",
    "senseflow.evaluate": "tests/evaluate/test_generate.py",
    "senseflow.extract_lora": "tests/test_lora.py",
    "senseflow.plan": "tests/plan/test_command.py",
    "senseflow.tiny.ablate": "tests/tiny/test_ablate.py",
    "senseflow.tiny.build": "tests/tiny/test_assets.py",
    "senseflow.tiny.compare": "tests/tiny/test_commands.py",
    "senseflow.tiny.measure": "tests/tiny/test_commands.py",
    "exp_flux/train_flux_dancegrpo.sh": "tests/test_dancegrpo.py",
    "exp_sd35/train_SD35_dancegrpo.sh": "tests/test_dancegrpo.py",
    "exp_sdxl/train_sdxl_dancegrpo.sh": "tests/test_dancegrpo.py",
    "exp_flux2/train_flux2_klein_dancegrpo.sh": "tests/test_dancegrpo.py",
    "exp_z_image/train_z_image_dancegrpo.sh": "tests/test_dancegrpo.py",
    "exp_qwen_image/train_qwen_image_dancegrpo.sh": "tests/test_dancegrpo.py",
}
PAGE_RUN_BY = {"docs/distil_your_own.md": "tests/test_distil_your_own.py"}
BENCHMARKS = ["benchmarks.caches", "benchmarks.optimizer_memory"]
NOT_RUN = {
    "benchmarks.overhead",
    "benchmarks.distance",
}  # measure a machine, or two runs of the user's
NOT_HERE = {"senseflow.app", "senseflow.plan", "senseflow.tiny.ablate"}
SKIPPED = ("laion_vae_latents", "evaluate score", "evaluate table", "/path/to/pictures")


def programs() -> dict[str, Program]:
    """Every program of ours that a page gives a command of, but for a page with its own test."""
    mine = [page for page in pages() if page.name not in PAGE_RUN_BY]
    commands = [command for page in mine for command in page.commands()]
    found = (program_of(shlex.split(command)) for command in commands)
    return {ours[0].name: ours[0] for ours in found if ours}


def run_here() -> set[str]:
    """The programs that `run_page` runs."""
    named = {ours[0].name for name in READ for ours in map(program_of, commands_of(name)) if ours}
    return named - NOT_HERE


def test_every_program_is_run_by_a_test():
    assert set(PAGE_RUN_BY.values()) <= tracked()
    by_recipe = {recipe.script for recipe in EMBEDDED.values()}  # tests/test_recipes.py runs each
    for name in sorted(programs().keys() - {*NOT_RUN, *BENCHMARKS} - run_here() - by_recipe):
        assert RUN_BY.get(name) in tracked(), f"which test runs {name}?"
        text = (ROOT / RUN_BY[name]).read_text()
        word = Path(name).stem if "/" in name else name.split(".")[-1]
        assert re.search(rf"\b{word}\b", text), f"{RUN_BY[name]} does not speak of {name}"


def commands_of(name: str) -> list[list[str]]:
    """The commands of a page that run here, with stand-ins."""
    found = []
    for block in Page(ROOT / name).blocks:
        if block.language in ("bash", "sh"):
            for command in shell_commands(block.text):
                if not any(word in command for word in SKIPPED):
                    found.append(shlex.split(with_stand_ins(command)))
    return [words for words in found if words[0] in ("python", "sh")]


def with_stand_ins(text: str) -> str:
    for path, stand_in in STAND_INS.items():
        text = text.replace(path, stand_in)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that looks like the repository, with pictures and runs/ of its own."""
    folder = tmp_path_factory.mktemp("repository")
    for path in {name.split("/")[0] for name in tracked()}:
        (folder / path).symlink_to(ROOT / path)
    write_dataset(folder / "runs" / "tiny_data", num=8, seed=0, num_prompts=2)
    return folder


@pytest.fixture(scope="module")
def after_readme(folder) -> Path:
    """The same after all commands of the README."""
    run_page("README.md", folder)
    return folder


@pytest.mark.long
def test_the_readmes_commands(after_readme):
    """And its lines for plain diffusers, with the student that they made."""
    (block,) = [b for b in Page(ROOT / "README.md").blocks if b.language == "python"]
    with contextlib.chdir(after_readme):
        image = run_code(with_stand_ins(block.text))["image"]
    assert image.size == (32, 32)


@pytest.mark.long
@pytest.mark.parametrize("name", READ[1:])
def test_commands_of_other_pages(name, after_readme):
    run_page(name, after_readme)


def run_code(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(text, names)
    return names


@pytest.mark.long
@pytest.mark.parametrize("module", BENCHMARKS)
def test_benchmarks_that_need_no_machine(module):
    assert "|" in run(["python", "-m", module], ROOT)


def run_page(name: str, folder: Path) -> None:
    """Its commands, one after the other."""
    for words in commands_of(name):
        program, rest = program_of(words) or (None, [])
        assert program
        if program.kind == "trainer":
            run([*words, *ITERATION], folder)
        elif program.name not in NOT_HERE:
            call(program, [*rest, *SHORTER.get(program.name, [])], folder)


def call(program: Program, words: list[str], folder: Path) -> None:
    """One of our commands, in this process; raises AssertionError with what it said."""
    stderr, status = io.StringIO(), None
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", [program.name, *words]),
    ):
        try:
            start(program)
        except SystemExit as stop:
            status = stop.code
    assert not status, f"{program} {shlex.join(words)}\n{stderr.getvalue()[-3000:]}"


def run(words: list[str], folder: Path) -> str:
    """One command in a process of its own; raises AssertionError with what it said."""
    environment = {**os.environ, "PYTHON": PYTHON, "PYTHONPATH": str(ROOT)}
    command = [PYTHON, *words[1:]] if words[0] == "python" else words
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"
    return done.stdout
