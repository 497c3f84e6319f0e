"""Weights and moments in fewer bits: the update arrives, bad steps change nothing, resume."""

from functools import partial

import pytest
import torch
from compact import KINDS, give_gradients, iterate, pair, round_trip
from sharded import values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from senseflow.common.ranks import start_ranks
from senseflow.config.sections import OptimizerConfig
from senseflow.engine.checkpoint import Checkpoints
from senseflow.engine.inputs import check_offload
from senseflow.optim import compact_adamw, stretches
from senseflow.optim.compact_adamw import CompactAdamW
from senseflow.optim.eight_bit import code_numbers, decode
from senseflow.optim.ema import Ema
from senseflow.optim.trained import Trained, align_networks, total_norm

RANKS = start_ranks()
NUM = 2**14
TAKEN = torch.ones(())  # a step that was
SETTINGS = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def weights() -> torch.Tensor:
    """In [0.5, 1), where neighbours in bfloat16 are 2^-8 apart."""
    return (torch.rand(256, 64, generator=torch.Generator().manual_seed(0)) / 2 + 0.5).bfloat16()


def after_1000_steps(optimizer: torch.optim.AdamW) -> torch.Tensor:
    """How far each weight went along the mean of its gradients, which are bfloat16 for all."""
    (parameter,) = optimizer.param_groups[0]["params"]
    sign = torch.where(torch.arange(NUM).view(256, 64) % 2 == 0, 1.0, -1.0)
    generator = torch.Generator().manual_seed(1)
    for seed in range(1000):
        gradient = (torch.randn(256, 64, generator=generator) + sign) / 100
        parameter.grad = gradient.bfloat16().to(parameter.dtype)
        optimizer.seed = seed
        optimizer.step()
    return (weights().float() - parameter.detach().float()) * sign


@pytest.fixture(scope="module")
def in_float32() -> torch.Tensor:
    return after_1000_steps(torch.optim.AdamW([nn.Parameter(weights().float())], **SETTINGS))


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_at_lr_1e_6_the_expected_update_arrives(in_float32, states):
    """A weight jumps by a gap g with chance d / g at a step of d: over all steps its variance is at
    most g times the way it goes in float32, at most 1000 lr each; five deviations of the mean."""
    moved = after_1000_steps(CompactAdamW([nn.Parameter(weights())], states, **SETTINGS)).double()
    deviation = (2**-8 * 1000 * 1e-6 / NUM) ** 0.5
    bias = {"float32": 0.0, "bfloat16": 0.002, "8bit": 0.01}[states]  # 1 / sqrt(v), v rounded
    expected = in_float32.double().mean()
    assert expected > 6e-4
    assert abs(moved.mean() - expected) < 5 * deviation + bias * expected
    assert 5 * deviation < 0.12 * expected


def test_rounded_to_nearest_nothing_arrives():
    """torch's own AdamW on bfloat16 parameters, for comparison."""
    parameter = nn.Parameter(weights())
    assert after_1000_steps(torch.optim.AdamW([parameter], fused=True, **SETTINGS)).abs().max() == 0


@pytest.mark.parametrize("lam, steps", [(0.97, 120), (0.999, 1000)])
def test_ida_closes_the_gap_in_bfloat16(lam, steps):
    """The expected gap is lam^n of the first, as rounding is unbiased and the average linear."""
    theta, phi = nn.Linear(64, 256, bias=False), nn.Linear(64, 256, bias=False)
    theta.weight.data = weights()
    phi.weight.data = (weights().float() - 0.05).bfloat16()
    begun = phi.weight.detach().clone()
    for seed in range(steps):
        align_networks(phi, theta, lam, TAKEN, seed)
    gap = (theta.weight - phi.weight).double()
    first = (theta.weight - begun).double()
    deviation = (2**-8 * first.mean() / NUM) ** 0.5
    assert abs(gap.mean() - lam**steps * first.mean()) < 5 * deviation
    nearest = begun.clone()  # the same without noise stops where a step is below half a gap
    for _ in range(steps):
        nearest.lerp_(theta.weight.detach(), 1 - lam)
    assert (theta.weight - nearest).double().mean() > 0.94 * first.mean()


