"""The embedded autoencoders, from 32x32 pixels to 8x8x8 latents: how any of them is trained, and
the one of FLUX, an AutoencoderKL."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from senseflow.tiny.captions import split_scenes
from senseflow.tiny.fitting import fit
from senseflow.tiny.pictures import SIZE, draw_scenes, render

BATCH_SIZE = 32
LEARNING_RATE = 3e-3
KL_WEIGHT = 2e-4


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder with downsampling 4 and, as FLUX's, no quantisation convolutions."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=True,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def note_scale(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """One factor and one shift for all channels."""
    std, mean = latents.std().item(), latents.mean().item()
    vae.register_to_config(scaling_factor=round(1 / std, 4), shift_factor=round(mean, 4))


@dataclass(frozen=True)
class Kind:
    """A class of autoencoders, and how it is asked for images (B, 3, 32, 32)."""

    new: Callable[[], Any]
    posterior: Callable[[Any, torch.Tensor], DiagonalGaussianDistribution]
    decode: Callable[[Any, torch.Tensor], torch.Tensor]  # of latents (B, C, 8, 8); differentiable
    note: Callable[[Any, torch.Tensor], None]  # in its config, how latents are normalised


KL = Kind(
    new_vae,
    lambda vae, images: vae.encode(images).latent_dist,
    lambda vae, latents: vae.decode(latents).sample,
    note_scale,
)


def train_vae(iterations: int, seed: int, kind: Kind = KL) -> tuple[Any, dict[str, float]]:
    """A trained autoencoder whose config says how its latents are normalised, and its measures.

    The PSNR is measured on held-out scenes made of held-out scans.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vae = kind.new()
    scenes, held_out = split_scenes()

    def loss_of(_: int) -> torch.Tensor:
        images = render(draw_scenes(scenes, BATCH_SIZE, generator), generator)
        posterior = kind.posterior(vae, images)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = kind.decode(vae, posterior.mean + posterior.std * noise)
        kl: torch.Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + KL_WEIGHT * kl

    (vae,), loss = fit(loss_of, [vae], iterations, LEARNING_RATE, "vae", average_decay=0.995)
    seen = render(draw_scenes(scenes, 1000, generator), generator)
    unseen = render(draw_scenes(held_out, 500, generator), generator, held_out_scans=True)
    with torch.no_grad():
        kind.note(vae, kind.posterior(vae, seen).mode())
        decoded = kind.decode(vae, kind.posterior(vae, unseen).mode())
    error = (decoded.clamp(-1, 1) - unseen).square().mean()
    return vae, {"loss": loss, "psnr_db": (10 * torch.log10(4 / error)).item()}


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, 8, 8), scaled and shifted as the diffusion model sees them."""
    latents = vae.encode(images).latent_dist.mode()
    scaled: torch.Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled
