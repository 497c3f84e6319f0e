"""Scorers of `evaluate score` as rewards: the same value of tensors, with its gradient; in a run.

Small random models in the published formats.
"""

import json
from pathlib import Path

import pytest
import torch
from image_folders import PROMPTS, pictures, write_images
from metric_parts import save_aesthetic_head, save_clip_model, save_open_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from short_runs import begin, configure, finish, write_pictures
from test_image_reward import parts  # noqa: F401 - a fixture
from torchvision.transforms.functional import to_tensor
from training_runs import rows

from senseflow.common.ranks import Ranks
from senseflow.config.config import Config, load_config
from senseflow.distill.scorers.metric import Given, Judge, Machine
from senseflow.distill.scorers.pixels import on_tensors
from senseflow.distill.scorers.specs import SCORERS
from senseflow.engine.rewards import named_rewards, open_rewards

FLUX = Path("configs/FLUX/flux_senseflow_tiny.yaml")
HERE = Ranks(0, 1, torch.device("cpu"), None)
NAMES = ["clip", "hps_v2.1", "pick_score", "image_reward", "aesthetic"]


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory) -> list[str]:  # noqa: F811
    """`reward.files` of all of them."""
    folder = tmp_path_factory.mktemp("scorers")
    name, weights = save_open_clip(folder / "clip")
    hps, hps_weights = save_open_clip(folder / "hps", seed=1)
    pick = save_clip_model(folder / "pick")
    head = save_aesthetic_head(folder / "head.pth")
    return [f"clip_model={name}", f"clip_weights={weights}", f"hps_model={hps}",
            f"hps_v2.1={hps_weights}", f"pick_score={pick}", f"image_reward={parts[0]}",
            f"image_reward_tokenizer={parts[0] / 'bert'}", f"aesthetic={head}",
            f"aesthetic_clip={weights}", f"aesthetic_model={name}"]  # fmt: skip


def config_of(names: list[str], files: list[str], *overrides: str) -> Config:
    words = [f"reward.models={json.dumps(names)}", f"reward.files={json.dumps(files)}"]
    return load_config(FLUX, ["reward.weight=1", "reward.last_weight=1", *words, *overrides])


def of(name: str, files: list[str]) -> list[str]:
    """Those of one scorer."""
    flags = {f.name.removeprefix("--") for s in SCORERS if s.name == name for f in s.flags}
    return [words for words in files if words.partition("=")[0] in flags]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(96, 64), (50, 81), (20, 24)])
