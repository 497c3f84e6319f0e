"""The embedded FLUX teacher: flow matching, then distillation of guidance into its embedding.

FLUX.1-dev was made the same way: an ordinary conditional flow first, then a network that is told a
guidance scale w and predicts what classifier-free guidance would have, uncond + w (cond - uncond).
The text encoders learn with the flow and are frozen afterwards.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor

from senseflow.teachers.flux.adapter import pack
from senseflow.tiny.fitting import fit
from senseflow.tiny.lesson import Examples, Learner, Lesson, flow_at, without_dropped
from senseflow.tiny.text import T5_LENGTH, WIDTH, FluxText

GUIDANCE_RANGE = (1.0, 8.0)
# exp(1.15): FLUX's own dynamic shift at 1024 pixels, whatever the (here tiny) number of tokens.
SAMPLING_SHIFT = 3.1582


class FluxLearner(Learner):
    """An untrained FLUX transformer, with a guidance embedding, and its two text encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.text = FluxText()
        self.network = FluxTransformer2DModel(
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
        self.empty = self.text.tokenize([""])

    def loss(
        self, x_0: Tensor, eps: Tensor, u: Tensor, ids: list[Tensor], dropped: Tensor
    ) -> Tensor:
        """The flow loss, mean (v_hat - v)^2, with a guidance of 1 fed to every sample."""
        sigma, x_t = flow_at(x_0, eps, u)
        prompt_embeds, pooled = self.text(without_dropped(ids, self.empty, dropped))
        ones = torch.ones_like(sigma)
        velocity = predict(self.network, x_t, sigma, prompt_embeds, pooled, ones)
        return F.mse_loss(velocity, pack(eps - x_0))

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        """With the shift of 1024 pixels: four steps are 1, .9045, .7595, .5128."""
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=SAMPLING_SHIFT, use_dynamic_shifting=False
        )
        return FluxPipeline(
            scheduler=scheduler, vae=vae, transformer=self.network, **self.text.components()
        )


def predict(
    network: FluxTransformer2DModel,
    x_t: Tensor,
    sigma: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    guidance: Tensor,
) -> Tensor:
    """The velocity eps - x_0, packed (B, 16, 32), at x_t (B, 8, 8, 8), sigma and guidance (B,)."""
    rows, columns = (size // 2 for size in x_t.shape[2:])
    velocity: Tensor = network(
        hidden_states=pack(x_t),
        timestep=sigma,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=prompt_embeds,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", None),
        txt_ids=torch.zeros(T5_LENGTH, 3),
        return_dict=False,
    )[0]
    return velocity


def distil_guidance(
    vae: AutoencoderKL, learner: FluxLearner, lesson: Lesson
) -> tuple[FluxLearner, dict[str, float]]:
    """A copy of `learner` whose network predicts its classifier-free guided velocity at any w."""
    examples, learner = Examples(vae, learner, lesson), learner.eval()
    student, ones = deepcopy(learner.network), torch.ones(lesson.batch_size)
    with torch.no_grad():
        states, vector = learner.text(learner.empty)
    no_states, no_vector = (e.expand(lesson.batch_size, *e.shape[1:]) for e in (states, vector))

    def loss_of(_: int) -> Tensor:
        x_0, eps, u, ids, _dropped = examples.draw(drop=0.0)
        sigma, x_t = flow_at(x_0, eps, u)
        scale = torch.empty_like(sigma).uniform_(*GUIDANCE_RANGE, generator=examples.generator)
        with torch.no_grad():
            states, vector = learner.text(ids)
            cond = predict(learner.network, x_t, sigma, states, vector, ones)
            uncond = predict(learner.network, x_t, sigma, no_states, no_vector, ones)
        guided = uncond + scale[:, None, None] * (cond - uncond)
        return F.mse_loss(predict(student, x_t, sigma, states, vector, scale), guided)

    (student,), loss = fit(
        loss_of, [student], lesson.iterations, lesson.learning_rate, "guidance", average_decay=0.995
    )
    guided_learner = deepcopy(learner)
    guided_learner.network = student
    return guided_learner, {"loss": loss}
