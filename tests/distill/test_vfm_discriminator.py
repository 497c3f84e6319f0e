"""Backbone taps, prompt features and heads against computations written out independently."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from senseflow.distill.vfm_features import FrozenBackbone, PromptEncoder
from senseflow.distill.vfm_heads import Head, Heads, Layers, LocalBatchNorm, SpectralConv

torch.set_num_threads(1)

WIDTH, TAPS = 24, (0, 2)
D = 1024  # the width of a ViT-L
BLOCK = 12 * D * D + 12 * D  # attention and MLP, their biases but q's, k's and v's, norms, scales
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def _same_numbers_each_run() -> None:
    torch.manual_seed(0)


def randomize(model: nn.Module) -> None:
    """Give every parameter a size at which leaving it out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def vit_folder(path: Path, architecture: str) -> Path:
    """A timm folder with a ViT of 4 blocks and patch 4; a position table, if any, is 8x8."""
    args = {"img_size": 32, "patch_size": 4, "embed_dim": WIDTH, "depth": 4, "num_heads": 2}
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": args | {"init_values": 1.0},
        "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [3, 32, 32], "num_classes": 0},
    }
    (path / "config.json").write_text(json.dumps(config))
    model = timm.create_model(f"local-dir:{path}", pretrained=False)
    randomize(model)
    save_file(model.state_dict(), path / "model.safetensors")
    return path


@pytest.fixture(
    scope="module",
    params=[
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",  # rotary positions, a CLS token and four registers
        "vit_small_plus_patch16_dinov3_qkvb",  # and gated layers, as the largest
    ],
)
def vit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"), request.param)


