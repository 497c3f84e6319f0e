"""One frozen network in three roles: what each computes, who learns, and what IDA does to them."""

from functools import partial

import pytest
import torch
from lora_parts import CASES, Shared, adapters_for, component_of, gradients, make_shared, whole
from peft.tuners.lora import LoraLayer
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from senseflow.core.ida import align_
from senseflow.distill.state import frozen
from senseflow.engine.export import Layout, write_component
from senseflow.optim.stretches import local_shards
from senseflow.weights.lora_files import written_key
from senseflow.weights.stored import LORA_FILE
from senseflow.weights.student import build_lora_student

FLUX_LAYERS = [  # of one double and one single block, by hand
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.0.proj_out",
    "proj_out",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_teacher_is_the_base_bit_for_bit(name, dtype):
    shared = make_shared(name, dtype=dtype)
    assert {p.dtype for p in shared.generator.parameters()} == {torch.float32}
    with torch.no_grad():
        plain = shared.run(shared.plain)
        student, fake = shared.run(shared.generator), shared.run(shared.fake_score)
        assert torch.equal(shared.run(shared.teacher), plain)
    assert not torch.equal(student, plain) and not torch.equal(student, fake)


@pytest.mark.parametrize("name", CASES)
def test_every_role_begins_as_the_teacher(name):
    shared = make_shared(name, "AB", moved=False)
    with torch.no_grad():
        plain = shared.run(shared.plain)
        assert torch.equal(shared.run(shared.generator), plain)
        assert torch.equal(shared.run(shared.fake_score), plain)
    state, other = shared.generator.state_dict(), shared.fake_score.state_dict()
    assert all(torch.equal(whole(state[k]), whole(other[k])) for k in state)
    assert {bool(whole(v).any()) for k, v in state.items() if "lora_A" in k} == {True}


@pytest.mark.parametrize("train", ["B", "AB"])
def test_a_role_has_the_parameters_of_its_adapter_alone(train):
    shared = make_shared("flux", train)
    keys = {f"{layer}.lora_{f}.weight" for layer in FLUX_LAYERS for f in "AB"}
    assert set(shared.generator.state_dict()) == set(shared.fake_score.state_dict()) == keys
    trained = {k for k in keys if k[-8] in train}
    assert {k for k, _ in shared.generator.named_parameters()} == trained
    assert list(shared.teacher.parameters()) == [] and shared.teacher.state_dict() == {}
    mine, theirs = (dict(r.named_parameters()) for r in (shared.generator, shared.fake_score))
    assert all(mine[k] is not theirs[k] and mine[k].dtype == torch.float32 for k in trained)
    with frozen(shared.fake_score):
        assert not any(p.requires_grad for p in theirs.values())
        assert all(p.requires_grad for p in mine.values())
    needing = {id(p) for p in shared.teacher.base.network.parameters() if p.requires_grad}
    assert needing == {id(p) for p in (*mine.values(), *theirs.values())}


def backward(shared: Shared) -> torch.Tensor:
    """The student with gradient, teacher and fake score without, and the student's way back, on
    which another adapter is active."""
    prediction = shared.run(shared.generator)
    with torch.no_grad():
        shared.run(shared.teacher), shared.run(shared.fake_score)
    loss = prediction.square().mean()
    with shared.teacher.base.acting_as(["fake_score"]):
        loss.backward()
    return loss.detach()


@pytest.mark.parametrize(("train", "selective"), [("B", False), ("AB", False), ("B", True)])
@pytest.mark.parametrize("name", CASES)
def test_recomputation_runs_with_the_role_of_its_forward(name, train, selective):
    kept = make_shared(name, train)
    again = make_shared(name, train, every=1, selective=selective)
    assert torch.equal(backward(kept), backward(again))
    one, two = gradients(kept.generator), gradients(again.generator)
    assert one.keys() == two.keys() == dict(kept.generator.named_parameters()).keys()
    assert [k for k in one if not torch.equal(one[k], two[k])] == []
    unused = "1.attn.add_q_proj"  # of SD3.5's last block: the text it makes is not read
    assert all(v.any() for k, v in one.items() if unused not in k)
    assert gradients(again.fake_score) == {}
    base = again.teacher.base.network
    assert len(gradients(base)) == len(two)  # no weight of the base has one


LATER = [pytest.param(1, how, marks=pytest.mark.long) for how in (False, True)]


@pytest.mark.parametrize(("every", "selective"), [(0, False), *LATER])
def test_compiled_blocks_know_their_role(every, selective, monkeypatch):
    """One graph for each class of block, role and kind of call, whatever the number of blocks."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    plain = make_shared("flux")
    compiled = make_shared("flux", every=every, selective=selective, compiled=True)
    with torch.no_grad():
        for role in ("teacher", "generator", "fake_score", "teacher"):
            expected, found = (s.run(getattr(s, role)) for s in (plain, compiled))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backward(compiled), backward(plain))
    one, two = gradients(plain.generator), gradients(compiled.generator)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-6)
    assert gradients(compiled.fake_score) == {}
    assert not counters["graph_break"]
    # two classes of blocks, three roles without gradients and one with them; a network's first
    # block may be called with text that needs no gradient
    assert 2 * 4 <= counters["stats"]["unique_graphs"] <= 2 * 4 + 2


def test_a_recomputation_that_forgets_its_role_would_be_seen():
    kept, wrong = make_shared("flux"), make_shared("flux", every=1, remember=False)
    backward(kept), backward(wrong)
    one, two = gradients(kept.generator), gradients(wrong.generator)
    assert any(not torch.allclose(one[k], two[k], rtol=0.1) for k in one)


def test_gradients_are_those_of_peft_on_one_whole_network(tmp_path):
    """The stock network with the adapter loaded by diffusers, differentiated by torch alone."""
    shared = make_shared("flux")
    expected = stock(shared, tmp_path)
    for module in expected.modules():
        if isinstance(module, LoraLayer):
            module.lora_B.requires_grad_(True)
    shared.run(expected).square().mean().backward()
    backward(shared)
    reference = {
        k.replace(".default_0.", "."): p.grad
        for k, p in expected.named_parameters()
        if p.requires_grad
    }
    found = gradients(shared.generator)
    assert found.keys() == reference.keys()
    for key in found:
        # in the file B is twice as large: the scale is in it
        torch.testing.assert_close(found[key], 2 * reference[key], rtol=1e-4, atol=1e-7)


def stock(shared, folder, name="transformer"):
    """The generator's file, read by diffusers on a copy of the base."""
    component = folder / name
    shared.plain.save_pretrained(component)
    state = {k: whole(v) for k, v in shared.generator.state_dict().items()}
    key = partial(written_key, name, component_of(component).kohya)
    layout = Layout.of_lora(state, torch.float32, key, scale=2.0)
    tensors = (layout.written(key, value) for key, value in state.items())
    write_component(folder / "lora", layout, tensors, lambda _: None)
    lora = adapters_for(folder / "lora" / LORA_FILE, component)
    lora.require_all()
    return build_lora_student(lora, component, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_diffusers_reads_the_file_with_the_right_scale(name, tmp_path):
    shared = make_shared(name, "AB")
    network = stock(shared, tmp_path, "unet" if name == "sdxl" else "transformer")
    with torch.no_grad():
        difference = shared.run(shared.generator) - shared.run(shared.plain)
        torch.testing.assert_close(
            shared.run(network) - shared.run(shared.plain), difference, rtol=1e-3, atol=1e-5
        )
    assert difference.abs().max() > 1e-2


def test_a_file_for_another_network_names_its_keys(tmp_path):
    (tmp_path / "flux").mkdir(), (tmp_path / "sd35").mkdir()
    stock(make_shared("flux"), tmp_path / "flux")
    stock(make_shared("sd35"), tmp_path / "sd35")
    file = tmp_path / "sd35" / "lora" / LORA_FILE
    lora = adapters_for(file, tmp_path / "flux" / "transformer")
    with pytest.raises(ValueError, match=r"does not fit: \d+ of its \d+ layers fit nowhere"):
        lora.require_all()


def test_what_diffusers_writes_with_alpha_in_its_header_is_what_we_write_with_it_in_b(tmp_path):
    from diffusers import FluxPipeline

    shared = make_shared("flux")
    stock(shared, tmp_path)
    FluxPipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers={k: whole(v) for k, v in shared.generator.state_dict().items()},
        transformer_lora_adapter_metadata={
            "r": 4, "lora_alpha": 8.0, "target_modules": list(shared.case.targets)
        },
    )  # fmt: skip
    files = [tmp_path / folder / LORA_FILE for folder in ("lora", "theirs")]
    mine, theirs = (adapters_for(file, tmp_path / "transformer").tensors for file in files)
    assert mine.keys() == theirs.keys() == load_file(files[0]).keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def effective(role, layer: str) -> torch.Tensor:
    """scale B A of a layer, float64, by its definition."""
    state = {k: whole(v).double() for k, v in role.state_dict().items()}
    return 2.0 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("train", ["B", "AB"])
def test_ida_on_adapters_and_on_effective_weights(train):
    """Eq. 9 on the factors is Eq. 9 on W + s B A where A is shared; else it is off by exactly
    -lam (1 - lam) s (B_phi - B_theta)(A_phi - A_theta)."""
    lam, shared = 0.9, make_shared("flux", train)
    layer = FLUX_LAYERS[2]
    phi, theta = (effective(role, layer) for role in (shared.fake_score, shared.generator))
    b, a = (
        whole(shared.fake_score.get_parameter(f"{layer}.lora_{f}.weight")).double()
        - whole(shared.generator.get_parameter(f"{layer}.lora_{f}.weight")).double()
        if f in train
        else torch.zeros(1, dtype=torch.float64)
        for f in "BA"
    )
    align_(
        local_shards(shared.fake_score.parameters()),
        local_shards(shared.generator.parameters()),
        lam,
    )
    expected = lam * phi + (1 - lam) * theta
    if train == "AB":
        cross = -lam * (1 - lam) * 2.0 * b @ a
        assert cross.abs().max() > 1e-2
        expected = expected + cross
    torch.testing.assert_close(effective(shared.fake_score, layer), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(effective(shared.generator, layer), theta, rtol=0, atol=0)


def test_state_dicts_of_role_and_optimizer_go_round():
    shared, other = make_shared("flux"), make_shared("flux", moved=False)
    for part in (shared, other):
        part.optimizer = torch.optim.AdamW(part.generator.parameters(), lr=0.1)
    backward(shared)
    shared.optimizer.step()
    state = get_state_dict(shared.generator, shared.optimizer)
    set_state_dict(
        other.generator,
        other.optimizer,
        model_state_dict=state[0],
        optim_state_dict=state[1],
    )
    for mine, theirs in zip(
        shared.generator.parameters(), other.generator.parameters(), strict=True
    ):
        assert torch.equal(whole(mine), whole(theirs))
    with torch.no_grad():
        assert torch.equal(shared.run(shared.generator), other.run(other.generator))


def check_two_ranks(rank: int, expected: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
    shared = make_shared("flux", "AB", every=1)
    found = {"loss": backward(shared), **gradients(shared.generator)}
    for key, value in ({"loss": loss} | expected).items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.long
def test_two_ranks_give_the_gradients_of_one():
    shared = make_shared("flux", "AB", every=1)
    loss = backward(shared)
    on_ranks(2, check_two_ranks, gradients(shared.generator), loss)
