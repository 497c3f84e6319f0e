"""A run that begins with another run's networks, or with a student; anchors for 1 to 8 steps."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import short_runs
import torch
from embedded import YAMLS
from safetensors.torch import load_file, save_file
from short_runs import begin, finish, write_pictures
from student_networks import load_network

from senseflow.config.config import Config
from senseflow.config.recipes import RECIPES
from senseflow.engine.adversary import heads_as_trained
from senseflow.engine.build import check_networks, export
from senseflow.engine.initial import open_initial
from senseflow.engine.inputs import Inputs, read_run
from senseflow.engine.loop import Run

SHORT = ("train.iter_num=2", "fake_score.ttur=1")
FLUX_ANCHORS = {  # mu 1.15 through sigma = s u / (1 + (s - 1) u), s = e^1.15
    1: [1.0],
    2: [1.0, 0.7595],
    4: [1.0, 0.9045, 0.7595, 0.5128],
    8: [1.0, 0.9567, 0.9045, 0.8404, 0.7595, 0.6546, 0.5128, 0.3109],
}
SD35_ANCHORS = {
    1: [1.0],
    2: [1.0, 0.75],
    4: [1.0, 0.9, 0.75, 0.5],
    8: [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3],
}
SDXL_ANCHORS = {
    1: [999],
    2: [999, 499],
    4: [999, 749, 499, 249],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}
KLEIN_ANCHORS = {  # e^mu for s, of diffusers' compute_empirical_mu at 16 tokens and so many steps
    1: [1.0],
    2: [1.0, 0.8766],
    4: [1.0, 0.9545, 0.8749, 0.6999],
    8: [1.0, 0.9794, 0.9532, 0.9188, 0.8716, 0.8028, 0.6934, 0.4922],
}
Z_IMAGE_ANCHORS = {  # 6 t / (1 + 5 t)
    1: [1.0],
    2: [1.0, 0.8571],
    4: [1.0, 0.9474, 0.8571, 0.6667],
    8: [1.0, 0.9767, 0.9474, 0.9091, 0.8571, 0.7826, 0.6667, 0.4615],
}
ANCHORS = {
    "flux_senseflow": FLUX_ANCHORS,
    "sdxl_senseflow": SDXL_ANCHORS,
    "sdxl_dmd2": SDXL_ANCHORS,
    "flux2_klein_senseflow": KLEIN_ANCHORS,
    "z_image_senseflow": Z_IMAGE_ANCHORS,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


def configure(data: Path, *overrides: str, recipe: str = "flux_senseflow") -> Config:
    return short_runs.configure(data, *SHORT, *overrides, recipe=recipe)


def inputs_of(config: Config) -> Inputs:
    return read_run(config, RECIPES[config.recipe].family)


def train(config: Config, folder: Path) -> Run:
    return finish(begin(config, folder))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Run:
    """A 4-step run of two iterations, with an adversary."""
    return train(configure(data), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> Run:
    """One that begins with nothing, before its first iteration."""
    return begin(configure(data), tmp_path_factory.mktemp("plain"))


def state(run: Run, name: str) -> dict[str, torch.Tensor]:
    network = run.trained[name].network
    return {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in network.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_one_step_goes_on_from_a_four_step_run(data, trained, tmp_path):
    config = configure(data, "anchors.times=[1000]", f"paths.initial={trained.folder}")
    run = begin(config, tmp_path / "one")
    for name in ("generator", "fake_score", "discriminator"):
        assert equal(state(run, name), state(trained, name)), name
    assert not equal(state(run, "generator"), state(run, "fake_score"))
    assert run.resume() == 0 and not run.parts.generator.optimizer.state
    finish(run)
    assert not equal(state(run, "generator"), state(trained, "generator"))
    # its own checkpoint comes before what it began with
    again = begin(config, tmp_path / "one")
    assert again.resume() == 2
    assert equal(state(again, "generator"), state(run, "generator"))


def test_a_checkpoint_of_the_run_will_do(data, trained, tmp_path):
    step = trained.folder / "checkpoints" / "step_0000002"
    run = begin(configure(data, f"paths.initial={step}"), tmp_path)
    assert equal(state(run, "fake_score"), state(trained, "fake_score"))


def test_heads_keep_the_text_layer_they_were_trained_with(data, trained, tmp_path, caplog):
    """Those of a run's own checkpoint, and those it begins with; a plain layer is said."""
    caplog.set_level("INFO")
    host = SimpleNamespace(is_main=True, on_main=lambda action: action())
    plain = inputs_of(configure(data, "adversarial.text_layer=linear"))
    for folder, initial in ((trained.folder, {}), (tmp_path, open_initial(trained.folder))):
        kept = heads_as_trained(plain, folder, initial, host)
        assert kept.config.adversarial.text_layer == "equalized"
        assert caplog.messages[-1].startswith("adversarial.text_layer: equalized, not linear: the")
    assert heads_as_trained(plain, tmp_path, {}, host) == plain
    assert "the release's is equalized" in caplog.messages[-1]
    silent = inputs_of(configure(data, "adversarial.kind=none"))
    assert heads_as_trained(silent, trained.folder, {}, host) == silent
    assert heads_as_trained(inputs_of(configure(data)), trained.folder, {}, host).config == (
        trained.config
    )
    assert len(caplog.messages) == 3


