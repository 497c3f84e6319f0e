"""DMD2's classifier: the encoder pass of the fake score's UNet, and the head on its bottleneck."""

import pytest
import sdxl_pipeline
import torch
from diffusers import UNet2DConditionModel
from teacher_parts import CPU, PROMPTS, built, settings_of
from torch.utils.flop_counter import FlopCounterMode

from senseflow.common.ranks import start_ranks
from senseflow.distill.bottleneck import ClassifierHead, add_encoder_pass, encode, require_head
from senseflow.engine.parallel import shard
from senseflow.teachers.sdxl.adapter import blocks_of
from senseflow.teachers.sdxl.family import SDXL

SIZE = (24, 40)
UP_HALF = ("up_blocks.", "conv_norm_out.", "conv_out.")


def unet(seed: int = 0) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sdxl_pipeline.unet()


def with_encoder_pass(network: UNet2DConditionModel, sharded: bool) -> UNet2DConditionModel:
    if sharded:
        shard(network, blocks_of(network), start_ranks().mesh)
    add_encoder_pass(network)
    return network


@pytest.fixture(scope="module")
def adapter(sdxl_folder):
    return SDXL.load_adapter(settings_of(sdxl_folder, SIZE, length=None), CPU, built)


@pytest.fixture(scope="module")
def inputs(adapter):
    """x_t, t, conditioning: two samples at two times, not square."""
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, *adapter.latent_shape(), generator=generator)
    return x_t, torch.tensor([749.0, 20.0]), adapter.encode_prompts(PROMPTS)


def hooked(adapter, network, inputs) -> torch.Tensor:
    """What the mid-block puts out in the stock UNet's whole forward."""
    kept = []
    hook = network.mid_block.register_forward_hook(lambda module, args, output: kept.append(output))
    adapter.predict(network, *inputs)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_encode_is_the_mid_blocks_output_in_the_stock_forward(
    adapter, inputs, sharded, frozen, recomputed
):
    """Values, and gradients for the input and for the weights of the encoder half alone."""
    whole, network = unet(), unet()
    if recomputed:
        network.enable_gradient_checkpointing()
    for one in (whole, network):
        one.requires_grad_(not frozen)
    with_encoder_pass(network, sharded)
    x_t, t, cond = inputs
    mine, theirs = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    features, expected = (
        adapter.bottleneck(network, mine, t, cond),
        hooked(adapter, whole, (theirs, t, cond)),
    )
    assert torch.equal(features, expected)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert mine.grad.abs().amax((1, 2, 3)).gt(0).all()
    for (name, ours), other in zip(network.named_parameters(), whole.parameters(), strict=True):
        assert (ours.grad is None) == (frozen or name.startswith(UP_HALF)), name
        if ours.grad is not None:
            grad = ours.grad.full_tensor() if sharded else ours.grad
            torch.testing.assert_close(grad, other.grad, rtol=1e-4, atol=1e-5)


def test_encode_in_the_compute_dtype_is_the_stock_forwards(sdxl_folder):
    settings = settings_of(sdxl_folder, SIZE, length=None, compute_dtype=torch.bfloat16)
    adapter, network = SDXL.load_adapter(settings, CPU, built), unet().bfloat16()
    x_t, t = torch.randn(2, *adapter.latent_shape()), torch.tensor([999.0, 3.0])
    cond = adapter.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = hooked(adapter, network, (x_t, t, cond))
        features = adapter.bottleneck(with_encoder_pass(network, False), x_t, t, cond)
    assert features.dtype == torch.float32 and torch.equal(features, expected.float())


def test_sharded_weights_take_part_in_both_passes_between_two_steps(adapter, inputs):
    """A whole forward, an encoder pass and a step: the next pass sees the new weights."""
    whole, network = unet(), with_encoder_pass(unet(), sharded=True)
    add_encoder_pass(whole)
    for _ in range(2):
        for one in (whole, network):
            adapter.predict(one, *inputs).square().mean().backward()
            adapter.bottleneck(one, *inputs).square().mean().backward()
            optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        features = [adapter.bottleneck(one, *inputs) for one in (network, whole, unet_pass())]
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features[0], features[2], atol=1e-3)


def unet_pass() -> UNet2DConditionModel:
    return with_encoder_pass(unet(), sharded=False)


