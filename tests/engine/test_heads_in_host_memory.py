"""parallel.offload: heads: the discriminator's heads in host memory, the other networks not.

Without a GPU the two places are one: what is tested is that the policy's path is walked.
`tests/test_fake_cuda.py` has the places.
"""

import pytest
import torch
from short_runs import begin, configure, finish, write_pictures
from torch import nn
from torch.distributed.fsdp import FSDPModule
from training_runs import interrupted

from senseflow.engine import build
from senseflow.engine.loop import Run
from senseflow.weights.lora import Role

LORA = ("lora.rank=4", "student.guidance=3.5")
FEW_BITS = ("precision.head_masters=bfloat16", "optimizer.head_states=8bit")


def state(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of the networks that learn, and of their optimizers."""
    found = {}
    for name, part in run.trained.items():
        found |= {f"{name}.{k}": v for k, v in part.network.state_dict().items()}
        for number, values in part.optimizer.state_dict()["state"].items():
            found |= {f"{name} {number}.{k}": v for k, v in values.items()}
    return {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in found.items()}


def differ(one: Run, other: Run) -> list[str]:
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys()
    return [key for key in mine if not torch.equal(mine[key], theirs[key])]


def is_away(network: nn.Module) -> bool:
    """Whether all of a network's units are in host memory; none are, or all."""
    whole = network.base.network if isinstance(network, Role) else network
    units = [m for m in whole.modules() if isinstance(m, FSDPModule)]
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    (found,) = {p.offload_to_cpu for group in groups if group for p in group.fsdp_params}
    return found


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("flux_senseflow", ("train.grad_accumulation=2",)),
        ("flux_senseflow", (*LORA, *FEW_BITS)),
        pytest.param("sdxl_dmd2", (), marks=pytest.mark.long),
    ],
    ids=["full", "LoRA, few bits", "DMD2"],
)
def test_heads_learn_alike_and_resume(recipe, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "check_offload", lambda *_: None)
    data, runs = write_pictures(tmp_path), {}
    settings = ("train.iter_num=4", "fake_score.ttur=1", *overrides)
    for place in ("none", "heads"):
        config = configure(data, *settings, f"parallel.offload={place}", recipe=recipe)
        runs[place] = finish(begin(config, tmp_path / place))
    away = {name: is_away(part.network) for name, part in runs["heads"].trained.items()}
    assert away == {"generator": False, "fake_score": False, "discriminator": True}
    assert differ(runs["none"], runs["heads"]) == []
    copy = interrupted(runs["heads"].folder, 2, tmp_path / "copy")
    assert differ(finish(begin(config, copy)), runs["heads"]) == []