def test_tensors_are_prepared_as_pictures_are(mode, size, tmp_path):
    """open_clip's own transform of PIL pictures, whose resizing rounds to whole grey levels."""
    config = PreprocessCfg(size=32, resize_mode=mode, fill_color=0, mean=(0, 0, 0), std=(1, 1, 1))
    found = pictures(write_images(tmp_path / "images", size=size))
    theirs = torch.stack([image_transform_v2(config, is_train=False)(p) for p in found])
    ours = on_tensors(config)(torch.stack([to_tensor(p) for p in found]))
    assert ours.shape == theirs.shape == (len(found), 3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.004 and (ours - theirs).abs().max() < 0.1


def judge_of(name: str, files: list[str], dtype: torch.dtype) -> Judge:
    """The scorer as `evaluate score` opens it."""
    (spec,) = [spec for spec in SCORERS if spec.name == name]
    given = {f"--{w.partition('=')[0]}": w.partition("=")[2] for w in of(name, files)}
    given = {k: v if k.endswith("_model") else Path(v) for k, v in given.items()}
    if name == "clip":
        given["--clip_resize"] = 0  # a reward has no LANCZOS before
    return spec.prepare(Given(given)).open(Machine(HERE.device, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_pictures_differ_as_in_float32(name, files, tmp_path):
    found = pictures(write_images(tmp_path / "images", size=(64, 64)))
    exact, near = (judge_of(name, files, x) for x in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        one, two = (
            j.judge(torch.stack([j.load(p) for p in found]), PROMPTS) for j in (exact, near)
        )
    assert two.dtype == torch.float32
    assert 0 < (one - two).abs().max() < 0.06 * one.std()


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_is_what_evaluate_scores(name, files, tmp_path):
    found = pictures(write_images(tmp_path / "images", size=(64, 64)))
    judge = judge_of(name, files, torch.float32)
    with torch.no_grad():
        expected = judge.judge(torch.stack([judge.load(p) for p in found]), PROMPTS)
    rewards = open_rewards(config_of([name], of(name, files)), HERE)
    images = torch.stack([to_tensor(p) for p in found]) * 2 - 1
    (scores,) = rewards.score(images, PROMPTS)
    spread = float(expected.std())
    assert spread > 0 and (scores - expected).abs().max() < 0.05 * spread + 1e-4
    inner = (0.9 * images).requires_grad_()  # away from black and white, where it is cut off
    loss = rewards.loss(inner, PROMPTS)
    (gradient,) = torch.autograd.grad(loss, inner)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        above, here, below = (-rewards.score(inner + k * step, PROMPTS).mean() for k in (1, 0, -1))
    assert loss.item() == pytest.approx(here.item(), rel=1e-5)
    assert float(above - below) / 2e-2 == pytest.approx(gradient.norm().item(), rel=0.03)


def test_all_of_them_train_a_student_in_bfloat16(files, tmp_path):
    data = write_pictures(tmp_path / "data")
    words = [f"reward.models={json.dumps(NAMES)}", f"reward.files={json.dumps(files)}"]
    config = configure(data, "reward.weight=1", "reward.last_weight=1", "reward.group_size=2",
                       "reward.weights=[1, 2, 0, 0.5, 1]", "train.iter_num=2",
                       "train.log_interval=2", "anchors.times=[1000, 500]", "adversarial.kind=none",
                       "precision.compute=bfloat16", *words)  # fmt: skip
    run = finish(begin(config, tmp_path / "run"))
    assert [s.name for s in run.parts.rewards.scorers] == NAMES
    row = rows(tmp_path / "run")[-1]
    assert all(f"reward/{name}" in row and f"reward_spread/{name}" in row for name in NAMES)
    assert all(not p.requires_grad or p.grad is None for p in run.parts.teacher.parameters())


@pytest.mark.parametrize(
    ("names", "files_of", "said"),
    [
        (["pick_score"], [], "reward.models pick_score needs pick_score=FOLDER in reward.files: "),
        (["hps_v2.1"], ["hps_v2.1=/no/such.pt"],
         "reward.files hps_v2.1=/no/such.pt: --hps_v2.1 /no/such.pt is not a file"),
        (["clip"], ["clip_model=ViT-L-14"], "reward.models clip: --clip_weights is missing"),
        (["clip"], ["clip_quick_gelu=yes"], "clip_quick_gelu=yes: must be one of true, false"),
        (["clip"], ["pick_score=/a"], "reward.files: pick_score is of none of reward.models"),
        (["clip"], ["clip_model"], "'clip_model' is not of the form name=value"),
        (["picscore"], [], "picscore is neither module:function nor one of clip, hps_v2.1, hps_v2, "
         "pick_score, image_reward, aesthetic; the nearest is pick_score"),
    ],
)  # fmt: skip
def test_files_that_are_not_there_are_named(names, files_of, said):
    with pytest.raises(ValueError) as refused:
        named_rewards(config_of(names, files_of))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_weights_of_another_model_are_named(files):
    (model,) = (words for words in files if words.startswith("hps_model"))
    (folder,) = (w.partition("=")[2] for w in files if w.startswith("image_reward="))
    config = config_of(["hps_v2.1"], [model, f"hps_v2.1={folder}/ImageReward.pt"])
    with pytest.raises(ValueError, match=r"reward\.models hps_v2\.1: .*weights of another model"):
        open_rewards(config, HERE)