def flops(work) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_the_up_half_is_neither_run_nor_counted(adapter, inputs):
    network = unet_pass()
    called = []
    for name, module in network.named_modules():
        if name.startswith(UP_HALF) or f"{name}." in UP_HALF:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    encoder = flops(lambda: adapter.bottleneck(network, *inputs))
    assert called == []
    whole = flops(lambda: adapter.predict(network, *inputs))
    assert "conv_out" in called and 0 < encoder < whole
    network.up_blocks, network.conv_norm_out = torch.nn.ModuleList(), None
    network.conv_out = torch.nn.Identity()
    assert flops(lambda: adapter.predict(network, *inputs)) == encoder


def test_bottleneck_of_sdxls_own_unet_is_what_the_head_takes():
    """At 1024 pixels, on the meta device."""
    with torch.device("meta"):
        network = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        features = encode(
            network, torch.empty(1, 4, 128, 128), torch.empty(1), torch.empty(1, 77, 2048), added
        )
    assert features.shape == (1, 1280, 32, 32)


# ---------------------------------------------------------------------------------------- head


def test_head_at_full_size_is_dmd2s():
    """METHOD's layers: 1280 channels at 32 x 32, of 1024 pixels, to one logit."""
    with torch.device("meta"):
        head = ClassifierHead(1280, downsamplings=3, norm_groups=32, seed=0)
        logits = head(torch.empty(2, 1280, 32, 32))
    assert logits.shape == (2, 1)
    convs = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(tuple(c.kernel_size), c.stride[0], c.padding[0], c.out_channels) for c in convs] == [
        *[((4, 4), 2, 1, 1280)] * 3,
        ((4, 4), 4, 0, 1280),
        ((1, 1), 1, 0, 1),
    ]
    kinds = [type(m).__name__ for m in head.layers]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU"] * 4 + ["Conv2d"]
    norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(n.num_groups, n.num_channels) for n in norms} == {(32, 1280)}
    assert sum(p.numel() for p in head.parameters()) == 4 * (16 * 1280**2 + 3 * 1280) + 1281


@pytest.mark.parametrize(
    ("shape", "num_logits"), [((8, 8), 1), ((16, 16), 4), ((8, 23), 2), ((15, 15), 1)]
)
def test_logits_of_other_maps_and_none_of_too_small_ones(shape, num_logits):
    head = ClassifierHead(8, downsamplings=1, norm_groups=4, seed=0)
    assert head(torch.randn(3, 8, *shape)).shape == (3, num_logits)
    require_head((8, *shape), downsamplings=1, norm_groups=4)
    with pytest.raises(ValueError, match=r"downsamplings 1 needs .* 8 x 8; .* it is 7 x "):
        require_head((8, 7, shape[1]), downsamplings=1, norm_groups=4)


@pytest.mark.parametrize("size", [(24, 40), (32, 32), (40, 56)])
def test_bottleneck_shape_is_the_mid_blocks(sdxl_folder, size):
    adapter = SDXL.load_adapter(settings_of(sdxl_folder, resolution=size), CPU, built)
    network = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet")
    add_encoder_pass(network)
    x_t = torch.randn(1, *adapter.latent_shape())
    with torch.no_grad():
        cond = adapter.encode_prompts(["a"])
        features = adapter.bottleneck(network, x_t, torch.tensor([500.0]), cond)
    assert SDXL.bottleneck(settings_of(sdxl_folder, resolution=size)) == features.shape[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_computes_in_the_dtype_it_is_gathered_in(dtype):
    """precision.heads; the bottleneck's features are float32."""
    whole, sharded = (ClassifierHead(8, 1, 4, seed=0) for _ in range(2))
    shard(sharded, [], start_ranks().mesh, dtype)
    features = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(6))
    logits, expected = sharded(features), whole(features)
    assert logits.dtype == dtype
    close = dict(rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-6)
    torch.testing.assert_close(logits.float(), expected, **close)
    logits.float().sum().backward()
    assert {p.grad.dtype for p in sharded.parameters()} == {torch.float32}


def test_head_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (ClassifierHead(8, 1, 4, seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="norm_groups 3 does not divide the bottleneck's 8"):
        require_head((8, 32, 32), downsamplings=1, norm_groups=3)
