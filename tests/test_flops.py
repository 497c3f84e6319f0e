"""Counted FLOPs of every kind of iteration against the least work of the method."""

from dataclasses import replace

import pytest
import torch
from embedded import YAMLS

from benchmarks.flops import as_markdown, count_pieces, table
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run
from senseflow.tiny.pictures import write_dataset

WHOLE = [pytest.param((name,), id=name, marks=pytest.mark.long) for name in YAMLS]
# Few kinds of iteration: two anchors, of which one is simulated in a step.
TWO = "anchors.times=[1000, 500]"
FEW = [pytest.param(("flux_senseflow", TWO), id="flux_senseflow with two anchors")]
# Two of three steps train, and the last one by the reward's own gradient.
REWARD = (
    "reward.weight=1",
    "reward.last_weight=1",
    "reward.models=[own_rewards:seen]",
    "reward.group_size=2",
    "reward.transitions=2",
    "backward_simulation.probability=1",
)
REWARDED = [
    pytest.param(("flux_senseflow", *REWARD), id="flux_senseflow with rewards"),
    pytest.param(
        ("flux_senseflow", *REWARD, "adversarial.kind=none", "isg.weight=0",
         "reward.anchors=[750, 250]"),
        id="rewards without an adversary", marks=pytest.mark.long,
    ),
]  # fmt: skip
PLAIN = pytest.param(("flux_senseflow", TWO, "adversarial.kind=none"), id="without an adversary")


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flops")
    write_dataset(folder, num=8, seed=0, num_prompts=2)
    name, *overrides = request.param
    overrides += [
        f"paths.dataset={folder / 'data.json'}",
        "train.batch_size=2",
        "adversarial.taps=[5]",
    ]
    config = load_config(YAMLS[name], overrides)
    return prepare(read_run(config, RECIPES[name].family), folder / "run")


@pytest.mark.parametrize("run", [*FEW, *REWARDED, *WHOLE], indirect=True)
def test_every_kind_of_iteration_does_the_least_work(run):
    rows = table(run)
    both = 0 < run.config.backward_simulation.probability < 1
    num = len(run.parts.anchors)
    assert len(rows) == 2 * num * (1 + both)  # turn x anchor (x simulated or not)
    # Below 1: nothing goes back to what a first layer is given, nor through the text of
    # Qwen-Image's last block, which no pixel sees (.9799).
    lowest = 0.97 if run.config.recipe == "qwen_image_senseflow" else 0.98
    for kind, counted, least in rows:
        assert lowest <= counted / least <= 1.02, f"{kind}: {counted / least:.3f}"
    assert f"| generator turn, anchor {num - 1}, simulated |" in as_markdown(rows)


class OneWastedForward:
    """The adapter, but the first prediction after the prompts are encoded is made twice."""

    def __init__(self, adapter):
        self.adapter, self.armed = adapter, False

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def encode_prompts(self, prompts):
        self.armed = True
        return self.adapter.encode_prompts(prompts)

    def predict(self, network, x_t, t, cond):
        if self.armed:
            self.armed = False
            with torch.no_grad():
                self.adapter.predict(network, x_t, t, cond)
        return self.adapter.predict(network, x_t, t, cond)


# The embedded Qwen-Image's decoder of videos does as much as fifty forwards of its transformer.
SEEN = [case for case in WHOLE if case.id != "qwen_image_senseflow"]


@pytest.mark.parametrize("run", [PLAIN, *SEEN], indirect=True)
def test_one_wasted_forward_is_seen_in_every_kind(run):
    honest = run.parts
    pieces = count_pieces(honest, next(run.data(1))[0])
    run.parts = replace(honest, adapter=OneWastedForward(honest.adapter))
    rows = table(run, pieces)
    run.parts = honest
    for kind, counted, least in rows:
        assert counted / least > 1.02, f"{kind}: {counted / least:.3f}"
