"""The recipes with rewards from their shell scripts to a student, on the embedded teachers."""

import os
import subprocess
from pathlib import Path

import pytest
from python import PYTHON
from short_runs import write_pictures
from training_runs import rows

SCRIPTS = {
    "flux": ("exp_flux/train_flux_dancegrpo.sh", "FLUX"),
    "sdxl": ("exp_sdxl/train_sdxl_dancegrpo.sh", "sdxl"),
    "sd35": ("exp_sd35/train_SD35_dancegrpo.sh", "SD35"),
    "flux2_klein": ("exp_flux2/train_flux2_klein_dancegrpo.sh", "FLUX2"),
    "z_image": ("exp_z_image/train_z_image_dancegrpo.sh", "Z-Image"),
    "qwen_image": ("exp_qwen_image/train_qwen_image_dancegrpo.sh", "Qwen-Image"),
}
SHORT = [
    *("train.iter_num=5", "train.batch_size=4", "train.save_interval=5", "train.log_interval=1"),
    *("log.sample_interval=0", "log.tensorboard=false", "adversarial.taps=[5]"),
    *("lr_scheduler.warmup_iterations=0", "lr_scheduler.decay_iterations=0", "fake_score.ttur=2"),
    *("reward.weight=1", "reward.group_size=4", "reward.transitions=2", "reward.shared_noise=true"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


def train(family: str, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The embedded recipe, from its teacher unless the words say more; two ranks share a group."""
    script, place = SCRIPTS[family]
    file = f"configs/{place}/{family}_dancegrpo_tiny.yaml"
    variables = {**os.environ, "PYTHON": PYTHON, "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = f"{os.getcwd()}:{os.getcwd()}/tests/parts"
    line = ["sh", script, "1", "2", file, folder, "paths.initial=null", *SHORT, *words]
    return subprocess.run(
        list(map(str, line)), capture_output=True, text=True, env=variables, timeout=900
    )


def check_student(folder: Path, name: str) -> None:
    assert (folder / "student" / "step_0000005" / "config.json").is_file()
    found = {row["iteration"]: row for row in rows(folder)}
    assert found.keys() == {1, 2, 3, 4, 5}
    assert [i for i, row in found.items() if f"reward/{name}" in row] == [2, 4]
    assert found[4]["grpo/clipped"] == 0 and found[4]["grpo/advantage"] > 0


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.long) for f in SCRIPTS if f != "flux"]
)
def test_a_recipe_with_rewards_makes_a_student(family, data, tmp_path):
    words = (f"paths.dataset={data}", "reward.last_weight=1")
    result = train(family, tmp_path / "run", *words)
    assert result.returncode == 0, result.stderr
    check_student(tmp_path / "run", "pick_score")


def test_a_run_whose_reward_fails_is_saved_and_goes_on_with_another(data, tmp_path):
    """It is NaN the second time on both ranks: in iteration 4."""
    folder, dataset = tmp_path / "run", f"paths.dataset={data}"
    own = ("reward.files=[]", "reward.last_weight=0")  # it has no gradient
    failed = train("flux", folder, dataset, *own, "reward.models=[own_rewards:nan_later]")
    said = "error: reward own_rewards:nan_later is not finite for 4 of 4 images, in iteration 4; "
    assert failed.returncode == 1 and failed.stderr.count("own_rewards:nan_later is not") == 1
    assert f"{said}what was trained before it is saved" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert (folder / "last_iter").read_text() == "3\n"
    result = train("flux", folder, dataset, *own, "reward.models=[own_rewards:redness]")
    assert result.returncode == 0, result.stderr
    assert f"going on from {folder}/checkpoints/step_0000003" in result.stderr
    changed = "reward.models: ('own_rewards:nan_later',) -> ('own_rewards:redness',)"
    assert f"going on with a changed configuration: {changed}" in result.stderr
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3, 4, 5]
