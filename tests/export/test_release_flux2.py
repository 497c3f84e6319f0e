"""A FLUX.2-klein student in its forms: stock diffusers draws our images, and reads our files."""

import math

import pytest
from command_line import grey_levels_apart
from diffusers import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file
from students import Shipped, moved, ours, run_script, script_of, shifted

from senseflow.teachers.flux2.family import FLUX2
from senseflow.weights.card import StudentCard, write_card
from senseflow.weights.fingerprint import base_fingerprint

LENGTH = 38
TOKENS = 64  # of 32 x 32 pixels


@pytest.fixture(scope="module")
def shipped(flux2_folder, tmp_path_factory) -> Shipped:
    """Trained at the pipeline's own four steps."""
    folder = tmp_path_factory.mktemp("klein") / "step_0000020"
    moved(flux2_folder / "transformer", guided=False).save_pretrained(folder)
    anchors = shifted(math.exp(compute_empirical_mu(TOKENS, num_steps=4)))
    fingerprint = base_fingerprint(flux2_folder / "transformer")
    facts = ("flux2", anchors, 32, 32, None, LENGTH, "pipeline", fingerprint, 20)
    write_card(folder, StudentCard(*facts))
    return Shipped(folder, flux2_folder, FLUX2, anchors)


def test_the_cards_script_draws_our_image_at_the_anchors(shipped, tmp_path, monkeypatch):
    """Its mu is of the number of steps, and the anchors' one shift stands in the scheduler."""
    folder = tmp_path / "student"
    assert shipped.export(folder, "--form", "pipeline", "--license", "apache-2.0") == 0
    mine = ours(shipped, tmp_path / "ours", seed=7)
    script = script_of(folder).replace("manual_seed(0)", "manual_seed(7)")
    theirs, names = run_script(script, folder, monkeypatch)
    assert grey_levels_apart(theirs, mine) <= 1 and mine.shape == (32, 32, 3)
    times = names["pipe"].scheduler.timesteps.tolist()
    assert times == pytest.approx([1000 * anchor for anchor in shipped.anchors], rel=1e-6)
    assert names["call"]["guidance_scale"] == 1.0


def test_diffusers_reads_the_authors_names_bit_for_bit(shipped, tmp_path):
    assert shipped.export(tmp_path / "out", "--form", "original", "--license", "mit") == 0
    file = tmp_path / "out" / "out.safetensors"
    keys = load_file(file).keys()
    assert {"double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"} <= keys
    theirs = Flux2Transformer2DModel.from_single_file(str(file), config=str(shipped.folder))
    own = load_file(shipped.folder / "diffusion_pytorch_model.safetensors")
    state = theirs.state_dict()
    assert state.keys() == own.keys()
    assert all((state[key] == own[key]).all() for key in own)
    again = ours(shipped, tmp_path / "own", seed=7)
    single = Shipped(file, shipped.base, FLUX2, shipped.anchors)
    flags = [FLUX2.levels.flag, *shipped.anchors, "--height", 32, "--width", 32]
    read = ours(single, tmp_path / "single", *flags, "--max_sequence_length", LENGTH, seed=7)
    assert grey_levels_apart(again, read) <= 1


def test_fewer_steps_are_among_the_anchors(shipped, tmp_path):
    two = ours(shipped, tmp_path / "two", "--steps", 2, seed=7)
    flags = [FLUX2.levels.flag, *shipped.anchors[::2]]
    assert grey_levels_apart(two, ours(shipped, tmp_path / "named", *flags, seed=7)) == 0