def test_heads_of_another_width_are_refused_before_anything_is_loaded(data, trained, tmp_path):
    """Those of the run's own checkpoint, and those it begins with: the embedded ViT is 64 wide."""
    said = (
        r"^adversarial.head_width 32: the heads of \S+ are 64 wide; say adversarial.head_width=64"
    )
    shutil.copytree(trained.folder, tmp_path / "own")
    for folder, overrides in (("own", ()), ("new", (f"paths.initial={trained.folder}",))):
        with pytest.raises(ValueError, match=said):
            begin(configure(data, "adversarial.head_width=32", *overrides), tmp_path / folder)
        begin(configure(data, "adversarial.head_width=64", *overrides), tmp_path / folder)
    narrow = configure(data, "adversarial.head_width=32")
    train(narrow, tmp_path / "narrow")
    begin(narrow, tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"head_width null: the heads of \S+ are 32 wide"):
        begin(configure(data), tmp_path / "narrow")


def test_a_student_alone_is_the_generator(data, trained, plain, tmp_path):
    step = trained.folder / "student" / "step_0000002"
    run = begin(configure(data, f"paths.initial={step}"), tmp_path / "run")
    student = load_network(step).state_dict()
    assert equal(state(run, "generator"), student)
    assert equal(state(run, "fake_score"), state(plain, "fake_score"))
    assert equal(state(run, "discriminator"), state(plain, "discriminator"))


def test_heads_are_new_where_the_first_run_had_none(data, plain, tmp_path):
    first = train(configure(data, "adversarial.kind=none"), tmp_path / "first")
    run = begin(configure(data, f"paths.initial={first.folder}"), tmp_path / "run")
    assert equal(state(run, "discriminator"), state(plain, "discriminator"))
    assert equal(state(run, "fake_score"), state(first, "fake_score"))


def test_what_it_cannot_begin_with_is_said_before_anything_is_loaded(data, trained, tmp_path):
    family = RECIPES["flux_senseflow"].family
    with pytest.raises(ValueError, match=r"paths.initial nowhere does not exist"):
        check_networks(read_run(configure(data, "paths.initial=nowhere"), family))
    cut = tmp_path / "cut"
    shutil.copytree(trained.folder / "student" / "step_0000002", cut)
    file = cut / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("x_embedder.bias")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"1 missing \(x_embedder.bias\)"):
        check_networks(read_run(configure(data, f"paths.initial={cut}"), family))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        check_networks(read_run(configure(data, f"paths.initial={tmp_path / 'empty'}"), family))
    sdxl = configure(data, f"paths.initial={trained.folder}", recipe="sdxl_senseflow")
    with pytest.raises(ValueError, match="do not fit"):
        check_networks(read_run(sdxl, RECIPES["sdxl_senseflow"].family))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("recipe", YAMLS)
def test_anchors_of_every_recipe_by_config(data, recipe, steps):
    top = 999 if "sdxl" in recipe else 1000
    times = [top - round(1000 * step / steps) for step in range(steps)]
    config = configure(data, f"anchors.times={times}", recipe=recipe)
    family = RECIPES[recipe].family
    inputs = read_run(config, family)
    check_networks(inputs)
    expected = ANCHORS.get(recipe, SD35_ANCHORS)[steps]
    card = export(inputs, "float32").card
    assert card.anchors == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("times", ["[1000]", "[1000,875,750,625,500,375,250,125]"])
def test_other_numbers_of_steps_train(data, tmp_path, times):
    overrides = (f"anchors.times={times}", "adversarial.kind=none")
    run = train(configure(data, *overrides, recipe="sd35_senseflow"), tmp_path)
    assert (run.folder / "student" / "step_0000002").is_dir()


def test_a_damaged_checkpoint_is_passed_over_and_what_it_begins_with_is_said(
    data, tmp_path, caplog
):
    first = train(configure(data, "adversarial.kind=none", "train.save_interval=1"), tmp_path / "a")
    older, newest = sorted((first.folder / "checkpoints").glob("step_*"))
    file = next(newest.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    config = configure(data, "adversarial.kind=none", f"paths.initial={first.folder}")
    with caplog.at_level("INFO"):
        run = begin(config, tmp_path / "b")
    assert "step_0000002 is damaged" in caplog.text and "using the one before" in caplog.text
    assert f"beginning with generator, fake_score of {first.folder}" in caplog.text
    older_run = begin(
        configure(data, "adversarial.kind=none", f"paths.initial={older}"), tmp_path / "c"
    )
    assert equal(state(run, "generator"), state(older_run, "generator"))
    with pytest.raises(ValueError, match="is damaged or not complete"):
        begin(configure(data, "adversarial.kind=none", f"paths.initial={newest}"), tmp_path / "d")
