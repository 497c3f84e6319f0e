"""Every recipe from its shell script to its images, on the embedded teachers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from embedded import YAMLS
from PIL import Image
from python import PYTHON
from short_runs import begin, configure, finish

from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.engine.build import check_networks
from senseflow.engine.inputs import read_run
from senseflow.tiny.pictures import write_dataset

SHORT = [
    "train.iter_num=2",
    "train.batch_size=2",
    "train.save_interval=2",
    "train.log_interval=1",
    "log.sample_interval=1",
    "adversarial.taps=[5]",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
]
# A recipe of each family as on the user's machine, where nothing is loaded before; FLUX's is in
# test_training.py, and not long.
BY_PYTHON_ITSELF = [
    pytest.param(name, sys.executable, id=f"{name}_itself", marks=pytest.mark.long)
    for name in ("sdxl_senseflow", "sd35_senseflow")
]
LARGE = "sd35_large_senseflow"
FAST = ("sdxl_senseflow", "sdxl_dmd2", "sd35_senseflow")
# Large has the seed's line below, FLUX.2 is trained on a random pipeline in test_flux2_recipe.py.
SLOW = (LARGE, "flux2_klein_senseflow", "z_image_senseflow", "qwen_image_senseflow")
INTEGER = [999, 749, 499, 249]
ANCHORS = {
    "sdxl_senseflow": INTEGER,
    "sdxl_dmd2": INTEGER,
    # by diffusers' compute_empirical_mu of 16 tokens and 4 steps, 1.9452
    "flux2_klein_senseflow": [1, 0.95451, 0.87492, 0.69984],
    "z_image_senseflow": [1, 18 / 19, 6 / 7, 2 / 3],  # 6 t / (1 + 5 t)
}
PROMPT = "a red seven left of a blue two on white"


def run(*words: object, python: str = PYTHON) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env=variables, timeout=600
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A JSON data set of embedded pictures."""
    folder = tmp_path_factory.mktemp("images")
    write_dataset(folder, num=8, seed=0, num_prompts=2)
    return folder / "data.json"


@pytest.fixture(scope="module")
def latents(images, tmp_path_factory) -> Path:
    """The same as an LMDB through SDXL's VAE, made by the command of the README."""
    folder = tmp_path_factory.mktemp("lmdb") / "latents"
    teacher = ["--teacher", "assets/tiny/sdxl/pipeline", "--resolution", "32"]
    words = [PYTHON, "-m", "senseflow.data.convert", images, "--output", folder, *teacher]
    result = run(*words)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    ("name", "python"),
    [
        *BY_PYTHON_ITSELF,
        *(pytest.param(name, PYTHON, id=name) for name in FAST),
        *(pytest.param(name, PYTHON, id=name, marks=pytest.mark.long) for name in SLOW),
    ],
)
def test_a_recipe_trains_and_its_student_is_sampled(name, python, images, latents, tmp_path):
    data, folder = latents if "sdxl" in name else images, tmp_path / "run"
    line = ["sh", RECIPES[name].script, 1, 1, YAMLS[name], folder, f"paths.dataset={data}", *SHORT]
    result = run(*line, python=python)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert {"loss/dmd", "loss/fake", "loss/generator"} <= rows[-1].keys()
    assert ("loss/isg" in rows[-1]) == (name != "sdxl_dmd2")
    assert (folder / "samples" / "step_0000002.png").exists()
    if name == "sdxl_dmd2":  # an untrained classifier knows nothing: twice log 2
        assert rows[-1]["loss/discriminator"] == pytest.approx(2 * math.log(2), rel=0.3)
        assert rows[-1]["grad_norm/discriminator"] > 0
    check_images(name, folder, tmp_path / "out", python)


def check_images(name: str, folder: Path, out: Path, python: str = PYTHON) -> None:
    """The recipe's script draws with the run's student, at the recipe's anchors."""
    base = load_config(YAMLS[name]).paths.pretrained_model
    recipe = RECIPES[name]
    words = [recipe.draws, recipe.family.base_flag, base, "--checkpoint", folder]
    result = run(python, *words, "--output_dir", out, "--prompt", PROMPT)
    assert result.returncode == 0, result.stderr
    (file,) = [f for f in out.glob("*.png") if f.name != "grid.png"]
    assert Image.open(file).size == (32, 32)
    levels = json.loads(file.with_suffix(".json").read_text())
    anchors = ANCHORS.get(name, [1, 0.9, 0.75, 0.5])
    found = levels.get("timesteps") or levels["sigmas"]
    assert found == pytest.approx(anchors, abs=1e-4)


