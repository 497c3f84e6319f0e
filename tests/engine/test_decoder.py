"""The VAE's decoder and DINOv2 recomputed on the way back: the same bits, and less that is kept."""

from collections.abc import Callable

import pytest
import timm
import torch
from teacher_parts import CPU, built, settings_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from senseflow.distill.vfm_features import FrozenBackbone
from senseflow.engine.parallel import recompute, recompute_decoder
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.flux2.family import FLUX2
from senseflow.teachers.qwen_image.family import QWEN_IMAGE
from senseflow.teachers.sd35.family import SD35
from senseflow.teachers.sdxl.family import SDXL
from senseflow.teachers.z_image.family import Z_IMAGE

FAMILIES = {
    "flux": FLUX, "sd35": SD35, "sdxl": SDXL,
    "flux2": FLUX2, "qwen_image": QWEN_IMAGE, "z_image": Z_IMAGE,
}  # fmt: skip


def kept_by(work: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, int]:
    """What a call gives, the gradient at x of its squares, and the bytes of the storages that the
    way back is kept, each once; weights, which are there anyway, too."""
    leaf, storages = x.clone().requires_grad_(), {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = work(leaf)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
    return output.detach(), gradient, sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("wholly", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_recomputed_gives_the_same_bits_and_keeps_less(name, wholly, request):
    folder = request.getfixturevalue(f"{name}_folder")
    length = None if name == "sdxl" else 12
    adapter = FAMILIES[name].load_adapter(settings_of(folder, length=length), CPU, built)
    latents = torch.randn(2, *adapter.latent_shape(), generator=torch.Generator().manual_seed(0))
    whole = kept_by(adapter.decode, latents)
    names = list(adapter.pipeline.vae.state_dict())
    blocks, stages = adapter.decoder_blocks, adapter.decoder_stages
    decoder, norms = adapter.pipeline.vae.decoder, adapter.decoder_norms
    assert any(isinstance(part, stages) for part in decoder.modules())
    recompute_decoder(decoder, blocks + stages if wholly else blocks, norms)
    again = kept_by(adapter.decode, latents)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    assert whole[1].abs().sum() > 0 and again[2] < whole[2]
    assert list(adapter.pipeline.vae.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(adapter.decode(latents), whole[0])


def test_a_decoder_of_other_parts_is_named():
    with pytest.raises(AssertionError, match="Linear has none of"):
        recompute_decoder(nn.Linear(1, 1), (nn.Conv2d,), {})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_dino_recomputed_gives_the_same_bits_and_keeps_less(name):
    assert timm.is_model(name)
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    backbone = FrozenBackbone(name, (2, 5, 11), random_seed=0)

    def features(x: Tensor) -> Tensor:
        return torch.cat([maps.flatten(1) for maps in backbone(x)], 1)

    whole = kept_by(features, images)
    recompute([*backbone.vit.blocks], every=1)
    again = kept_by(features, images)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    assert whole[1].abs().sum() > 0 and again[2] < whole[2] / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vae_computes_in_channels_last_and_says_what_diffusers_does(name, request):
    """Weights of 2-D and 3-D convolutions; what leaves it is laid out as a cache keeps it."""
    folder = request.getfixturevalue(f"{name}_folder")
    length = None if name == "sdxl" else 12
    adapter = FAMILIES[name].load_adapter(settings_of(folder, length=length), CPU, built)
    vae = adapter.pipeline.vae
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [w for w in vae.parameters() if w.dim() in layouts]
    assert weights and all(w.is_contiguous(memory_format=layouts[w.dim()]) for w in weights)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = adapter.encode_images(images)
    stock = type(vae).from_pretrained(folder / "vae")
    theirs = stock.encode(images[:, :, None] if name == "qwen_image" else images).latent_dist
    expected = theirs.mean[:, :, 0] if name == "qwen_image" else theirs.mean
    torch.testing.assert_close(found.mean, expected.detach())
    assert found.mean.is_contiguous() and found.std.is_contiguous()
