"""The peak of a plan against the memory that two real gloo ranks take for the same iteration.

The embedded FLUX teacher with a transformer of 300 MB of random weights; the growth of each rank's
resident memory over what it was with a tiny run behind it, in the second of two equal iterations.
Allocations from 64 KiB on are mapped one by one, so that what is freed is gone at once.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from senseflow.common.files import read_json
from senseflow.config.config import Config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.distill.algorithm import take_turn
from senseflow.distill.measures import Measures
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run
from senseflow.plan.costs import peak
from senseflow.plan.plan import Wanted, make_plan
from senseflow.plan.rehearsal import Kind
from senseflow.plan.stand_in import copy_teacher
from senseflow.teachers.flux.family import FLUX
from senseflow.tiny.pictures import write_dataset

pytestmark = pytest.mark.long
MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "configs/FLUX/flux_senseflow_tiny.yaml"
TINY = ROOT / "assets/tiny/flux/pipeline"
KIND = Kind(generator=True, anchor=1, simulate=False, steps=4)
LARGER = dict(num_attention_heads=12, attention_head_dim=64, axes_dims_rope=[16, 24, 24])


def write_teacher(folder: Path) -> Path:
    """The embedded pipeline with random numbers in a larger transformer."""
    copy_teacher(TINY, folder, FLUX)
    for component in ("text_encoder", "text_encoder_2", "vae"):
        for file in (TINY / component).glob("*.safetensors"):
            (folder / component / file.name).write_bytes(file.read_bytes())
    config = read_json(TINY / "transformer" / "config.json") | LARGER
    torch.manual_seed(0)
    network = FluxTransformer2DModel.from_config(config)
    assert sum(p.numel() for p in network.parameters()) * 4 >= 300e6
    network.save_pretrained(folder / "transformer")
    return folder


def overrides(folder: Path, teacher: Path) -> list[str]:
    paths = [f"paths.dataset={folder / 'data' / 'data.json'}", f"paths.pretrained_model={teacher}"]
    return [*paths, "train.batch_size=4"]


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def iterations(config: Config, folder: Path, num: int) -> int:
    """Take equal iterations; the high-water mark of the last one."""
    run = prepare(read_run(config, RECIPES[config.recipe].family), folder)
    batches = next(run.data(1))
    turn = KIND.turn(run.parts)
    assert turn.adversarial
    for _ in range(num):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
        take_turn(run.parts, turn, batches, Measures())
    return status("VmHWM")


def main(folder: Path) -> None:
    """One rank: prints the growth as JSON."""
    torch.set_num_threads(1)
    recipe = RECIPES["flux_senseflow"]
    iterations(load_recipe(recipe, FILE, overrides(folder, TINY)), folder / "tiny", 2)
    gc.collect()
    baseline = status("VmRSS")
    config = load_recipe(recipe, FILE, overrides(folder, folder / "teacher"))
    print(json.dumps(iterations(config, folder / "run", 2) - baseline))


def growth(folder: Path) -> list[int]:
    """What two ranks, processes of their own, say."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--log-dir", str(folder / "logs"), "--redirects", "1", __file__, str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = sorted((folder / "logs").rglob("stdout.log"))
    return [int(output.read_text().split()[-1]) for output in outputs]


def planned(folder: Path) -> int:
    """The plan's peak of the same iteration, in a process with no group of its own."""
    code = (
        "import sys, test_real_peak as t; from pathlib import Path;"
        "t.print_planned(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def print_planned(folder: Path) -> None:
    wanted = Wanted(FILE, tuple(overrides(folder, folder / "teacher")), 1, 2)
    print(peak(make_plan(wanted, [KIND]).costs.traced[KIND]))


def test_the_peak_is_that_of_real_ranks(tmp_path):
    write_teacher(tmp_path / "teacher")
    write_dataset(tmp_path / "data", num=4, seed=0, num_prompts=1)
    real, plan = growth(tmp_path), planned(tmp_path)
    print(f"planned {plan / MIB:.0f} MiB, real {[round(r / MIB) for r in real]} MiB")
    assert len(real) == 2
    for one in real:
        assert 0.9 <= plan / one <= 1.1, (plan / MIB, one / MIB)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
