"""Every form of a checkpoint gives the same network; everything else is an error that says why."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from flux_pipeline import transformer
from safetensors.torch import load_file, save_file
from student_networks import load_network

from senseflow.weights.card import StudentCard, read_card, write_card
from senseflow.weights.fingerprint import base_fingerprint
from senseflow.weights.student import find_student

WEIGHTS = "diffusion_pytorch_model.safetensors"
CARD = StudentCard(
    family="flux",
    anchors=(1.0, 0.9045, 0.7595, 0.5128),
    height=32,
    width=32,
    guidance=None,
    max_sequence_length=16,
    base_name="base",
    base_fingerprint="0" * 64,
    iteration=20,
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return transformer(guidance_embeds=False)


@pytest.fixture
def component(network, tmp_path) -> Path:
    """A diffusers component folder with a card."""
    folder = tmp_path / "component"
    network.save_pretrained(folder)
    write_card(folder, CARD)
    return folder


def config_of(network, tmp_path) -> Path:
    """config.json far from any weights."""
    folder = tmp_path / "elsewhere"
    network.save_config(folder)
    return folder / "config.json"


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    assert type(a) is type(b) and a.config.guidance_embeds == b.config.guidance_embeds
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def run_folder(component: Path, tmp_path: Path) -> Path:
    """Two steps; only the newer one is the component."""
    run = tmp_path / "run"
    shutil.copytree(component, run / "student" / "step_0000020")
    shutil.copytree(component, run / "student" / "step_0000003")
    (run / "student" / "step_0000003" / WEIGHTS).unlink()
    (run / "student" / ".step_0000030").mkdir()
    for step in ("step_0000003", "step_0000020", "step_0000030"):
        (run / "checkpoints" / step).mkdir(parents=True)
    return run


@pytest.mark.parametrize(
    "part", ["", "student", "student/step_0000020", "checkpoints/step_0000020"]
)
def test_run_folder_and_its_parts(part, network, component, tmp_path):
    run = run_folder(component, tmp_path)
    assert find_student(run / part).weights == run / "student" / "step_0000020" / WEIGHTS
    assert find_student(run / part).card == CARD
    assert_same(load_network(run / part), network)


def test_a_checkpoint_without_its_student_says_what_to_name(component, tmp_path):
    run = run_folder(component, tmp_path)
    for path in (run / "checkpoints" / "step_0000030", run / "checkpoints"):
        with pytest.raises(ValueError, match=r"whose student .* is gone; name another step"):
            find_student(path)


def test_component_folder_pipeline_folder_and_single_file(network, component, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(component, pipeline / "transformer")
    for path in (component, pipeline, component / WEIGHTS):
        assert_same(load_network(path), network)
        assert find_student(path).card == CARD


def test_shards(network, tmp_path):
    network.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    indices = list((tmp_path / "sharded").glob("*.index.json"))
    assert len(indices) == 1 and len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for path in (tmp_path / "sharded", indices[0]):
        assert_same(load_network(path), network)
    next((tmp_path / "sharded").glob("*-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"00002-of-.* is missing"):
        load_network(tmp_path / "sharded")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("inner", [None, "model", "ema_model"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "transformer."]
)
def test_pickles(suffix, inner, prefix, network, tmp_path):
    state = {prefix + key: value for key, value in network.state_dict().items()}
    file = tmp_path / f"student{suffix}"
    torch.save({inner: state, "iteration": 3} if inner else state, file)
    assert_same(load_network(file, config_of(network, tmp_path)), network)


def test_keys_of_compiled_blocks_and_the_old_pickle_format(network, tmp_path):
    state = {
        k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in network.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same(load_network(tmp_path / "a.pth", config_of(network, tmp_path)), network)


def test_dtype_and_mode(component):
    student = load_network(component, dtype=torch.bfloat16)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert not student.training and not any(p.requires_grad for p in student.parameters())
    assert not any(tensor.is_meta for tensor in (*student.parameters(), *student.buffers()))


def test_a_config_that_is_no_networks_is_not_the_weights_own(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "alone.safetensors")
    (tmp_path / "config.json").write_text('{"train": {}}')  # not a network's
    assert find_student(tmp_path / "alone.safetensors").config is None


def change(component: Path, change) -> None:
    state = load_file(component / WEIGHTS)
    change(state)
    save_file(state, component / WEIGHTS)


def test_missing_unknown_and_misshapen_keys_are_named_and_counted(component):
    lost = [k for k in load_file(component / WEIGHTS) if k.startswith("transformer_blocks.0.attn")]
    assert len(lost) > 5

    def spoil(state):
        for key in lost:
            del state[key]
        state["stranger"] = torch.zeros(1)
        state["proj_out.weight"] = torch.zeros(3, 3)

    change(component, spoil)
    with pytest.raises(ValueError) as error:
        load_network(component)
    text = str(error.value)
    assert str(component / WEIGHTS) in text and str(component / "config.json") in text
    assert f"{len(lost)} missing (transformer_blocks.0.attn" in text and ", ...)" in text
    assert "1 not part of the network (stranger)" in text
    assert "1 of another shape (proj_out.weight [3, 3], not [16, 32])" in text


def test_teacher_weights_do_not_fit_a_config_without_guidance(flux_folder, network, tmp_path):
    with pytest.raises(ValueError, match=r"4 not part of the network .*guidance_embedder"):
        load_network(flux_folder / "transformer", config_of(network, tmp_path))


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_safetensors_file_is_named(kept, component):
    data = (component / WEIGHTS).read_bytes()
    (component / WEIGHTS).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is (damaged|empty)"):
        load_network(component)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pickle_is_named(kept, zipped, network, tmp_path):
    file = tmp_path / "cut.pth"
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut\.pth (is damaged|is empty|cannot be read)"):
        load_network(file, config_of(network, tmp_path))


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_pickle_with_code_is_not_run(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": network.state_dict(), "bomb": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth .* holds more than tensors.*: getattr"):
        load_network(tmp_path / "bomb.pth", config_of(network, tmp_path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [{"optimizer": {}}, [1, 2], {}, {"model": {"step": 3}}])
def test_a_pickle_without_weights(content, network, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth holds no weights"):
        load_network(tmp_path / "odd.pth", config_of(network, tmp_path))


def test_wrong_paths_name_the_accepted_forms(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("nothing", "does not exist"),
        ("notes.txt", "not a weights"),
        ("empty", "no weights"),
    ):
        with pytest.raises(ValueError, match=rf"{said}.*may be a run folder.*ema_model"):
            find_student(tmp_path / name)


def test_several_weights_files_are_not_guessed_between(component):
    (component / WEIGHTS).rename(component / "a.safetensors")
    shutil.copy(component / "a.safetensors", component / "b.safetensors")
    with pytest.raises(ValueError, match=r"several weights files: a\.safetensors, b\.safetensors"):
        find_student(component)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"_class_name": "Nonsense"}', "'Nonsense' is not a network of diffusers"),
        ('{"_class_name": "FluxPipeline"}', "'FluxPipeline' is not a network of diffusers"),
        ("{}", "None is not a network of diffusers"),
    ],
)
def test_bad_configs(text, said, component, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json.*{said}"):
        load_network(component, tmp_path / "bad.json")


def test_card_round_trip(tmp_path):
    assert read_card(tmp_path) is None
    write_card(tmp_path, CARD)
    assert read_card(tmp_path) == CARD
    tree = json.loads((tmp_path / "senseflow.json").read_text())
    assert tree["format"] == 1 and tree["base"] == {"name": "base", "fingerprint": "0" * 64}
    assert set(tree) - {"format", "base"} == {
        *(f.name for f in dataclasses.fields(CARD) if not f.name.startswith("base_")),
        "base_form",
    }


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"format": None}, "format null"),
        ({"family": 3}, "family 3 is not a text"),
        ({"anchors": [0.5, 0.9]}, "anchors .* do not fall"),
        ({"anchors": []}, "anchors .* do not fall"),
        ({"anchors": [1000.0, 904.5]}, "anchors .* do not fall"),
        ({"anchors": ["1"]}, "anchors .* do not fall"),
        ({"anchors": [float("nan")]}, "anchors .* do not fall"),
        ({"anchors": None}, "anchors null is not a list"),
        ({"anchors": "999"}, "anchors '999' is not a list"),
        ({"height": 0}, "height 0 must be from 1 to 65535"),
        ({"height": None}, "height null is not a whole number"),
        ({"height": "32"}, "height '32' is not a whole number"),
        ({"width": 32.0}, "width 32.0 is not a whole number"),
        ({"width": True}, "width true is not a whole number"),
        ({"guidance": "x"}, "guidance 'x' is not a number or null"),
        ({"guidance": float("nan")}, "guidance nan must be"),
        ({"guidance": -1}, "guidance -1 must be from 0"),
        ({"max_sequence_length": -1}, "max_sequence_length -1 must be from 1 to 1e9"),
        ({"max_sequence_length": "x"}, "max_sequence_length 'x' is not a whole number or null"),
        ({"iteration": -1}, "iteration -1 must be from 0 to 1e9"),
        ({"iteration": None}, "iteration null is not a whole number"),
        ({"ema": 2}, "ema 2 must be from 0 to 1"),
        ({"eta": 2}, "eta 2 must be from 0 to 1"),
        ({"base": {}}, "base {} does not have a name and a fingerprint alone"),
        ({"base": None}, "base null does not have"),
        ({"base": {"name": 1, "fingerprint": ""}}, "base_name 1 is not a text"),
        ({"surprise": 1}, "unknown surprise"),
    ],
)
def test_damaged_cards_name_the_key(spoil, said, tmp_path):
    write_card(tmp_path, CARD)
    file = tmp_path / "senseflow.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **spoil}))
    with pytest.raises(ValueError, match=rf"senseflow\.json is not a student's card: {said}"):
        read_card(tmp_path)


def test_cards_without_a_key_or_in_no_json_are_named(tmp_path):
    write_card(tmp_path, CARD)
    file = tmp_path / "senseflow.json"
    tree = json.loads(file.read_text())
    for key in tree.keys() - {"ema", "recipe", "base_form", "eta"}:
        file.write_text(json.dumps({name: value for name, value in tree.items() if name != key}))
        with pytest.raises(ValueError, match=rf"senseflow\.json is not a student's card: .*{key}"):
            read_card(tmp_path)
    for text, said in (("[]", "holds no JSON object"), ("{", "is not valid JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"senseflow\.json {said}"):
            read_card(tmp_path)


def test_fingerprint_sees_names_sizes_heads_and_tails(tmp_path):
    def fingerprint(name: str, data: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_bytes(data)
        (folder / "config.json").write_text(folder.name)
        return base_fingerprint(folder)

    mib = 2**20
    data = bytes(3 * mib)
    same = fingerprint("a.safetensors", data)
    assert fingerprint("a.safetensors", data) == same and len(same) == 64
    assert fingerprint("b.safetensors", data) != same
    assert fingerprint("a.safetensors", data + b"\0") != same
    assert fingerprint("a.safetensors", b"\1" + data[1:]) != same
    assert fingerprint("a.safetensors", data[:-1] + b"\1") != same
    assert fingerprint("a.safetensors", data[: mib + 9] + b"\1" + data[mib + 10 :]) == same
    with pytest.raises(ValueError, match="no weights in"):
        base_fingerprint(tmp_path)