def test_in_float32_it_is_torchs_adamw():
    one, other = (nn.Linear(64, 9) for _ in range(2))
    other.load_state_dict(one.state_dict())
    settings = {**SETTINGS, "lr": 0.01, "weight_decay": 0.1}
    optimizers = (
        torch.optim.AdamW(one.parameters(), fused=True, **settings),
        CompactAdamW(other.parameters(), "float32", **settings),
    )
    for _ in range(5):
        for network, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            network(torch.linspace(-1, 1, 128).view(2, 64)).square().sum().backward()
            optimizer.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_neither_weights_nor_state(kind, bad):
    trained = pair(RANKS, kind)["generator"]
    for iteration in (1, 2):
        give_gradients(trained, iteration)
        trained.step(iteration)
    before = values({"generator": trained})
    give_gradients(trained, 3, bad)
    assert not torch.isfinite(trained.step(3))
    after = values({"generator": trained})
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    give_gradients(trained, 3)  # and the next good one does
    trained.step(3)
    after = values({"generator": trained})
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert still and all("scale" in key or "running" in key or "tracked" in key for key in still)


def test_a_bad_gradient_does_not_round_codes_again(monkeypatch):
    """With some noise a code's own value, up to its last bit, would go to a neighbour."""
    layer = nn.Linear(64, 4096, bias=False)
    trained = Trained.build(layer, 0.1, OptimizerConfig(0.1, 0.1, 0.1, states="8bit"))
    layer.weight.grad = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    trained.step(0)
    before = {k: v.clone() for k, v in trained.optimizer.state[layer.weight].items()}
    monkeypatch.setattr(compact_adamw, "noise_of", lambda bits, part: torch.zeros_like(bits).int())
    layer.weight.grad = torch.full((4096, 64), torch.nan)
    trained.step(1)
    after = trained.optimizer.state[layer.weight]
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_and_the_learning_rate(kind):
    """Of a gradient of norm 5, clipped to 1, the first moment holds a tenth of a fifth."""
    layer = nn.Linear(64, 1, bias=False).to(kind[0])
    trained = Trained.build(layer, 0.1, OptimizerConfig(0.1, 0.1, 0.1, states=kind[1]))
    gradient = torch.zeros(1, 64)
    gradient[0, :2] = torch.tensor([3.0, 4.0])
    layer.weight.grad = gradient.to(kind[0])
    before = layer.weight.detach().float().clone()
    assert trained.set_lr(0.5) == 0.05
    assert trained.step(0).item() == 5.0 and layer.weight.grad is None
    moved = before - layer.weight.detach().float()
    torch.testing.assert_close(moved[0, :2], torch.full((2,), 0.05), rtol=0.02, atol=0.002)
    state = trained.optimizer.state[layer.weight]
    if kind[1] == "8bit":
        largest = (
            state["exp_avg_scales"].item()
            * decode(state["exp_avg_codes"][0], torch.ones(1), code_numbers(True)).max()
        )
        assert largest == pytest.approx(0.08, rel=0.01)
    else:
        moment = state["exp_avg"].float()[0, :2]
        torch.testing.assert_close(moment, torch.tensor([0.06, 0.08]), rtol=0.01, atol=0)


