#!/bin/sh
# The modular pipeline of Stable Diffusion 3 is not guided where no negative prompt is given: both
# halves of its batch are then of the prompt itself, so that any guidance gives what none gives, at
# twice the cost. StableDiffusion3Pipeline takes the empty prompt there.
#
# Seen with diffusers 0.42.1: at guidance 7, 8 forwards and the result of guidance 1, to rounding; with
# a negative prompt another one.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import diffusers
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

print("diffusers", diffusers.__version__)
assert diffusers.__version__ == "0.42.1", "another version than the pinned one"

torch.manual_seed(0)
network = SD3Transformer2DModel(
    sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
    pooled_projection_dim=8, pos_embed_max_size=8,
)
calls = []
network.register_forward_hook(lambda *_: calls.append(1))
pipe, scheduler = StableDiffusion3DenoiseStep().init_pipeline(), FlowMatchEulerDiscreteScheduler(shift=3.0)
pipe.set_progress_bar_config(disable=True)
latents = torch.randn(1, 4, 8, 8)


def text():
    return torch.randn(1, 5, 16), torch.randn(1, 8)


(prompt, pooled), (empty, empty_pooled) = text(), text()


def draw(scale, **negative):
    scheduler.set_timesteps(4)
    guider = ClassifierFreeGuidance(guidance_scale=scale)
    pipe.update_components(transformer=network, scheduler=scheduler, guider=guider)
    calls.clear()
    drawn = pipe(
        latents=latents, prompt_embeds=prompt, pooled_prompt_embeds=pooled,
        timesteps=scheduler.timesteps, num_inference_steps=4, output="latents", **negative,
    )
    return drawn, len(calls)


plain, calls_plain = draw(1.0)
seven, calls_seven = draw(7.0)
guided, _ = draw(7.0, negative_prompt_embeds=empty, negative_pooled_prompt_embeds=empty_pooled)
to_plain, to_guided = ((seven - other).abs().max().item() for other in (plain, guided))
print("forwards: %d at guidance 1, %d at 7" % (calls_plain, calls_seven))
print("guidance 7 without a negative prompt is %.2g from guidance 1, %.2g from 7 with one" % (to_plain, to_guided))
assert (calls_plain, calls_seven) == (4, 8) and to_plain < 1e-4 < 1e-2 < to_guided
PYTHON
