"""Z-Image's recipe on its random pipeline: trained, cached, sampled, exported, with LoRA."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from command_line import grey_levels_apart
from made_up_run import picture
from PIL import Image
from safetensors.torch import load_file
from short_runs import begin, finish
from students import PROMPT, Shipped, ours, run_script, script_of
from teacher_parts import changed_copy

from senseflow.cache.__main__ import main as cache
from senseflow.config.config import Config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.engine.inputs import read_run
from senseflow.sampling.cli import main
from senseflow.teachers.z_image.family import Z_IMAGE

RECIPE = RECIPES["z_image_senseflow"]
LORA = Path(RECIPE.configs) / "z_image_senseflow_lora.yaml"
PROMPTS = ["a red seven", "two", "two blue ones on a wide white page", "nine"]
LENGTH = 40
SMALL = [
    *("train.resolution=32", "train.batch_size=2", "train.grad_accumulation=1"),
    *("train.iter_num=2", "train.save_interval=2", "fake_score.ttur=1"),
    *("adversarial.kind=none", "adversarial.weight=0", "precision.compute=float32"),
    *("lr_scheduler.warmup_iterations=0", "log.sample_interval=0", "log.tensorboard=false"),
    *(f"data.max_sequence_length={LENGTH}", "data.num_workers=0"),
]
SIGMAS = [1, 18 / 19, 6 / 7, 2 / 3]  # 6 u / (1 + 5 u)


@pytest.fixture(scope="module")
def overrides(z_image_folder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    names = [f"{number}.png" for number in range(len(PROMPTS))]
    for number, name in enumerate(names):
        picture(folder / name, (32, 32), number, noise=True)
    lists = {"keys": names, "image_paths": names, "prompts": PROMPTS}
    (folder / "data.json").write_text(json.dumps(lists))
    paths = {"pretrained_model": z_image_folder, "dataset": folder / "data.json"}
    return [*(f"paths.{key}={path}" for key, path in paths.items()), *SMALL]


def config_of(overrides: list[str], *more: str, file: Path = Path(RECIPE.config)) -> Config:
    return load_recipe(RECIPE, file, [*overrides, *more])


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(overrides, tmp_path_factory) -> Path:
    """A run of two iterations."""
    folder = tmp_path_factory.mktemp("run") / "run"
    finish(begin(config_of(overrides, "train.log_interval=1"), folder))
    return folder


def test_a_cache_gives_the_same_run(trained, overrides, tmp_path):
    """Of prompts of mixed lengths, and of no prompt, with a mask."""
    words = [RECIPE.config, "--output", tmp_path / "cache", *overrides]
    assert cache([*map(str, words)]) == 0
    (file,) = (tmp_path / "cache").glob("prompts*.safetensors")
    kept = load_file(file)
    assert set(kept) == {"prompt_embeds", "mask"} and kept["mask"].dtype == torch.bool
    assert len(set(kept["mask"].sum(1).tolist())) == len(PROMPTS) + 1 == len(kept["mask"])
    cached = f"paths.cache={tmp_path / 'cache'}"
    finish(begin(config_of(overrides, "train.log_interval=1", cached), tmp_path / "run"))
    for mine, other in zip(rows_of(trained), rows_of(tmp_path / "run"), strict=True):
        for name in ("loss/dmd", "loss/fake", "loss/isg"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_cache_of_another_question_is_refused(overrides, tmp_path):
    """What made it is named: how Qwen3 was asked, and its layer."""
    words = [RECIPE.config, "--output", tmp_path / "cache", "--prompts", *overrides]
    assert cache([*map(str, words)]) == 0
    index = tmp_path / "cache" / "index.json"
    tree = json.loads(index.read_text())
    made = tree["parts"]["prompts"]["made_with"]
    for change, said in (
        ({"chat: enable_thinking": False}, "enable_thinking: False in the cache, True here"),
        ({"chat: hidden states": [-1]}, r"hidden states: \[-1\] in the cache, \[-2\] here"),
    ):
        assert made.keys() >= change.keys()
        other = {**tree["parts"]["prompts"], "made_with": made | change}
        index.write_text(json.dumps({**tree, "parts": {"prompts": other}}))
        with pytest.raises(ValueError, match=said):
            read_run(config_of(overrides, f"paths.cache={tmp_path / 'cache'}"), Z_IMAGE)


@pytest.fixture(scope="module")
def student(trained, z_image_folder) -> Shipped:
    folder = trained / "student" / "step_0000002"
    card = json.loads((folder / "senseflow.json").read_text())
    assert card["family"] == "z_image" and card["guidance"] is None
    assert card["anchors"] == pytest.approx(SIGMAS)
    return Shipped(folder, z_image_folder, Z_IMAGE, tuple(card["anchors"]))


def test_a_plain_pipeline_draws_our_image_at_the_anchors(student, tmp_path, monkeypatch):
    assert student.export(tmp_path / "student", "--form", "pipeline") == 0
    card = (tmp_path / "student" / "README.md").read_text()
    assert "ZImagePipeline" in card
    script = script_of(tmp_path / "student")
    theirs, names = run_script(script, tmp_path / "student", monkeypatch)
    assert grey_levels_apart(theirs, ours(student, tmp_path / "ours")) <= 1
    assert names["call"]["guidance_scale"] == 0
    assert names["pipe"].scheduler.sigmas[:-1].tolist() == pytest.approx(SIGMAS)


def test_one_two_and_eight_steps_are_of_the_same_schedule(student, tmp_path):
    dense = Z_IMAGE.default_anchors(student.base, 8)
    for steps, expected in ((1, SIGMAS[:1]), (2, SIGMAS[::2]), (8, dense)):
        ours(student, tmp_path / str(steps), "--steps", steps, "--sampler", "euler")
        (sidecar,) = (tmp_path / str(steps)).glob("0*.json")
        assert json.loads(sidecar.read_text())["sigmas"] == pytest.approx(expected)


def test_a_teacher_draws_with_the_pipelines_own_guidance(z_image_folder, tmp_path):
    """Below 1 too, and without at 0; the prompts' list stays as it was."""
    drawn = {}
    for guidance in (0, 0.5, 4):
        words = ["--teacher", "--steps", 2, "--guidance", guidance, "--height", 32, "--width", 32]
        teacher = Shipped(z_image_folder, z_image_folder, Z_IMAGE, ())
        drawn[guidance] = ours_of_teacher(teacher, tmp_path / str(guidance), *words)
        pipe = diffusers.ZImagePipeline.from_pretrained(z_image_folder)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            PROMPT, height=32, width=32, num_inference_steps=2, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        assert grey_levels_apart(np.array(theirs), drawn[guidance]) <= 1
    assert grey_levels_apart(drawn[0], drawn[0.5]) > 1


