#!/bin/sh
# Pipelines of flows do not hand their generator= to the scheduler. With one that noises again at every
# step, as few-step students are drawn (stochastic_sampling, FlowMatchLCMScheduler), it fixes the first
# noise alone: the image follows the global seed.
#
# Seen with diffusers 0.42.1 on a small FLUX: 4 steps with one generator and two global seeds differ;
# one step, and Euler, do not.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
"$python" - <<'PYTHON'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, FluxPipeline

from tiny_flux import apart, make_network

found = {}
for name, scheduler in {
    "euler": FlowMatchEulerDiscreteScheduler(),
    "stochastic_sampling": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "FlowMatchLCMScheduler": FlowMatchLCMScheduler(),
}.items():
    pipe = FluxPipeline(scheduler, None, None, None, None, None, make_network())
    pipe.set_progress_bar_config(disable=True)

    def draw(global_seed, steps):
        torch.manual_seed(global_seed)
        return pipe(
            prompt_embeds=torch.ones(1, 5, 16), pooled_prompt_embeds=torch.ones(1, 8),
            height=64, width=64, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    found[name] = [apart(draw(1, steps), draw(2, steps)) for steps in (4, 1)]
    print("%s: two global seeds are %.2g apart in 4 steps, %.2g in 1" % (name, *found[name]))
assert found["euler"] == [0, 0]
assert found["stochastic_sampling"][0] > 0.1 < found["FlowMatchLCMScheduler"][0]
PYTHON