def test_the_seeds_line_for_large_with_the_yaml_of_medium(images, tmp_path):
    """As the seed README writes it, with the embedded YAML; paths.dataset is the user's."""
    tree = yaml.safe_load(Path("configs/SD35/sd35_senseflow_tiny.yaml").read_text())
    tree["paths"]["dataset"] = str(images)
    mine, folder = tmp_path / "sd35_senseflow_tiny.yaml", tmp_path / "run"
    mine.write_text(yaml.safe_dump(tree))
    own = Path("configs/SD35/sd35_large_senseflow_tiny.yaml")
    (tmp_path / own.name).write_text(own.read_text())
    result = run("sh", "exp_sd35/train_SD35_large_senseflow.sh", 1, 1, mine, folder, *SHORT)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("its paths are used") == 1
    assert result.stderr.count("paths.pretrained_model is sd35_senseflow's") == 1
    config = load_config(folder / "config.yaml")
    assert config.recipe == "sd35_large_senseflow" and config.ida.lam == 0.97
    assert config.paths.pretrained_model == "assets/tiny/sd35_large/pipeline"
    assert config.paths.dataset == str(images)
    check_images(LARGE, folder, tmp_path / "out")


def test_senseflow_switched_off_part_by_part_is_dmd(images, tmp_path):
    """One switch at a time, to DMD with TTUR alone."""
    switches = ["ida.lam=null", "isg.weight=0", "adversarial.kind=none"]
    gone = {"ida.lam=null": "", "isg.weight=0": "loss/isg", "adversarial.kind=none": "loss/adv"}
    for number in (1, 2, 3):
        used, folder = switches[:number], tmp_path / str(number)
        every = ("train.log_interval=1", "train.iter_num=1", "fake_score.ttur=1", *used)
        finish(begin(configure(images, *every, recipe="sd35_senseflow"), folder))
        row = json.loads((folder / "stats.jsonl").read_text().splitlines()[-1])
        assert "loss/dmd" in row and not [name for switch in used if (name := gone[switch]) in row]


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("sd35_senseflow", "paths.pretrained_model=assets/tiny/flux/pipeline",
         "holds a FluxPipeline, this recipe distils a StableDiffusion3Pipeline"),
        ("sdxl_dmd2", "paths.pretrained_model=assets/tiny/sd35_medium/pipeline",
         "holds a StableDiffusion3Pipeline, this recipe distils a StableDiffusionXLPipeline"),
        ("sd35_large_senseflow", "paths.pretrained_model=assets/tiny/sd35_medium/pipeline",
         r"holds SD3\.5 Medium, .*train_SD35_senseflow.sh"),
        ("sd35_senseflow", "paths.pretrained_model=assets/tiny/sd35_large/pipeline",
         r"is the recipe of SD3\.5 Medium: sh exp_sd35/train_SD35_large_senseflow.sh"),
        ("sd35_senseflow", "paths.clip=local-dir:nowhere", "there is no such folder"),
        ("sdxl_senseflow", "paths.dinov2_weights=no/where.pth", "where.pth is not a file"),
        ("sd35_senseflow", "isg.margin=125",
         r"isg\.margin 125 leaves no mid-point between the anchors 1000 and 750"),
        ("sdxl_senseflow", "isg.margin=130", r"isg\.margin 130 leaves no mid-point"),
        ("sdxl_senseflow", "dmd.time_range=[20, 1000]",
         r"dmd\.time_range: 20 to 1000 is not within this teacher's clock, 0 to 999"),
        ("sdxl_senseflow", "anchors.times=[999.5, 500]", r"anchors\.times .*whole steps"),
        ("sdxl_senseflow", "data.max_sequence_length=77", "SDXL has no T5"),
        ("sd35_senseflow", "data.max_sequence_length=null", "max_sequence_length is missing"),
        ("sd35_senseflow", "student.fold_guidance=3.5", "for FLUX alone"),
        ("sd35_senseflow", "train.resolution=512", "table of positions ends at"),
        ("sdxl_dmd2", "adversarial.downsamplings=1", r"needs a bottleneck of at least 8 x 8"),
        ("sdxl_dmd2", "train.resolution=64",
         r"latents.*\[?8, 8, 8\]?.*\[?8, 16, 16\]?"),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_anything_is_loaded(name, override, message, images, latents):
    data = latents if "sdxl" in name else images
    config = load_config(YAMLS[name], [f"paths.dataset={data}", override])
    with pytest.raises(ValueError, match=message):
        check_networks(read_run(config, RECIPES[name].family))