def ours_of_teacher(teacher: Shipped, output: Path, *flags: object) -> np.ndarray:
    words = [Z_IMAGE.base_flag, teacher.base, "--prompt", PROMPT, "--output_dir", output, "--seed"]
    assert main(Z_IMAGE, [*map(str, [*words, 0, *flags])]) == 0
    (file,) = output.glob("0*.png")
    return np.array(Image.open(file))


def test_its_authors_form_is_read_by_diffusers(student, tmp_path):
    assert student.export(tmp_path / "out", "--form", "original") == 0
    file = tmp_path / "out" / "out.safetensors"
    keys = {key.removeprefix("model.diffusion_model.") for key in load_file(file)}
    assert {"layers.0.attention.qkv.weight", "final_layer.linear.bias", "cap_pad_token"} <= keys
    kind = diffusers.ZImageTransformer2DModel
    theirs = kind.from_single_file(str(file), config=str(student.folder)).state_dict()
    own = load_file(student.folder / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == own.keys() and all(torch.equal(theirs[k], own[k]) for k in own)
    again = Shipped(file, student.base, Z_IMAGE, student.anchors)
    assert np.array_equal(ours(again, tmp_path / "b"), ours(student, tmp_path / "a"))


def test_with_lora_on_one_network(overrides, tmp_path):
    """The recipe's targets are all linear layers of its blocks but the modulation."""
    config = config_of(overrides, "train.log_interval=1", "lora.rank=2", file=LORA)
    finish(begin(config, tmp_path / "run"))
    assert {"loss/dmd", "loss/fake", "loss/isg"} <= rows_of(tmp_path / "run")[-1].keys()
    (file,) = (tmp_path / "run" / "student").glob("*/*.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in load_file(file)}
    assert len(layers) == 4 * 7  # blocks, and layers of each


def test_a_prompt_that_is_cut_is_said(student, tmp_path, caplog):
    """Its turn's own tokens are counted with it."""
    long = "two blue ones on a wide white page and more of them"
    words = [Z_IMAGE.base_flag, student.base, "--checkpoint", student.folder, "--prompt", long]
    assert main(Z_IMAGE, [*map(str, words), "--output_dir", str(tmp_path / "out")]) == 0
    (sidecar,) = (tmp_path / "out").glob("0*.json")
    cut = json.loads(sidecar.read_text())["cut"]["text_encoder"]
    assert cut["read"] == LENGTH < cut["of"]


def test_turbo_is_warned_of(overrides, z_image_folder, tmp_path, caplog):
    file = "scheduler/scheduler_config.json"
    turbo = changed_copy(z_image_folder, tmp_path / "teacher", file, shift=3.0)
    read_run(config_of(overrides, f"paths.pretrained_model={turbo}"), Z_IMAGE)
    assert "is Z-Image-Turbo, by its scheduler's shift 3" in caplog.text