def hooked_features(folder: Path, images: Tensor) -> list[Tensor]:
    """The taps from hooks on timm's own forward of a whole model."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, dynamic_img_size=True).eval()
    caught: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    for tap in TAPS:
        model.blocks[tap].register_forward_hook(lambda _, args, output: caught.append(output))
    height, width = images.shape[2] // 4 * 4, images.shape[3] // 4 * 4
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    images = images[:, :, top : top + height, left : left + width]
    for channel in range(3):
        unit = (images[:, channel] + 1) / 2
        images[:, channel] = (unit - MEAN[channel]) / STD[channel]
    model.forward_features(images)
    maps = []
    for tokens in caught:
        patches = tokens[:, model.num_prefix_tokens :] + tokens[:, :1]
        maps.append(patches.transpose(1, 2).reshape(len(images), -1, height // 4, width // 4))
    return maps


@pytest.mark.parametrize("size", [(32, 32), (34, 47), (64, 20), (63, 4)])
def test_taps_equal_hooks_on_the_whole_model(vit: Path, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size) * 2 - 1
    backbone = FrozenBackbone(f"local-dir:{vit}", TAPS)
    features = backbone(images.clone())
    want = hooked_features(vit, images.clone())
    assert len(features) == len(want) == backbone.num_features
    for got, expected in zip(features, want, strict=True):
        assert got.shape == (2, backbone.width, size[0] // 4, size[1] // 4)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "side", "num"),
    [
        # blocks (with biases of q, k and v, and without), patch embedding, prefix, position table
        ("vit_large_patch14_dinov2.lvd142m", 73, 24 * (BLOCK + 3 * D) + D * (589 + 1 + 37**2 + 1)),
        ("vit_large_patch16_dinov3.lvd1689m", 64, 24 * BLOCK + D * (769 + 5)),
    ],
)
def test_full_size_backbone_crops_1024_to_whole_patches(name: str, side: int, num: int) -> None:
    with torch.device("meta"):
        taps = (2, 5, 8, 10, 14, 19, 23)
        backbone = FrozenBackbone(name, taps, random_seed=0, dtype=torch.bfloat16)
        features = backbone(torch.zeros(1, 3, 1024, 1024))
    assert [f.shape for f in features] == [(1, 1024, side, side)] * 8
    assert {f.dtype for f in features} == {torch.bfloat16}
    assert sum(p.numel() for p in backbone.parameters()) == num


def test_features_are_those_that_timm_gives_of_its_own(vit: Path) -> None:
    """The middle of 67 x 50 pixels, at the ImageNet-like mean and deviation of the folder."""
    images = torch.rand(2, 3, 67, 50)
    whole = timm.create_model(f"local-dir:{vit}", pretrained=True, dynamic_img_size=True).eval()
    inner = (images[:, :, 1:65, 1:49] - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    pairs = whole.forward_intermediates(
        inner, indices=list(TAPS), return_prefix_tokens=True, intermediates_only=True
    )
    features = FrozenBackbone(f"local-dir:{vit}", TAPS)(images * 2 - 1)[1:]
    for got, (patches, prefix) in zip(features, pairs, strict=True):
        want = patches + prefix[:, :1].transpose(1, 2)[..., None]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convnext_tiny.dinov3_lvd1689m", "convnext_tiny.dinov3_lvd1689m is none of timm's vision"),
        ("resnet18", "resnet18 is none of timm's vision transformers: a DINOv2 or DINOv3"),
        ("vit_large_patch16_dinov33", "vit_large_patch16_dinov33 is none of"),
        ("eva02_tiny_patch14_224", "taps"),  # a ViT: the next thing that is wrong
        ("vit_base_patch16_siglip_224", "has no CLS token"),
        ("vit_small_patch16_rope_mixed_224", "each block's own"),
    ],
)
def test_a_backbone_of_another_kind_is_refused_for_what_it_is(name: str, said: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        FrozenBackbone(name, (99,), random_seed=0)


def test_backbone_drops_what_lies_behind_the_last_tap(vit: Path) -> None:
    backbone = FrozenBackbone(f"local-dir:{vit}", (0, 1))
    names = {name for name, _ in backbone.vit.named_parameters()}
    assert not names & {"blocks.3.norm1.weight", "norm.weight"}
    assert "blocks.2.norm1.weight" in names  # block 1, behind the identity


def test_only_the_images_get_gradients(vit: Path) -> None:
    backbone = FrozenBackbone(f"local-dir:{vit}", TAPS).train()
    assert not any(module.training for module in backbone.modules())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    sum(f.square().mean() for f in backbone(images)).backward()
    assert images.grad is not None and images.grad.abs().amin((1, 2, 3)).isfinite().all()
    assert images.grad.abs().amax((1, 2, 3)).gt(0).all()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    with torch.no_grad():
        assert not backbone(images)[0].requires_grad


def test_a_checkpoint_file_loads_in_either_format(vit: Path, tmp_path: Path) -> None:
    # the named architecture is too large for a test: its first block is enough to tell
    name = "vit_small_patch14_dinov2.lvd142m"
    whole = timm.create_model(name, pretrained=False, num_classes=0)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    for suffix in ("pth", "safetensors"):
        backbone = FrozenBackbone(name, [0], checkpoint=tmp_path / f"weights.{suffix}")
        loaded = backbone.vit.blocks[1].attn.qkv.weight
        assert torch.equal(loaded, whole.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="second source"):
        FrozenBackbone(f"local-dir:{vit}", [0], checkpoint=tmp_path / "weights.pth")


def test_random_weights_come_from_the_seed_alone(vit: Path) -> None:
    torch.manual_seed(1)
    first = FrozenBackbone(f"local-dir:{vit}", TAPS, random_seed=3).state_dict()
    draw = torch.rand(1)
    second = FrozenBackbone(f"local-dir:{vit}", TAPS, random_seed=3).state_dict()
    torch.manual_seed(1)
    assert torch.equal(draw, torch.rand(1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_bfloat16_backbone_is_close(vit: Path) -> None:
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    exact = FrozenBackbone(f"local-dir:{vit}", TAPS)(images)
    rounded = FrozenBackbone(f"local-dir:{vit}", TAPS, dtype=torch.bfloat16)(images)
    for got, want in zip(rounded, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("taps", [(2, 0), (0, 0), (0, 4), (-1, 2)])
def test_impossible_taps_are_refused(vit: Path, taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="taps must ascend"):
        FrozenBackbone(f"local-dir:{vit}", taps)


def test_images_smaller_than_a_patch_are_refused(vit: Path) -> None:
    with pytest.raises(ValueError, match="3x32"):
        FrozenBackbone(f"local-dir:{vit}", TAPS)(torch.zeros(1, 3, 3, 32))


CLIP_CONFIG = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


def test_prompts_equal_open_clips_own_encoding(clip_folder: Path) -> None:
    name = f"local-dir:{clip_folder}"
    clip = open_clip.create_model(name).eval()
    randomize(clip)
    save_file(clip.state_dict(), clip_folder / "open_clip_model.safetensors")
    prompts = ["a red seven on a black background", "", "word " * 40]
    with torch.no_grad():
        want = clip.encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)

    encoder = PromptEncoder(name, checkpoint=None).train()
    text = encoder(prompts)
    assert text.dtype == torch.float32 and text.shape == (3, encoder.dim) and encoder.dim == 20
    torch.testing.assert_close(text, want)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    assert not text.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    num_text = sum(p.numel() for key, p in clip.named_parameters() if "visual" not in key) - 1
    assert sum(p.numel() for p in encoder.parameters()) == num_text  # 1: the logit scale


def test_prompt_encoder_never_falls_back_to_random_weights(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG}))
    with pytest.raises(RuntimeError, match="could not be loaded"):
        PromptEncoder(f"local-dir:{tmp_path}", checkpoint=None)
    with pytest.raises(ValueError, match="source of weights"):
        PromptEncoder("ViT-L-14", checkpoint=None)
    with pytest.raises(ValueError, match="source of weights"):
        PromptEncoder(f"local-dir:{tmp_path}", checkpoint="openai")
    first = PromptEncoder(f"local-dir:{tmp_path}", checkpoint=None, random_seed=0)(["a"])
    assert torch.equal(first, PromptEncoder(f"local-dir:{tmp_path}", None, random_seed=0)(["a"]))


def test_prompt_encoder_takes_the_activation_from_the_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def create_model(name: str, **options: object) -> nn.Module:
        asked.append(bool(options["force_quick_gelu"]))
        raise RuntimeError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for name, checkpoint, quick_gelu in [
        ("ViT-L-14", "openai", None),
        ("ViT-L-14", "laion2b_s32b_b82k", None),
        ("ViT-L-14", "file.safetensors", True),
        ("ViT-L-14-quickgelu", "file.safetensors", None),  # the name's own config says it
    ]:
        with pytest.raises(RuntimeError, match="stop here"):
            PromptEncoder(name, checkpoint, quick_gelu)
    assert asked == [True, False, True, False]
    with pytest.raises(ValueError, match="say quick_gelu"):
        PromptEncoder("ViT-L-14", "file.safetensors")


def affine_norm(width: int, virtual_batch: int) -> LocalBatchNorm:
    norm = LocalBatchNorm(width, virtual_batch)
    randomize(norm)
    return norm


def test_local_batch_norm_of_one_is_instance_norm() -> None:
    norm, x = affine_norm(5, 1), torch.randn(3, 5, 4, 6) * 3 + 1
    want = F.instance_norm(x, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(x), want)
    torch.testing.assert_close(norm.eval()(x), want)
    assert not list(norm.buffers())


@pytest.mark.parametrize("batch", [1, 3, 4, 6, 8])
def test_local_batch_norm_normalises_each_virtual_batch(batch: int) -> None:
    norm, x = affine_norm(5, 4), torch.randn(batch, 5, 4, 6) * 3 + 1
    groups = [x[start : start + 4] for start in range(0, batch, 4)]
    want = [F.batch_norm(g, None, None, norm.weight, norm.bias, training=True) for g in groups]
    torch.testing.assert_close(norm(x), torch.cat(want))
    torch.testing.assert_close(norm.eval()(x), torch.cat(want))


def test_local_batch_norm_of_a_single_place_is_the_bias() -> None:
    norm = affine_norm(5, 1)
    x = torch.randn(2, 5, 1, 1, requires_grad=True)
    want = norm.bias.view(1, 5, 1, 1).expand(2, 5, 1, 1)
    # 1 / sqrt(eps) magnifies the rounding of x - mean
    torch.testing.assert_close(norm(x), want, rtol=0, atol=1e-3)
    norm(x).square().sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-3)


def test_local_batch_norm_mixes_dtypes() -> None:
    norm, x = affine_norm(5, 1), torch.randn(2, 5, 4, 6)
    want = norm(x)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    rounded = norm.bfloat16()(x)  # as FSDP gathers it with param_dtype bfloat16
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, want, rtol=0.02, atol=0.01)


def test_spectral_conv_learns_the_norm_in_float32() -> None:
    conv = SpectralConv(16, 16, 3)
    with torch.no_grad():
        conv.parametrizations.weight.original.mul_(7)
        for _ in range(1000):
            conv(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))
    conv.eval()
    assert conv.weight.dtype == torch.float32
    assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-4)


def spectral_conv(conv: SpectralConv, x: Tensor, power_step: bool) -> Tensor:
    """One spectral convolution by hand: power iteration, wrap-around, correlation."""
    list_ = conv.parametrizations.weight
    weight = list_.original.detach()
    matrix, u, v = weight.flatten(1), list_[1]._u, list_[1]._v
    if power_step:
        u = F.normalize(matrix @ v, dim=0)
        v = F.normalize(matrix.T @ u, dim=0)
    weight = weight / (u @ matrix @ v)
    margin = weight.shape[-1] // 2
    rows = torch.arange(-margin, x.shape[2] + margin) % x.shape[2]
    cols = torch.arange(-margin, x.shape[3] + margin) % x.shape[3]
    return F.conv2d(x[:, :, rows][..., cols], weight, conv.bias, conv.stride)


def common_map(parts: nn.Sequential, x: Tensor, power_step: bool) -> Tensor:
    """The trunk's steps in METHOD's order, every sample its own virtual batch."""

    def activated(block: nn.Sequential, x: Tensor) -> Tensor:
        x = F.instance_norm(spectral_conv(block[0], x, power_step))
        x = x * block[1].weight[:, None, None] + block[1].bias[:, None, None]
        return torch.where(x > 0, x, 0.2 * x)

    x = activated(parts[0], x)
    for strided, residual in ((parts[1], parts[2]), (parts[3], parts[4])):
        assert strided.stride == (2, 2)
        x = spectral_conv(strided, x, power_step)
        x = (x + activated(residual.block, x)) / 2**0.5
    return spectral_conv(parts[6], spectral_conv(parts[5], x, power_step), power_step)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("width", [None, 3])
def test_head_equals_the_formula(reference: bool, training: bool, width: int | None) -> None:
    head = Head(8, 6, reference, Layers(width=width))
    randomize(head)
    x, text, r = torch.randn(4, 8, 19, 12), torch.randn(2, 6), torch.randn(2, 8, 19, 12)
    with torch.no_grad():
        for _ in range(3):  # bring the singular vectors near those of the new weights
            head(x, text, r if reference else None)
        head.train(training)
        condition = (text @ head.text.weight.T + head.text.bias)[:, :, None, None]
        if reference:
            condition = condition + common_map(head.reference, r, training)
        class_map = common_map(head.class_map, x, training)
        want = (class_map * torch.cat([condition, condition])).sum(1) / 8
        logits = head(x, text, r if reference else None)
    assert logits.shape == (4, 3 * 2)
    torch.testing.assert_close(logits, want.flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 17), (4, 4)])
def test_heads_concatenate_at_any_size(size: tuple[int, int]) -> None:
    heads = Heads(3, 8, 6, reference=True).eval()
    maps = [torch.randn(2, 8, *size) for _ in range(3)]
    references = [torch.randn(2, 8, *size) for _ in range(3)]
    text = torch.randn(2, 6)
    logits = heads(maps, text, references)
    num_places = math.ceil(size[0] / 8) * math.ceil(size[1] / 8)
    assert logits.shape == (2, 3 * num_places) and logits.isfinite().all()
    one_by_one = [
        head(m, text, r) for head, m, r in zip(heads.heads, maps, references, strict=True)
    ]
    assert torch.equal(logits, torch.cat(one_by_one, 1))
    assert torch.equal(heads(maps[1:2], text, references[1:2], first=1), one_by_one[1])


def test_a_sample_is_judged_alone() -> None:
    heads = Heads(1, 8, 6, reference=True).eval()
    maps, references, text = torch.randn(3, 8, 9, 9), torch.randn(3, 8, 9, 9), torch.randn(3, 6)
    together = heads([maps], text, [references])
    for i in range(3):
        alone = heads([maps[i : i + 1]], text[i : i + 1], [references[i : i + 1]])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_misplaced_references_and_counts_are_refused() -> None:
    maps, text = [torch.randn(4, 8, 8, 8)], torch.randn(4, 6)
    with pytest.raises(ValueError, match="reference"):
        Heads(1, 8, 6, reference=True)(maps, text, None)
    with pytest.raises(ValueError, match="reference"):
        Heads(1, 8, 6, reference=False)(maps, text, maps)
    with pytest.raises(ValueError, match="do not divide"):
        Heads(1, 8, 6, reference=False)(maps, text[:3], None)
    with pytest.raises(ValueError):
        Heads(2, 8, 6, reference=False)([*maps, *maps], text, None, first=1)


def test_only_train_mode_moves_the_buffers() -> None:
    heads = Heads(2, 8, 6, reference=True)
    maps, text = [torch.randn(2, 8, 8, 8) for _ in range(2)], torch.randn(2, 6)

    def moved(train: bool) -> list[bool]:
        before = {name: b.clone() for name, b in heads.named_buffers()}
        heads.train(train)(maps, text, maps).mean().backward()
        return [not torch.equal(before[name], b) for name, b in heads.named_buffers()]

    assert len(moved(train=False)) == 2 * 2 * 7 * 2 and not any(moved(train=False))
    assert all(moved(train=True))


def test_every_parameter_and_the_features_get_gradients() -> None:
    heads = Heads(2, 8, 6, reference=True)
    randomize(heads)
    maps = [torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(2)]
    heads(maps, torch.randn(2, 6), [m.detach() for m in maps]).square().mean().backward()
    # a bias in front of a norm is cancelled by it: its gradient is rounding
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad.abs().max() > 0 for p in heads.parameters() if p.ndim > 1)
    assert all(m.grad.abs().amax((1, 2, 3)).gt(0).all() for m in maps)


def test_heads_come_from_their_seed_alone() -> None:
    torch.manual_seed(1)
    first = Heads(2, 8, 6, seed=5).state_dict()
    draw = torch.rand(1)
    second = Heads(2, 8, 6, seed=5).state_dict()
    torch.manual_seed(1)
    assert torch.equal(draw, torch.rand(1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = Heads(2, 8, 6, seed=6).state_dict()
    weights = "text.parametrizations.weight.original"
    assert not torch.equal(first[f"heads.0.{weights}"], other[f"heads.0.{weights}"])
    assert not torch.equal(first[f"heads.0.{weights}"], first[f"heads.1.{weights}"])


def test_bfloat16_features_give_close_float32_logits() -> None:
    heads = Heads(1, 32, 6, reference=True).eval()
    maps, references, text = (
        torch.randn(2, 32, 16, 16),
        torch.randn(2, 32, 16, 16),
        torch.randn(2, 6),
    )
    exact = heads([maps], text, [references])
    rounded = heads([maps.bfloat16()], text, [references.bfloat16()])
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("reference", "narrow", "total"),
    [
        (True, None, 773_391_872),
        (False, None, 386_892_800),
        (True, 512, 198_149_632),
        (True, 256, 52_086_272),
    ],
)
def test_full_size_parameter_count(reference: bool, narrow: int | None, total: int) -> None:
    with torch.device("meta"):
        heads = Heads(8, 1024, 768, reference, Layers(width=narrow))
    width, common = narrow or 1024, 64
    # 1x1 from the features, three strided, two residual
    convolutions = 1024 * width + 5 * 9 * width**2 + 6 * width
    trunk = convolutions + 3 * 2 * width  # three affine norms
    to_common = width * common + common
    head = (1 + reference) * (trunk + to_common) + 768 * common + common
    assert sum(p.numel() for p in heads.parameters()) == 8 * head == total


def test_virtual_batches_never_mix_real_and_fake_and_iterate_once() -> None:
    """[fake; real] of three prompts, virtual batches of 8: two groups of three, not one of six."""
    both = [torch.randn(6, 16, 16, 16), torch.randn(6, 16, 16, 16)]
    text = torch.randn(3, 5)

    def heads() -> Heads:
        return Heads(2, 16, 5, reference=False, layers=Layers(virtual_batch=8), seed=1)

    together, apart = heads().eval(), heads().eval()
    halves = [apart([maps[part] for maps in both], text, None) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(together(both, text, None), torch.cat(halves))
    together, apart = heads().train(), heads().train()
    together(both, text, None)
    apart([maps[:3] for maps in both], text, None)
    for mine, theirs in zip(together.buffers(), apart.buffers(), strict=True):
        assert torch.equal(mine, theirs)
