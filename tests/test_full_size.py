"""Whole iterations of the recipes at full size, on fake tensors: benchmarks/full_size.py.

Without the marker `long`, SD3.5 Medium is built, and its parameters are counted.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.full_size import build, costs, count, trace, write_folder
from senseflow.common.files import ROOT
from senseflow.config.recipes import RECIPES
from senseflow.plan.rehearsal import networks_of, trained_of

T5 = 4_762_310_656
FLOW_VAE, SDXL_VAE = 83_819_683, 83_653_863
CLIP_L, CLIP_L_PROJECTED, BIG_G = 123_060_480, 123_650_304, 694_659_840
VFM = {"heads": 773_391_872, "clip_text": CLIP_L_PROJECTED}
SD35_ENCODERS = {
    "text_encoder": CLIP_L_PROJECTED,
    "text_encoder_2": BIG_G,
    "text_encoder_3": T5,
    "vae": FLOW_VAE,
}
SDXL_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": BIG_G, "vae": SDXL_VAE}
FLUX2_ENCODERS = {"text_encoder": 4_022_468_096, "vae": 84_046_115}
Z_IMAGE_ENCODERS = {"text_encoder": 4_022_468_096, "vae": FLOW_VAE}
FLUX_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": T5, "vae": FLOW_VAE}


def denoisers(teacher: int, student: int | None = None) -> dict[str, int]:
    student = student or teacher
    return {"teacher": teacher, "generator": student, "fake_score": student}


PARAMETERS = {
    "sdxl_senseflow": denoisers(2_567_463_684) | VFM | SDXL_ENCODERS,
    "sd35_senseflow": denoisers(2_243_171_520) | VFM | SD35_ENCODERS,
    # three convolutions 4 x 4 that halve and one that ends, of 1280 channels, norms, one logit
    "sdxl_dmd2": denoisers(2_567_463_684)
    | {"heads": 4 * (16 * 1280 * 1280 + 1280 + 2 * 1280) + 1280 + 1}
    | SDXL_ENCODERS,
    "sd35_large_senseflow": denoisers(8_056_627_520) | VFM | SD35_ENCODERS,
    "z_image_senseflow": denoisers(6_154_908_736) | VFM | Z_IMAGE_ENCODERS,
    "qwen_image_senseflow": denoisers(20_430_401_088)
    | VFM
    | {"text_encoder": 7_070_619_136, "vae": 126_892_531},  # what words go through alone
    "flux_senseflow": denoisers(11_901_408_320, 11_891_178_560) | VFM | FLUX_ENCODERS,
}
PARAMETERS["flux2_klein_senseflow"] = denoisers(3_875_544_576) | VFM | FLUX2_ENCODERS
DINOV2 = 304_367_616 - 2 * 1024  # without its last norm, which is not run
# Of Qwen-Image's last block no pixel sees what the text becomes: the weights and biases of its
# attention's way out and of its two layers.
UNSEEN = {"qwen_image_senseflow": 6}
ALWAYS = ("sd35_senseflow",)
# DMD2's classifier halves the bottleneck three times before a convolution over 4 x 4, so that no
# side may be below 1024
OTHER_SIZE = {"sdxl_dmd2": (1024, 1280)}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.long) for name in PARAMETERS
    ],
)
def instance(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, RECIPES[request.param])
    return build(RECIPES[request.param], folder)


@pytest.fixture(scope="module")
def counted(instance):
    return costs(instance)


def resized(instance):
    """The same networks at a size that is not square."""
    d = instance.parts
    size = OTHER_SIZE.get(d.config.recipe, (832, 1216))
    family, settings = RECIPES[d.config.recipe].family, replace(d.adapter.settings, resolution=size)
    shape = family.latent_shape(settings)
    parts = replace(d, adapter=replace(d.adapter, shape=shape))
    batch = instance.batch
    with instance.mode:
        if batch.images is not None:
            batch = replace(batch, images=batch.images.new_empty(1, 3, *size))
        else:
            batch = replace(batch, latents=batch.latents.new_empty(1, *shape))
            batch = replace(batch, other=batch.other and replace(batch, other=None))
    return replace(instance, parts=parts, batch=batch)


def check(instance, traced, names):
    """Latents have the latents' shape; all parameters of `names`, and no others, are stepped: but
    for those that have no gradient."""
    shape = (1, *instance.parts.adapter.latent_shape())
    assert {name: tuple(s) for name, s in traced.pictures.items()} == dict.fromkeys(
        traced.pictures, shape
    )
    assert sorted(traced.steps) == sorted(names)
    for name, shapes in traced.steps.items():
        assert len(shapes) == len(list(trained_of(instance.parts)[name].network.parameters()))
        moved = [step for step in shapes if step[1:] != (None, None)]
        assert all(own == gradient == moment for own, gradient, moment in moved), name
        unseen = 0 if name == "heads" else UNSEEN.get(instance.parts.config.recipe, 0)
        assert len(moved) == len(shapes) - unseen, name


def check_generator_turn(instance):
    config, cfg = (
        instance.parts.config,
        1 if RECIPES[instance.parts.config.recipe].family.embeds_guidance else 2,
    )
    traced = trace(instance, generator=True, anchor=1, simulate=True)
    check(instance, traced, ["generator", "fake_score", "heads"])
    simulated, student = ("generator", 1, False), ("generator", 1, True)
    dmd = [("teacher", cfg, False), ("fake_score", 1, False)]
    isg = [("teacher", cfg, False), ("generator", 1, False)] if config.isg.weight else []
    assert traced.calls == [simulated, student, *dmd, *isg, ("fake_score", 1, True)]
    pictures = {"generated", "clean input", "teacher x0", "fake x0"}
    assert set(traced.pictures) == pictures | ({"ISG target", "ISG direct"} if isg else set())


def check_plain_turn(instance):
    traced = trace(instance, generator=False, anchor=1, simulate=False)
    check(instance, traced, ["fake_score", "heads"])
    assert traced.calls == [("generator", 1, False), ("fake_score", 1, True)]


def test_parameters(instance):
    counted = {
        name: sum(p.numel() for p in network.parameters())
        for name, network in networks_of(instance.parts).items()
    }
    if "dinov2" in counted:
        assert counted.pop("dinov2") == DINOV2
    assert counted == PARAMETERS[instance.parts.config.recipe]


def test_weights_fill_all_of_a_denoiser(instance):
    for name in ("teacher", "generator"):
        network = networks_of(instance.parts)[name]
        held = {key for key, _ in [*network.named_parameters(), *network.named_buffers()]}
        assert held == set(network.state_dict())


@pytest.mark.long
def test_a_generator_turn(instance):
    check_generator_turn(instance)


@pytest.mark.long
def test_a_plain_turn_that_is_not_square(instance):
    check_plain_turn(resized(instance))


@pytest.mark.long
def test_a_generator_turn_that_is_not_square(instance):
    check_generator_turn(resized(instance))


@pytest.mark.long
def test_the_costs_of_simulated_iterations_add_up(instance, counted):
    """Two kinds that are not among those counted."""
    for kind in ((False, 2, True), (True, 1, True)):
        assert counted.at(*kind) == count(instance, lambda kind=kind: trace(instance, *kind))
    mean = counted.mean(instance.parts.config)
    assert counted.at(False, 0, False) < mean < counted.at(True, 3, True)


@pytest.mark.long
def test_a_plan_counts_the_same(instance, counted, tmp_path):
    """Sharded over two ranks, by the run's own code: the mean of one sample's FLOPs."""
    recipe = RECIPES[instance.parts.config.recipe]
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "senseflow.plan", "--config", str(ROOT / recipe.config)]
    flags = ["--gpus", "2", "--memory", "1000", "--output", str(file), "train.batch_size=2"]
    subprocess.run([*command, *flags], check=True)
    expected = counted.mean(instance.parts.config)
    assert json.loads(file.read_text())["mean_flop"] == pytest.approx(expected, rel=1e-3)
