"""The choices of a head's layers: its text layer, and the schedule of spectral norm."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senseflow.distill.vfm_heads import EqualizedLinear, Heads, Layers, SpectralConv, text_layer_of

torch.set_num_threads(1)

LENGTH = 768  # of CLIP's text feature
RELEASE = Layers(spectral_norm="release")


@pytest.fixture(autouse=True)
def _same_numbers_each_run() -> None:
    torch.manual_seed(0)


def stored(layer: nn.Linear) -> nn.Parameter:
    """The weights that the optimizer moves."""
    return next(p for name, p in layer.named_parameters() if name != "bias")


def test_the_equalized_layer_is_its_formula() -> None:
    layer = EqualizedLinear(LENGTH, 64)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(5, LENGTH)
    want = x.double() @ (stored(layer).double() / math.sqrt(LENGTH)).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-6)


def test_where_the_two_layers_start() -> None:
    """N(0, 1) stored, so .0361 acting, and no bias; the plain layer's uniform law has .0208."""
    equalized, plain = EqualizedLinear(LENGTH, 64), nn.Linear(LENGTH, 64)
    assert stored(equalized).std().item() == pytest.approx(1, abs=0.015)
    assert equalized.weight.std().item() == pytest.approx(1 / math.sqrt(LENGTH), rel=0.015)
    assert equalized.weight.std().item() == pytest.approx(0.0361, rel=0.015)
    assert not equalized.bias.any()
    assert plain.weight.std().item() == pytest.approx(1 / math.sqrt(3 * LENGTH), rel=0.015)


def test_a_step_of_adam_moves_the_equalized_layer_by_less() -> None:
    """Adam's first step is lr times the gradient's sign: 27.7 times as far in the plain layer."""
    moved = []
    for layer in (EqualizedLinear(LENGTH, 64), nn.Linear(LENGTH, 64)):
        before = layer.weight.detach().clone()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, eps=1e-12, weight_decay=0)
        layer(torch.randn(8, LENGTH)).square().mean().backward()
        optimizer.step()
        moved.append((layer.weight - before).abs())
    equalized, plain = moved
    torch.testing.assert_close(plain, torch.full((64, LENGTH), 1e-3), rtol=1e-3, atol=0)
    want = torch.full((64, LENGTH), 1e-3 / math.sqrt(LENGTH))
    torch.testing.assert_close(equalized, want, rtol=0.01, atol=0)
    assert (plain.mean() / equalized.mean()).item() == pytest.approx(27.7, rel=0.01)


@pytest.mark.parametrize("reference", [True, False])
def test_all_linear_layers_of_heads_are_of_the_kind_asked_for(reference: bool) -> None:
    kinds = {"equalized": EqualizedLinear, "linear": nn.Linear}
    for name, kind in kinds.items():
        heads = Heads(2, 8, 6, reference, Layers(text=name))
        linear = [module for module in heads.modules() if isinstance(module, nn.Linear)]
        assert [head.text for head in heads.heads] == linear
        assert all(isinstance(layer, kind) for layer in linear)
        assert text_layer_of(heads.state_dict()) == name
    assert isinstance(Heads(1, 8, 6).heads[0].text, EqualizedLinear)
    assert text_layer_of(["layers.0.weight"]) is None  # DMD2's head


def test_heads_with_the_same_acting_weights_judge_alike() -> None:
    equalized, plain = Heads(1, 8, 6).eval(), Heads(1, 8, 6, layers=Layers(text="linear")).eval()
    state = equalized.state_dict()
    weights = state.pop("heads.0.text.parametrizations.weight.original")
    plain.load_state_dict(state | {"heads.0.text.weight": weights / math.sqrt(6)})
    maps, text, reference = torch.randn(2, 8, 9, 9), torch.randn(2, 6), torch.randn(2, 8, 9, 9)
    one, other = (heads([maps], text, [reference]) for heads in (equalized, plain))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def iterated(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """u and v after three power iterations from u, each v first."""
    for _ in range(3):
        v = F.normalize(weight.T @ u, dim=0)
        u = F.normalize(weight @ v, dim=0)
    return u, v


def test_the_release_iterates_three_times_from_random_vectors() -> None:
    conv = SpectralConv(16, 16, 3, schedule="release")
    torch.manual_seed(0)
    drawn = SpectralConv(16, 16, 3)  # the same draws, then 15 iterations
    weight = conv.parametrizations.weight.original.detach().flatten(1).double()
    norm = torch.linalg.matrix_norm(weight, 2)

    def sigma(which: SpectralConv) -> Tensor:
        kept = which.parametrizations.weight[1]
        return kept._u.double() @ weight @ kept._v.double()

    assert abs(sigma(conv)) < 0.3 * norm and sigma(drawn) == pytest.approx(norm.item(), rel=0.02)
    kept = conv.parametrizations.weight[1]
    u, v = iterated(weight, kept._u.double())
    conv(torch.zeros(1, 16, 4, 4))
    torch.testing.assert_close(kept._u.double(), u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept._v.double(), v, rtol=1e-4, atol=1e-5)
    for _ in range(100):
        conv(torch.zeros(1, 16, 4, 4))
    assert torch.linalg.matrix_norm(conv.eval().weight.flatten(1), 2).item() == pytest.approx(
        1, abs=0.02
    )


def test_heads_on_the_releases_schedule_move_where_they_are_stepped() -> None:
    heads = Heads(1, 8, 6, layers=RELEASE).eval()
    assert len(heads.norms) == 2 * 7
    maps, text = [torch.randn(2, 8, 8, 8)], torch.randn(2, 6)

    def moved(moving: bool) -> bool:
        before = [b.clone() for b in heads.buffers()]
        with heads.power_iteration(moving):
            heads(maps, text, maps)
        return not all(map(torch.equal, before, heads.buffers()))

    assert moved(True) and not moved(False)
    assert heads.state_dict().keys() == Heads(1, 8, 6).state_dict().keys()
