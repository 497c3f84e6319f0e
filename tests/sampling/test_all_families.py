"""What holds for every family's script: checkpoints, batches, the README's lines, errors."""

import inspect
import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from cases import CASES, Case
from command_line import (
    PROMPTS,
    ROOT,
    call,
    error_of,
    grey_levels_apart,
    only_picture,
    pictures,
    prompt_flags,
    sidecars,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from student_networks import load_network
from teacher_parts import changed_copy, settings_of
from torch import nn

from senseflow.config.recipes import FAMILIES
from senseflow.sampling import Drawing, cli, load_student, load_teacher, sample
from senseflow.sampling.drawing import Paths
from senseflow.sampling.model import find_model
from senseflow.teachers.family import Family
from senseflow.weights.card import CARD
from senseflow.weights.student import find_student

SIZE = ("--height", 16, "--width", 16)


@dataclass(frozen=True)
class Given:
    """A case with its folders and its student's network."""

    case: Case
    family: Family
    base: Path
    run: Path
    network: nn.Module


def make(name: str, request, tmp_path_factory) -> Given:
    case = CASES[name]
    base = request.getfixturevalue(case.base)
    network = case.student()
    run = case.save_run(tmp_path_factory.mktemp(name), base, network)
    return Given(case, case.family, base, run, network)


@pytest.fixture(scope="module", params=[name for name in CASES if name != "dmd2"])  # as sdxl
def given(request, tmp_path_factory) -> Given:
    return make(request.param, request, tmp_path_factory)


@pytest.fixture(scope="module")
def everything(request, tmp_path_factory) -> dict[str, Given]:
    return {name: make(name, request, tmp_path_factory) for name in CASES}


def test_every_family_is_tested_and_has_its_script():
    assert {id(case.family) for case in CASES.values()} == {id(family) for family in FAMILIES}
    for family in FAMILIES:
        assert (ROOT / family.script).is_file()


# Checkpoints


def forms(given: Given, folder: Path) -> dict[str, Path]:
    """The same student in every form of a checkpoint, by name."""
    component, state = given.family.component, given.network.state_dict()
    step = given.run / "student" / "step_0000020"
    (given.run / "checkpoints" / "step_0000020").mkdir(parents=True, exist_ok=True)
    shutil.copytree(given.base, folder / "pipeline")
    shutil.rmtree(folder / "pipeline" / component)
    shutil.copytree(step, folder / "pipeline" / component)
    given.network.save_pretrained(folder / "sharded", max_shard_size="100KB")
    (index,) = (folder / "sharded").glob("*.index.json")
    prefixed = {f"{component}._orig_mod.{key}": value for key, value in state.items()}
    save_file(prefixed, folder / "prefixed.safetensors")
    found = {
        "run": given.run,
        "students": given.run / "student",
        "step": step,
        "checkpoint": given.run / "checkpoints" / "step_0000020",
        "file": step / "diffusion_pytorch_model.safetensors",
        "pipeline": folder / "pipeline",
        "sharded": folder / "sharded",
        "index": index,
        "prefixed": folder / "prefixed.safetensors",
    }
    pickles = {"bare": state, "model": {"model": state, "step": 3}, "ema": {"ema_model": state}}
    pickles["wrapped"] = {"model": {f"module.{component}.{k}": v for k, v in state.items()}}
    pickles["fsdp"] = {f"_fsdp_wrapped_module.{key}": value for key, value in state.items()}
    for name, content in pickles.items():
        found[name] = folder / f"{name}.pth"
        torch.save(content, found[name])
    return found


def test_every_form_of_a_checkpoint_is_the_same_network(given, tmp_path):
    given.network.save_config(tmp_path / "config")
    wanted = given.network.state_dict()
    for name, path in forms(given, tmp_path).items():
        network = load_network(path, tmp_path / "config" / "config.json")
        state = network.state_dict()
        assert type(network) is type(given.network) and state.keys() == wanted.keys(), name
        assert all(torch.equal(state[key], wanted[key]) for key in wanted), name
        assert not any(tensor.is_meta for tensor in network.buffers()), name
        has_card = name in ("run", "students", "step", "checkpoint", "file", "pipeline")
        assert (find_student(path).card is not None) == has_card, name


def test_the_cards_anchors_size_and_length_else_the_familys_own(given, tmp_path):
    flags = ["--prompt", PROMPTS[0], "--output_dir"]
    torch.save(given.network.state_dict(), tmp_path / "bare.pth")
    assert call(given.family, given.base, "--checkpoint", given.run, *flags, tmp_path / "a") == 0
    bare = ["--checkpoint", tmp_path / "bare.pth", *SIZE, *flags, tmp_path / "b"]
    assert call(given.family, given.base, *bare) == 0
    (carded,), (plain,) = sidecars(tmp_path / "a"), sidecars(tmp_path / "b")
    levels = given.family.levels.name
    assert carded[levels] == list(given.case.anchors)
    assert plain[levels] == pytest.approx(list(given.case.default_anchors), abs=5e-5)
    assert (carded["height"], carded["width"]) == given.case.size
    assert carded["max_sequence_length"] == given.case.length
    assert plain["max_sequence_length"] == given.case.longest
    assert carded["guidance"] is plain["guidance"] is None
    assert carded["sampler"] == plain["sampler"] == "x0" and carded["steps"] == 4


def test_weights_that_do_not_fit_name_keys(given, tmp_path, capsys):
    state = dict(given.network.state_dict())
    lost = sorted(state)[0]
    del state[lost]
    state["cls_pred_branch.0.weight"] = torch.zeros(2, 2)
    torch.save({"model": state}, tmp_path / "odd.pth")
    flags = ["--checkpoint", tmp_path / "odd.pth", *SIZE, "--output_dir", tmp_path / "out"]
    text = error_of(capsys, given.family, given.base, *flags)
    assert f"1 missing ({lost})" in text
    assert "1 not part of the network (cls_pred_branch.0.weight)" in text
    assert not (tmp_path / "out").exists()


# Sampling


def test_a_student_is_drawn_by_the_sampler_that_rewards_have_trained(given, tmp_path):
    shutil.copytree(given.run, tmp_path / "run")
    (card,) = (tmp_path / "run").rglob(CARD)
    card.write_text(json.dumps({**json.loads(card.read_text()), "eta": 0.7}))
    trained, plain = (
        find_model(given.family, Paths(given.base, run)) for run in (tmp_path / "run", given.run)
    )
    for model, drawing, expected in (
        (trained, Drawing(), ("cps", 0.7)),
        (trained, Drawing(sampler="cps", eta=0.2), ("cps", 0.2)),
        (trained, Drawing(sampler="x0"), ("x0", None)),
        (plain, Drawing(), ("x0", None)),
    ):
        plan = model.plan(drawing)
        assert (plan.sampler, plan.eta) == expected


def test_a_prompt_is_as_long_as_the_pipelines_and_a_student_as_it_was_trained(given, tmp_path):
    """Of a tokenizer without a limit of its own, as Qwen's is."""
    family = given.family
    if family.tokenizer is None:
        return
    file = f"{family.tokenizer}/tokenizer_config.json"
    base = changed_copy(given.base, tmp_path / "base", file, model_max_length=10**6)
    call_of = inspect.signature(getattr(diffusers, family.pipeline_class).__call__)
    default = call_of.parameters["max_sequence_length"].default
    most = family.most_tokens(base)  # of a tiny network's positions less
    teacher = find_model(family, Paths(base))
    assert teacher.plan(Drawing()).max_sequence_length == min(default, most)
    shutil.copytree(given.run, tmp_path / "run")
    (card,) = (tmp_path / "run").rglob(CARD)
    card.write_text(json.dumps({**json.loads(card.read_text()), "max_sequence_length": most}))
    student = find_model(family, Paths(base, tmp_path / "run"))
    family.require(settings_of(base, given.case.size, most))
    assert student.plan(Drawing()).max_sequence_length == most
    said = f"max_sequence_length {most + 1}: {family.title} takes {most} tokens"
    with pytest.raises(ValueError, match=said):
        family.require(settings_of(base, given.case.size, most + 1))
    with pytest.raises(ValueError, match=said):
        student.plan(Drawing(max_sequence_length=most + 1))


@pytest.mark.parametrize("sampler", ["x0", "euler"])
def test_images_do_not_depend_on_the_batch(sampler, given, tmp_path):
    flags = ["--checkpoint", given.run, "--sampler", sampler, "--seed", 3, *prompt_flags()]
    flags += ["--output_dir"]
    assert call(given.family, given.base, *flags, tmp_path / "one") == 0
    assert call(given.family, given.base, *flags, tmp_path / "all", "--batch_size", 3) == 0
    one, together = pictures(tmp_path / "one"), pictures(tmp_path / "all")
    assert len(one) == len({image.tobytes() for image in one.values()}) == 3
    assert one.keys() == together.keys()
    assert all(grey_levels_apart(one[name], together[name]) <= 1 for name in one)


def test_samplers_differ_but_for_one_step(given, tmp_path):
    flags = ["--checkpoint", given.run, "--prompt", PROMPTS[0], "--output_dir"]
    for sampler in ("x0", "euler"):
        for steps in (1, 4):
            out = tmp_path / f"{sampler}{steps}"
            sampled = [*flags, out, "--sampler", sampler, "--steps", steps]
            assert call(given.family, given.base, *sampled) == 0
    assert grey_levels_apart(only_picture(tmp_path / "x01"), only_picture(tmp_path / "euler1")) <= 1
    assert grey_levels_apart(only_picture(tmp_path / "x04"), only_picture(tmp_path / "euler4")) > 5


def test_cps_goes_from_euler_to_x0(given):
    """To a grey level at its ends; between them a picture of its own, in any batch."""
    student = load_student(given.base, given.run)

    def drawn(sampler: str, eta: float | None = None, num: int = 1) -> np.ndarray:
        drawing = Drawing(sampler=sampler, eta=eta, seed=3)
        return np.array(sample(student, PROMPTS[:num], drawing, batch_size=num)[0])

    ends, between = [drawn("euler"), drawn("x0")], drawn("cps", 0.7)
    for eta, end in enumerate(ends):
        assert grey_levels_apart(drawn("cps", eta), end) <= 1
        assert grey_levels_apart(between, end) > 5
    assert np.array_equal(drawn("cps", 0.7), between)
    assert grey_levels_apart(drawn("cps", 0.7, num=2), between) <= 1


def test_cps_of_a_teachers_own_steps(given):
    """SDXL's euler is its folder's own scheduler: there cps is x0's timesteps, down to DDIM."""
    if given.family.name not in ("flux", "sdxl"):  # one of each path
        return
    teacher = load_teacher(given.base)

    def drawn(sampler: str, eta: float | None = None) -> np.ndarray:
        height, width = given.case.size
        drawing = Drawing(steps=2, sampler=sampler, eta=eta, height=height, width=width, seed=3)
        return np.array(sample(teacher, PROMPTS[0], drawing)[0])

    assert grey_levels_apart(drawn("cps", 1), drawn("x0")) <= 1
    is_euler = grey_levels_apart(drawn("cps", 0), drawn("euler")) <= 1
    assert is_euler == (given.family.name != "sdxl")


def test_explicit_levels_are_the_steps_of_the_same_anchors(given, tmp_path, capsys):
    levels, anchors = given.family.levels, given.case.anchors
    flags = ["--checkpoint", given.run, "--prompt", PROMPTS[0], "--output_dir"]
    assert call(given.family, given.base, *flags, tmp_path / "a", "--steps", 2) == 0
    chosen = [levels.flag, anchors[0], anchors[2]]
    assert call(given.family, given.base, *flags, tmp_path / "b", *chosen) == 0
    assert np.array_equal(only_picture(tmp_path / "a"), only_picture(tmp_path / "b"))
    assert sidecars(tmp_path / "b")[0][levels.name] == [anchors[0], anchors[2]]
    said = ", ".join(f"{anchor:g}" for anchor in anchors)
    for wrong in ([anchors[0], levels.number(anchors[1] - 0.01 * anchors[0])], anchors[::-1]):
        text = error_of(capsys, given.family, given.base, *flags, tmp_path, levels.flag, *wrong)
        assert levels.flag in text and f"trained anchors {said}" in text


def test_half_precision_is_near_float32(given, tmp_path):
    flags = ["--checkpoint", given.run, "--prompt", PROMPTS[0], "--sampler", "euler"]
    flags += ["--output_dir"]
    for name in ("float32", "bfloat16"):  # float16 is for GPUs
        assert call(given.family, given.base, *flags, tmp_path / name, "--dtype", name) == 0
    half, full = only_picture(tmp_path / "bfloat16"), only_picture(tmp_path / "float32")
    assert 0 < np.abs(half.astype(float) - full).mean() < 8


def test_compile_runs_the_same(given, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    flags = ["--checkpoint", given.run, "--prompt", "x", "--output_dir", tmp_path, "--compile"]
    assert call(given.family, given.base, *flags) == 0
    assert set(compiled) == set(given.family.blocks)


def test_lora_changes_the_images(given, tmp_path, capsys):
    adapted = given.case.student()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline_class = getattr(diffusers, given.family.pipeline_class)
    pipeline_class.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(adapted))
    flags = ["--checkpoint", given.run, "--prompt", PROMPTS[0], "--output_dir"]
    assert call(given.family, given.base, *flags, tmp_path / "plain") == 0
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    for name, path in (("a", tmp_path / "lora"), ("b", file)):
        assert call(given.family, given.base, *flags, tmp_path / name, "--lora", path) == 0
    plain, a, b = (only_picture(tmp_path / name) for name in ("plain", "a", "b"))
    assert np.array_equal(a, b) and not np.array_equal(a, plain)
    save_file({"nothing.weight": torch.zeros(1)}, tmp_path / "no.safetensors")
    lora = ["--lora", tmp_path / "no.safetensors"]
    assert "no.safetensors" in error_of(
        capsys, given.family, given.base, *flags, tmp_path / "c", *lora
    )


# The README's lines

README = {
    "flux": ["--flux_ckpt", "BASE", "--checkpoint", "senseflow_checkpoint.pth"],
    "sdxl": ["--sdxl_ckpt", "BASE", "--checkpoint", "senseflow_checkpoint.pth"],
    "dmd2": ["--sdxl_ckpt", "BASE", "--checkpoint", "dmd2_checkpoint.pth"],
    "sd35": ["--sd35_ckpt", "BASE", "--checkpoint", "senseflow_checkpoint.pth"],
    "sd35_large": ["--sd35_ckpt", "BASE", "--checkpoint", "senseflow_checkpoint.pth"],
    "flux2": ["--flux2_ckpt", "BASE", "--checkpoint", "senseflow_checkpoint.pth"],
}
SCRIPTS = {
    "flux": "scripts_flux/test_flux_senseflow.py",
    "sdxl": "scripts_sdxl/test_sdxl_senseflow.py",
    "dmd2": "scripts_sdxl/test_sdxl_dmd2.py",
    "sd35": "scripts_sd35/test_senseflow_sd35.py",
    "sd35_large": "scripts_sd35/test_senseflow_sd35_large.py",
    "flux2": "scripts_flux2/test_flux2_klein_senseflow.py",
}
CONFIG_FLAGS = {
    "flux": "--dit_config",
    "sdxl": "--unet_config",
    "dmd2": "--unet_config",
    "sd35": "--transformer_config",
    "sd35_large": "--transformer_config",
    "flux2": "--dit_config",
}


def run_script(monkeypatch, name: str, words: list[object]) -> int:
    script = str(ROOT / SCRIPTS[name])
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize("name", README)
def test_the_readmes_lines_as_typed(name, everything, tmp_path, monkeypatch, capsys):
    """With a .pth, --output_dir ./outputs, and every default; then every optional flag."""
    given, num = everything[name], 23 if name == "flux" else 2
    monkeypatch.setattr(cli, "NUM_PROMPTS", num)
    monkeypatch.chdir(tmp_path)
    words = [given.base if word == "BASE" else word for word in README[name]]
    torch.save({"model": given.network.state_dict()}, words[-1])
    size = SIZE if "flux" in name else ()  # FLUX's default is 1024 x 1024 whatever the base
    line = [*words, "--output_dir", "./outputs", *size]
    assert run_script(monkeypatch, name, line) == 0
    assert len(pictures(tmp_path / "outputs")) == num
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given.network.save_config(tmp_path / "config")
    optional = ["--prompts_file", "prompts.txt", "--start_idx", 1, "--num_prompts", 2]
    optional += ["--batch_size", 2, "--output_dir", "others"]
    optional += [CONFIG_FLAGS[name], "config/config.json"]
    assert run_script(monkeypatch, name, [*words, *optional, *size]) == 0
    assert [side["prompt"] for side in sidecars(tmp_path / "others")] == PROMPTS[1:]
    assert sidecars(tmp_path / "others")[0]["config"] == "config/config.json"


@pytest.mark.parametrize("name", [n for n in README if "flux" not in n])
def test_the_default_config_is_the_bases(name, everything, tmp_path, capsys):
    given = everything[name]
    torch.save(given.network.state_dict(), tmp_path / "bare.pth")
    flags = ["--checkpoint", tmp_path / "bare.pth", "--output_dir", tmp_path / "out"]
    assert call(given.family, given.base, *flags, "--prompt", "x") == 0
    config = given.base / given.family.component / "config.json"
    assert sidecars(tmp_path / "out")[0]["config"] == str(config)
    base = tmp_path / "base"
    shutil.copytree(given.base, base)
    shutil.rmtree(base / given.family.component)
    text = error_of(capsys, given.family, base, *flags)
    assert f"{given.family.config_flag} is missing" in text


# Another family's input


def scripts_of(name: str) -> tuple[str, ...]:
    """The scripts an input of `name` can be meant for."""
    alike = {"sdxl": ("sdxl", "dmd2"), "dmd2": ("sdxl", "dmd2")}
    return tuple(SCRIPTS[n] for n in alike.get(name, (name,)))


def pairs() -> list[tuple[str, str]]:
    names = ("flux", "sd35", "sdxl")
    both = [("flux", "flux2"), ("flux2", "flux")]
    return [(a, b) for a in names for b in names if a != b] + both


@pytest.mark.parametrize(("ours", "theirs"), [*pairs(), ("sd35", "sd35_large")])
def test_a_base_of_another_family_names_its_script(ours, theirs, everything, tmp_path, capsys):
    a, b = everything[ours], everything[theirs]
    for mine, other, name in ((a, b, theirs), (b, a, ours)):
        flags = ["--checkpoint", mine.run, "--output_dir", tmp_path / "out"]
        text = error_of(capsys, mine.family, other.base, *flags)
        assert f"{mine.family.base_flag} {other.base} is" in text and mine.family.title in text
        assert text.endswith("use " + " or ".join(scripts_of(name)))


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_a_checkpoint_of_another_family_names_its_script(
    ours, theirs, everything, tmp_path, capsys
):
    mine, other = everything[ours], everything[theirs]
    torch.save({"model": other.network.state_dict()}, tmp_path / "bare.pth")
    other.network.save_pretrained(tmp_path / "plain")
    alike = SCRIPTS[theirs]
    for path in (other.run, tmp_path / "bare.pth", tmp_path / "plain"):
        flags = ["--checkpoint", path, "--output_dir", tmp_path / "out"]
        text = error_of(capsys, mine.family, mine.base, *flags)
        assert str(path) in text and "use scripts_" in text and alike in text
    config = tmp_path / "plain" / "config.json"
    flags = ["--checkpoint", mine.run, mine.family.config_flag, config]
    text = error_of(capsys, mine.family, mine.base, *flags, "--output_dir", tmp_path / "out")
    assert f"{config} is of a {other.family.network_class}" in text and alike in text


@pytest.mark.parametrize(
    ("name", "anchors", "said"),
    [
        ("flux", [999, 749], "anchors 999, 749 are not sigmas"),
        ("sd35", [999, 749], "anchors 999, 749 are not sigmas"),
        ("sdxl", [1.0, 0.9], "anchors 1, 0.9 are not timesteps"),
        ("sdxl", [999.5, 749.0], "do not fall, as sigmas from 1"),
        ("flux", [1000.0, 904.5], "do not fall, as sigmas from 1"),
    ],
)
def test_cards_with_the_other_kind_of_anchors(name, anchors, said, everything, tmp_path, capsys):
    given = everything[name]
    shutil.copytree(given.run, tmp_path / "run")
    file = tmp_path / "run" / "student" / "step_0000020" / "senseflow.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "anchors": anchors}))
    flags = ["--checkpoint", tmp_path / "run", "--output_dir", tmp_path / "out"]
    assert said in error_of(capsys, given.family, given.base, *flags)


@pytest.mark.parametrize("name", list(CASES))
def test_a_student_takes_no_guidance(name, everything, tmp_path, capsys):
    given = everything[name]
    for guidance in (0, 1, 4.5):
        flags = ["--checkpoint", given.run, "--output_dir", tmp_path, "--guidance", guidance]
        text = error_of(capsys, given.family, given.base, *flags)
        assert f"--guidance {guidance:g}: this student takes no guidance" in text
