#!/bin/sh
# Flux2KleinPipeline's shift depends on the number of steps, and where sigmas= says them it is taken
# for the default of num_inference_steps, 50, in place of their number: sigmas=[1, .75, .5, .25] is
# another schedule than num_inference_steps=4, which spaces just those. FluxPipeline's does not depend.
#
# Seen with diffusers 0.42.1 at 256 px: the last sigma .704 and .628; with both arguments .704.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
"$python" - <<'PYTHON'
import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)

from tiny_flux import make_network



def scheduler():
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


network = Flux2Transformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=32,
    axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
)
vae = AutoencoderKLFlux2(
    block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)
text = {"prompt_embeds": torch.ones(1, 5, 16)}
pipes = {
    "FluxPipeline": (
        FluxPipeline(scheduler(), None, None, None, None, None, make_network()),
        {**text, "pooled_prompt_embeds": torch.ones(1, 8)},
    ),
    "Flux2KleinPipeline": (
        Flux2KleinPipeline(scheduler(), vae, None, None, network),
        {**text, "guidance_scale": 1.0},
    ),
}
number, sigmas = {"num_inference_steps": 4}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}
found = {}
for name, (pipe, prompt) in pipes.items():
    pipe.set_progress_bar_config(disable=True)
    found[name] = []
    for steps in (number, sigmas, {**number, **sigmas}):
        pipe(**prompt, **steps, height=256, width=256, output_type="latent")
        found[name].append([round(sigma, 3) for sigma in pipe.scheduler.sigmas[:-1].tolist()])
        print(name, steps, found[name][-1])
by_number, by_sigmas, by_both = found["Flux2KleinPipeline"]
assert by_number == by_both != by_sigmas
assert found["FluxPipeline"][0] == found["FluxPipeline"][1] == found["FluxPipeline"][2]
PYTHON
