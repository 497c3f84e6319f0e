"""What the tests of all teacher families share: settings, whole networks, changed folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from senseflow.common.ranks import start_ranks
from senseflow.engine.parallel import shard
from senseflow.teachers.folder import TeacherSettings
from senseflow.weights.filling import fill_shards
from senseflow.weights.meta import NetworkSource

CPU = torch.device("cpu")
PROMPTS = ["a red seven", "two blue ones"]


def settings_of(folder: Path, resolution=(32, 32), length: int | None = 12, **rest: Any):
    """A run's settings: float32, the scheduler's own shift, the teacher's own student."""
    defaults: dict[str, Any] = dict(
        max_sequence_length=length,
        shift=None,
        compute_dtype=torch.float32,
        vae_dtype=torch.float32,
    )
    return TeacherSettings(Path(folder), resolution, **(defaults | rest))


def built(source: NetworkSource) -> nn.Module:
    """A network with its weights, without sharding."""
    fill_shards(source.network, source.read, CPU)
    return source.network.eval()


def check_batch_independence(
    adapter: Any, network: nn.Module, prompts: list[str], **tolerance: float
) -> None:
    """A prompt's prediction, alone and in a batch of other lengths and times, is the same."""
    cond, num = adapter.encode_prompts(prompts), len(prompts)
    x_t, t = torch.randn(num, *adapter.latent_shape()), torch.linspace(900, 100, num)
    with torch.no_grad():
        together = adapter.predict(network, x_t, t, cond)
        for i in range(num):
            one = slice(i, i + 1)
            alone = adapter.predict(network, x_t[one], t[one], cond.map(lambda x, o=one: x[o]))
            torch.testing.assert_close(alone, together[one], **tolerance)


def sharded(dtype: str):
    """Builds a network in shards, as a run of several ranks builds its own."""

    def build(source: NetworkSource) -> nn.Module:
        shard(source.network, source.blocks, start_ranks().mesh, getattr(torch, dtype))
        fill_shards(source.network, source.read, CPU)
        return source.network

    return build


def changed_copy(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a pipeline folder with some keys of one JSON file changed."""
    shutil.copytree(folder, target)
    tree = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**tree, **changes}))
    return target


class Inputs:
    """The inputs of a network's latest forward, by name."""

    def __init__(self, network: nn.Module, names: tuple[str, ...] = ()) -> None:
        self.names, self.latest = names, {}
        network.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.latest = dict(zip(self.names, args, strict=False)) | kwargs


def assert_same_weights(network: nn.Module, other: nn.Module) -> None:
    """Bit for bit the same parameters and buffers."""
    mine, theirs = network.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


def spy_on_steps(pipeline: Any) -> list[torch.Tensor]:
    """A list that every prediction the pipeline gives its scheduler is added to."""
    given, step = [], pipeline.scheduler.step

    def spy(prediction, *args, **kwargs):
        given.append(prediction.clone())
        return step(prediction, *args, **kwargs)

    pipeline.scheduler.step = spy
    return given