def test_the_norm_of_bfloat16_gradients_is_that_of_float32():
    gradients = [torch.randn(300, 7, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    rounded = [g.bfloat16() for g in gradients]
    exact = torch.cat([g.double().flatten() for g in rounded]).norm()
    norm = total_norm(rounded)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_identical(kind, tmp_path):
    result = round_trip(RANKS, tmp_path, kind)
    kept = {str(v.dtype).removeprefix("torch.") for k, v in result.items() if "exp_avg" in k}
    expected = {"float32": {"float32"}, "bfloat16": {"bfloat16"}, "8bit": {"float32", "uint8"}}
    assert kept == expected[kind[1]]
    averages = {v.dtype for k, v in result.items() if k.startswith("ema.")}
    assert averages == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_saving_before_the_first_step_leaves_weights_and_optimizer_at_their_start(kind, tmp_path):
    trained, untouched = pair(RANKS, kind), pair(RANKS, kind)
    Checkpoints(tmp_path, 0, RANKS).save(1, trained)
    for name, part in trained.items():
        assert {float(s["step"]) for s in part.optimizer.state.values()} == {0.0}
        for p, q in zip(
            part.network.parameters(), untouched[name].network.parameters(), strict=True
        ):
            assert torch.equal(p.full_tensor(), q.full_tensor())
    iterate(trained, None, 1, 1)
    iterate(untouched, None, 1, 1)
    one, other = values(trained), values(untouched)
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def test_moments_of_another_kind_are_refused_and_of_another_type_taken(tmp_path):
    """From float32 to bfloat16 and back a run may change; to 8 bits it would start anew."""
    trained = pair(RANKS, KINDS[0])
    iterate(trained, None, 1, 1)
    saves = Checkpoints(tmp_path, 0, RANKS)
    folder = saves.save(1, trained)
    other = pair(RANKS, (torch.bfloat16, "bfloat16"))
    saves.load(folder, other)
    weight, rounded = (t["generator"].network[0].weight for t in (trained, other))
    assert torch.equal(rounded.to_local(), weight.to_local().bfloat16())
    with pytest.raises(ValueError, match=r"exp_avg_codes"):
        saves.load(folder, pair(RANKS, (torch.float32, "8bit")))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_groups_do_not_change_what_is_computed(kind, monkeypatch):
    results = []
    for size in (64, 2**22):
        monkeypatch.setattr(stretches, "GROUP", size)
        trained = pair(RANKS, kind)
        iterate(trained, None, 1, 2)
        results.append(values(trained))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_it_gives_the_same_bits(kind, backend, monkeypatch):
    """Also of a bad step, of groups of other sizes, and of IDA."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(stretches, "GROUP", 192)
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        trained = pair(RANKS, kind, compiled=compiled)
        for iteration, bad in enumerate((None, float("nan"), None)):
            for part in trained.values():
                give_gradients(part, iteration, bad)
                part.step(iteration)
        theta, phi = (part.network for part in trained.values())
        for seed in (1, 2):
            align_networks(phi, theta, 0.9, TAKEN, seed, compiled)
        results.append(values(trained))
    assert [k for k in results[0] if not torch.equal(results[0][k], results[1][k])] == []


def test_another_seed_rounds_otherwise_and_the_same_alike():
    results = []
    for offset in (0, 0, 1):
        trained = pair(RANKS, (torch.bfloat16, "bfloat16"))["generator"]
        give_gradients(trained, 1)
        trained.step(5 + offset)
        results.append(trained.network[0].weight.full_tensor().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_on_fake_tensors(kind):
    with FakeTensorMode():
        layer = nn.Linear(64, 3, dtype=kind[0])
        trained = Trained.build(layer, 0.1, OptimizerConfig(0.1, 0.1, 0.1, states=kind[1]))
        layer.weight.grad = torch.empty_like(layer.weight)
        layer.bias.grad = torch.empty_like(layer.bias)
        assert trained.step(0).shape == ()
        align_networks(layer, layer, 0.97, torch.ones(()), 0)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_shards_in_host_memory_are_trained_alike(kind):
    """Without a GPU the two places are one; what is tested is that the policy's path is walked."""
    x = torch.linspace(-1, 1, 4 * 64).view(4, 64)
    results = []
    for offload in (False, True):
        trained = pair(RANKS, kind, offload)
        ema = Ema.start(trained["generator"].network, 0.9)
        for seed in (1, 2):
            for part in trained.values():
                part.network[0](x.to(kind[0])).square().sum().backward()
                assert part.network[0].weight.grad is not None
                part.step(seed)
            ema.update(TAKEN)
        results.append(values(trained, ema))
    assert [k for k in results[0] if not torch.equal(results[0][k], results[1][k])] == []


def test_offloading_without_a_gpu_is_refused():
    for place in ("trained", "heads"):
        with pytest.raises(ValueError, match=rf"parallel.offload: {place} needs a GPU"):
            check_offload(place, num_gpus=0)
        check_offload(place, num_gpus=1)
    check_offload("none", num_gpus=0)
