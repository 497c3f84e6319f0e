"""The embedded FLUX teacher: flow matching, then distillation of guidance into its embedding.

FLUX.1-dev was made the same way: an ordinary conditional flow first, then a network that is told a
guidance scale w and predicts what classifier-free guidance would have, uncond + w (cond - uncond).
The text encoders learn with the flow and are frozen afterwards.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tqdm import tqdm

from senseflow.tiny.captions import ATTRIBUTES, BACKGROUNDS, captions_of, split_scenes
from senseflow.tiny.fitting import fit
from senseflow.tiny.pictures import draw_scenes, render
from senseflow.tiny.text import WIDTH, FluxText
from senseflow.tiny.vae import encode_images

BATCH_SIZE = 128
GUIDANCE_RANGE = (1.0, 8.0)
PROMPT_DROP = 0.1
TIME_SHIFT = 1.8
# exp(1.15): FLUX's own dynamic shift at 1024 pixels, whatever the (here tiny) number of tokens.
SAMPLING_SHIFT = 3.1582


def new_transformer() -> FluxTransformer2DModel:
    """An untrained FLUX transformer of 0.6 M parameters, with a guidance embedding."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


class Flow:
    """Everything that `predict` needs besides a transformer: position ids of one latent size."""

    def __init__(self, text_length: int, rows: int = 4, columns: int = 4) -> None:
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", None)
        self.text_ids = torch.zeros(text_length, 3)

    def predict(
        self,
        transformer: FluxTransformer2DModel,
        x_t: torch.Tensor,
        sigma: torch.Tensor,
        pooled: torch.Tensor,
        prompt_embeds: torch.Tensor,
        guidance: torch.Tensor,
    ) -> torch.Tensor:
        """The velocity eps - x_0 at packed latents `x_t` (B, 16, 32), sigma (B,), guidance (B,)."""
        return transformer(
            hidden_states=x_t,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=prompt_embeds,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) as FLUX's tokens (B, H W / 4, 4 C)."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL, num: int, dark_weight: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed latents (num, 16, 32) of fresh training pictures, and their scenes (num, 6).

    Digits on black have little contrast, so little weight in a squared error: they are drawn
    `dark_weight` times as often as the others.
    """
    pool = split_scenes()[0]
    is_dark = pool[:, ATTRIBUTES.index("background")] == BACKGROUNDS.index("black")
    pool = torch.cat([pool, *[pool[is_dark]] * (dark_weight - 1)])
    scenes = draw_scenes(pool, num, generator)
    chunks = tqdm(scenes.split(250), desc="latents", mininterval=10, dynamic_ncols=True)
    return torch.cat([pack(encode_images(vae, render(c, generator))) for c in chunks]), scenes


class Batches:
    """Random training batches of cached latents, with their token ids, noise and time."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text: FluxText,
        num_pictures: int,
        dark_weight: int,
        generator: torch.Generator,
    ) -> None:
        self.generator = generator
        self.latents, scenes = cache_latents(vae, num_pictures, dark_weight, generator)
        self.tokens = text.tokenize(captions_of(scenes))
        self.empty_tokens = text.tokenize([""])

    def draw(self, num: int, drop: float) -> tuple[torch.Tensor, ...]:
        """x_0 and eps (num, 16, 32), sigma (num,), CLIP and T5 ids with a share `drop` empty."""
        index = torch.randint(len(self.latents), (num,), generator=self.generator)
        eps = torch.randn(self.latents[index].shape, generator=self.generator)
        # One stratum per sample: uniform times, shifted towards noise.
        uniform = (torch.arange(num) + torch.rand(num, generator=self.generator)) / num
        sigma = TIME_SHIFT * uniform / (1 + (TIME_SHIFT - 1) * uniform)
        dropped = torch.rand(num, 1, generator=self.generator) < drop
        ids = [
            torch.where(dropped, empty, tokens[index])
            for empty, tokens in zip(self.empty_tokens, self.tokens, strict=True)
        ]
        return self.latents[index], eps, sigma, *ids


@dataclass(frozen=True)
class Lesson:
    """How long a network is trained, how fast, on how many cached pictures."""

    iterations: int
    learning_rate: float
    num_pictures: int
    dark_weight: int
    seed: int


def train_flow(
    vae: AutoencoderKL, transformer: FluxTransformer2DModel, text: FluxText, lesson: Lesson
) -> tuple[FluxTransformer2DModel, FluxText, dict]:
    """Flow matching of transformer and text encoders together; guidance is 1 throughout."""
    generator = torch.Generator().manual_seed(lesson.seed)
    batches = Batches(vae, text, lesson.num_pictures, lesson.dark_weight, generator)
    flow = Flow(text_length=batches.empty_tokens[1].shape[1])
    ones = torch.ones(BATCH_SIZE)

    def loss_of(_: int) -> torch.Tensor:
        x_0, eps, sigma, *ids = batches.draw(BATCH_SIZE, PROMPT_DROP)
        x_t = torch.lerp(x_0, eps, sigma[:, None, None])
        velocity = flow.predict(transformer, x_t, sigma, *text(*ids), ones)
        return F.mse_loss(velocity, eps - x_0)

    networks = [transformer, text]
    (transformer, text), loss = fit(
        loss_of, networks, lesson.iterations, lesson.learning_rate, "flow", average_decay=0.9985
    )
    return transformer, text, {"loss": loss}


def distil_guidance(
    vae: AutoencoderKL,
    transformer: FluxTransformer2DModel,
    text: FluxText,
    lesson: Lesson,
) -> tuple[FluxTransformer2DModel, dict]:
    """A copy of `transformer` taught to predict its classifier-free guided velocity at any w."""
    generator = torch.Generator().manual_seed(lesson.seed)
    batches = Batches(vae, text, lesson.num_pictures, lesson.dark_weight, generator)
    flow = Flow(text_length=batches.empty_tokens[1].shape[1])
    student, ones = deepcopy(transformer), torch.ones(BATCH_SIZE)
    with torch.no_grad():
        empty = [e.expand(BATCH_SIZE, *e.shape[1:]) for e in text(*batches.empty_tokens)]

    def loss_of(_: int) -> torch.Tensor:
        x_0, eps, sigma, *ids = batches.draw(BATCH_SIZE, drop=0.0)
        x_t = torch.lerp(x_0, eps, sigma[:, None, None])
        scale = torch.empty(BATCH_SIZE).uniform_(*GUIDANCE_RANGE, generator=generator)
        with torch.no_grad():
            embeds = text(*ids)
            cond = flow.predict(transformer, x_t, sigma, *embeds, ones)
            uncond = flow.predict(transformer, x_t, sigma, *empty, ones)
        guided = uncond + scale[:, None, None] * (cond - uncond)
        return F.mse_loss(flow.predict(student, x_t, sigma, *embeds, scale), guided)

    (student,), loss = fit(
        loss_of, [student], lesson.iterations, lesson.learning_rate, "guidance", average_decay=0.995
    )
    return student, {"loss": loss}


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's scheduler with the shift of 1024 pixels: four steps are 1, .9045, .7595, .5128."""
    return FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT, use_dynamic_shifting=False)


def save_pipeline(
    vae: AutoencoderKL, transformer: FluxTransformer2DModel, text: FluxText, folder: Path
) -> None:
    """Write a folder that `FluxPipeline.from_pretrained` loads."""
    pipeline = FluxPipeline(
        scheduler=new_scheduler(),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
