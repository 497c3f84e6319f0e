"""Recipes whose prompts have a mask, Z-Image's and Qwen-Image's, on random pipelines: trained,
resumed, cached, sampled, exported, with LoRA."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from senseflow.config.recipes import RECIPES, Recipe
from senseflow.engine.inputs import read_run
from senseflow.sampling.cli import main
from senseflow.teachers.family import Family

PROMPTS = ["a red seven", "two", "two blue ones on a wide white page", "nine"]
LENGTH = 40
SMALL = [
    *("train.resolution=32", "train.batch_size=2", "train.grad_accumulation=1"),
    *("train.iter_num=2", "train.save_interval=2", "fake_score.ttur=1"),
    *("adversarial.kind=none", "adversarial.weight=0", "precision.compute=float32"),
    *("lr_scheduler.warmup_iterations=0", "log.sample_interval=0", "log.tensorboard=false"),
    *(f"data.max_sequence_length={LENGTH}", "data.num_workers=0", "train.log_interval=1"),
]


@dataclass(frozen=True)
class Case:
    """A recipe, and what differs between the two."""

    recipe: Recipe
    sigmas: list[float]
    off: float  # the pipeline's number without guidance
    little: float  # that is not off
    question: dict[str, Any]  # of another cache, and what is said of it
    other: str
    turn: int  # tokens around a prompt that count with it
    lora_layers: int
    authors_keys: set[str]

    @property
    def family(self) -> Family:
        return self.recipe.family

    def config(self, overrides: list[str], *more: str, lora: bool = False) -> Config:
        name = f"{self.recipe.name}_lora.yaml" if lora else f"{self.recipe.name}.yaml"
        return load_recipe(self.recipe, Path(self.recipe.configs) / name, [*overrides, *more])

    def guided(self, guidance: float) -> dict[str, Any]:
        """Of the pipeline's call."""
        if self.family.name == "z_image":
            return {"guidance_scale": guidance}
        return {"true_cfg_scale": guidance, "negative_prompt": " " if guidance > 1 else None}


CASES = {
    "z_image": Case(
        RECIPES["z_image_senseflow"],
        [1, 18 / 19, 6 / 7, 2 / 3],  # 6 u / (1 + 5 u)
        0,
        0.5,
        {"chat: enable_thinking": False},
        "enable_thinking: False in the cache, True here",
        19,
        4 * 7,  # blocks, and layers of each but the modulation
        {"layers.0.attention.qkv.weight", "final_layer.linear.bias", "cap_pad_token"},
    ),
    "qwen_image": Case(
        RECIPES["qwen_image_senseflow"],
        [1, 0.9, 0.75, 0.5],  # 3 u / (1 + 2 u)
        1,
        1.5,
        {"chat: template": "{}"},
        "template: {} in the cache, <|im_start|>system",
        5,
        2 * 12,
        {"txt_norm.weight", "transformer_blocks.0.attn.to_q.weight", "proj_out.bias"},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def base(case, request) -> Path:
    return request.getfixturevalue(f"{case.family.name}_folder")


@pytest.fixture(scope="module")
def overrides(base, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    names = [f"{number}.png" for number in range(len(PROMPTS))]
    for number, name in enumerate(names):
        picture(folder / name, (32, 32), number, noise=True)
    lists = {"keys": names, "image_paths": names, "prompts": PROMPTS}
    (folder / "data.json").write_text(json.dumps(lists))
    paths = {"pretrained_model": base, "dataset": folder / "data.json"}
    return [*(f"paths.{key}={path}" for key, path in paths.items()), *SMALL]


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(case, overrides, tmp_path_factory) -> Path:
    """A run of two iterations."""
    folder = tmp_path_factory.mktemp("run") / "run"
    finish(begin(case.config(overrides, "train.save_interval=1"), folder))
    return folder


def test_a_resumed_run_has_the_same_bits(case, trained, overrides, tmp_path):
    left = shutil.ignore_patterns("step_0000002")
    run = Path(shutil.copytree(trained, tmp_path / "run", ignore=left))
    finish(begin(case.config(overrides), run))
    file = "student/step_0000002/diffusion_pytorch_model.safetensors"
    assert (run / file).read_bytes() == (trained / file).read_bytes()


def test_a_cache_gives_the_same_run(case, trained, overrides, tmp_path):
    """Of prompts of mixed lengths, and of no prompt, with a mask; and of latents."""
    words = [case.recipe.config, "--output", tmp_path / "cache", *overrides]
    assert cache([*map(str, words)]) == 0
    (file,) = (tmp_path / "cache").glob("prompts*.safetensors")
    kept = load_file(file)
    assert set(kept) == {"prompt_embeds", "mask"} and kept["mask"].dtype == torch.bool
    assert len(set(kept["mask"].sum(1).tolist())) == len(PROMPTS) + 1 == len(kept["mask"])
    cached = f"paths.cache={tmp_path / 'cache'}"
    finish(begin(case.config(overrides, cached), tmp_path / "run"))
    for mine, other in zip(rows_of(trained), rows_of(tmp_path / "run"), strict=True):
        for name in ("loss/dmd", "loss/fake", "loss/isg"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_cache_of_another_question_is_refused(case, overrides, tmp_path):
    """What made it is named: how the language model was asked, and its layer."""
    words = [case.recipe.config, "--output", tmp_path / "cache", "--prompts", *overrides]
    assert cache([*map(str, words)]) == 0
    index = tmp_path / "cache" / "index.json"
    tree = json.loads(index.read_text())
    made = tree["parts"]["prompts"]["made_with"]
    layer = {"chat: hidden states": [-3]}
    for change, said in ((case.question, case.other), (layer, "hidden states: [-3] in the cache")):
        assert made.keys() >= change.keys()
        other = {**tree["parts"]["prompts"], "made_with": made | change}
        index.write_text(json.dumps({**tree, "parts": {"prompts": other}}))
        with pytest.raises(ValueError) as error:
            read_run(case.config(overrides, f"paths.cache={tmp_path / 'cache'}"), case.family)
        assert said in str(error.value)


@pytest.fixture(scope="module")
def student(case, trained, base) -> Shipped:
    folder = trained / "student" / "step_0000002"
    card = json.loads((folder / "senseflow.json").read_text())
    assert card["family"] == case.family.name and card["guidance"] is None
    assert card["anchors"] == pytest.approx(case.sigmas)
    return Shipped(folder, base, case.family, tuple(card["anchors"]))


def test_a_plain_pipeline_draws_our_image_at_the_anchors(case, student, tmp_path, monkeypatch):
    terms = case.family.published.terms
    assert student.export(tmp_path / "student", "--form", "pipeline") == 0
    card = (tmp_path / "student" / "README.md").read_text()
    assert case.family.pipeline_class in card and terms.license == "apache-2.0"
    script = script_of(tmp_path / "student")
    theirs, names = run_script(script, tmp_path / "student", monkeypatch)
    assert grey_levels_apart(theirs, ours(student, tmp_path / "ours")) <= 1
    assert names["call"][case.family.guidance_key] == case.off
    assert names["pipe"].scheduler.sigmas[:-1].tolist() == pytest.approx(case.sigmas)


def test_one_two_and_eight_steps_are_of_the_same_schedule(case, student, tmp_path):
    dense = case.family.default_anchors(student.base, 8)
    for steps, expected in ((1, case.sigmas[:1]), (2, case.sigmas[::2]), (8, dense)):
        ours(student, tmp_path / str(steps), "--steps", steps, "--sampler", "euler")
        (sidecar,) = (tmp_path / str(steps)).glob("0*.json")
        assert json.loads(sidecar.read_text())["sigmas"] == pytest.approx(expected)


def test_a_teacher_draws_with_the_pipelines_own_guidance(case, base, tmp_path):
    """And without; a prompts' list stays as it was."""
    drawn = {}
    for guidance in (case.off, case.little, 4):
        words = ["--teacher", "--steps", 2, "--guidance", guidance, "--height", 32, "--width", 32]
        words = [case.family.base_flag, base, "--prompt", PROMPT, "--seed", 0, *words]
        output = tmp_path / str(guidance)
        assert main(case.family, [*map(str, [*words, "--output_dir", output])]) == 0
        (file,) = output.glob("0*.png")
        drawn[guidance] = np.array(Image.open(file))
        pipe = getattr(diffusers, case.family.pipeline_class).from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            PROMPT, height=32, width=32, num_inference_steps=2, **case.guided(guidance),
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        assert grey_levels_apart(np.array(theirs), drawn[guidance]) <= 1
    assert grey_levels_apart(drawn[case.off], drawn[4]) > 1


def test_its_authors_form_is_read_by_diffusers(case, student, tmp_path):
    assert student.export(tmp_path / "out", "--form", "original") == 0
    file = tmp_path / "out" / "out.safetensors"
    keys = {key.removeprefix("model.diffusion_model.") for key in load_file(file)}
    assert case.authors_keys <= keys
    kind = getattr(diffusers, case.family.network_class)
    theirs = kind.from_single_file(str(file), config=str(student.folder)).state_dict()
    own = load_file(student.folder / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == own.keys() and all(torch.equal(theirs[k], own[k]) for k in own)
    again = Shipped(file, student.base, case.family, student.anchors)
    assert np.array_equal(ours(again, tmp_path / "b"), ours(student, tmp_path / "a"))


def test_with_lora_on_one_network(case, overrides, base, tmp_path):
    """The recipe's targets are all linear layers of its blocks but the modulation; the pipeline's
    own loader reads them all."""
    config = case.config(overrides, "lora.rank=2", lora=True)
    finish(begin(config, tmp_path / "run"))
    assert {"loss/dmd", "loss/fake", "loss/isg"} <= rows_of(tmp_path / "run")[-1].keys()
    (file,) = (tmp_path / "run" / "student").glob("*/*.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in load_file(file)}
    assert len(layers) == case.lora_layers
    pipe = getattr(diffusers, case.family.pipeline_class).from_pretrained(base)
    pipe.load_lora_weights(file.parent)
    read = {name for name, part in pipe.transformer.named_modules() if hasattr(part, "lora_A")}
    assert {layer.removeprefix("transformer.") for layer in layers} == read


def test_a_prompt_that_is_cut_is_said(case, student, tmp_path):
    """Its turn's own tokens are counted with it."""
    long = "two blue ones on a wide white page with seven more"
    words = [case.family.base_flag, student.base, "--checkpoint", student.folder, "--prompt", long]
    assert main(case.family, [*map(str, words), "--output_dir", str(tmp_path / "out")]) == 0
    (sidecar,) = (tmp_path / "out").glob("0*.json")
    cut = json.loads(sidecar.read_text())["cut"]["text_encoder"]
    assert cut["read"] == LENGTH < cut["of"] == len(long) + case.turn


def test_a_student_of_few_steps_is_warned_of(case, overrides, base, tmp_path, caplog):
    name = "Z-Image-Turbo" if case.family.name == "z_image" else "Qwen-Image-Lightning"
    file = "model_index.json"
    folder = changed_copy(base, tmp_path / name, file)
    read_run(case.config(overrides, f"paths.pretrained_model={folder}"), case.family)
    assert "by its name" in caplog.text
