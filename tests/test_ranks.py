"""A run does not depend on how it is split: ranks, micro-batches, resume, and who reads what.

Everything goes through the shell scripts; nothing is injected, only the configuration is changed.
Adam divides a gradient by its own size, so float noise flips the sign of the steps whose gradient
is almost nothing. With `optimizer.eps` far above every gradient the steps are proportional to the
gradient, and what two runs differ by is float noise alone: it is measured by how far the networks
are apart over how far they moved.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from embedded import EMBEDDED, YAMLS
from python import PYTHON
from torture_worker import write_python
from training_runs import full_state, interrupted, timeless_rows, train

from senseflow.config.config import load_config
from senseflow.core.anchors import Anchors
from senseflow.distill.algorithm import draw_turn
from senseflow.distill.state import Turn
from senseflow.tiny.pictures import write_dataset

NUM_PICTURES = 10  # an epoch ends within a global batch of 4
HALF, WHOLE = 4, 8  # iterations of the two checkpoints
SETTINGS = [
    f"train.iter_num={WHOLE}",
    f"train.save_interval={HALF}",
    "train.batch_size=4",
    "train.seed=730",  # its draws cover what `test_the_draws_cover_every_case` asks for
    "train.log_interval=1",
    "train.keep_last=0",
    "log.sample_interval=0",
    "log.tensorboard=false",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
    "backward_simulation.probability=0.5",
    "optimizer.eps=1",
    "optimizer.lr=0.1",
    "optimizer.fake_score_lr=0.1",
    "optimizer.discriminator_lr=1",
    "optimizer.max_grad_norm=3",  # some steps are clipped and some are not
    "adversarial.taps=[5]",  # two heads
]
SHORTER = (  # one from data and one simulated, below the top anchor
    *("train.iter_num=2", "train.save_interval=1", "train.seed=5"),
    "fake_score.ttur=1",
)
# Right runs differ by up to 8e-4 (a leaky ReLU that float noise tips over), by 2e-3 in DMD2's head.
# Wrong ones (noise by the local index, shifted data, the fake score's loss not divided by the
# micro-batches, spectral norm moved by every micro-batch) differ by 0.19 and more in the network
# concerned.
TOLERANCE = 1e-2
SPLITS = {
    "two ranks": dict(ranks=2),
    "four ranks": dict(ranks=4),
    "four micro-batches": dict(accumulation=4),
    "two ranks of two micro-batches": dict(ranks=2, accumulation=2),
}
# Large differs from Medium in nothing that is split.
RECIPES = [name for name in EMBEDDED if name != "sd35_large_senseflow"]

Runs = Callable[..., Path]
Words = tuple[str, ...]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A JSON data set whose captions are all different, so that each names its picture."""
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, num=NUM_PICTURES, seed=0, num_prompts=2)
    file = folder / "data.json"
    data = json.loads(file.read_text())
    data["prompts"] = [f"{i} {prompt}" for i, prompt in enumerate(data["prompts"])]
    file.write_text(json.dumps(data))
    return file


@pytest.fixture(scope="session")
def whole(pictures, tmp_path_factory) -> Runs:
    """Runs of a recipe split in some way; each is trained once."""

    @cache
    def run(recipe: str, ranks: int = 1, accumulation: int = 1, more: Words = ()) -> Path:
        folder = tmp_path_factory.mktemp(recipe) / "run"
        words = (f"paths.dataset={pictures}", *SETTINGS, *more)
        train(recipe, folder, *words, f"train.grad_accumulation={accumulation}", ranks=ranks)
        return folder

    return run


@pytest.fixture(scope="session")
def resumed(pictures, whole, tmp_path_factory) -> Runs:
    """Runs that go on from the checkpoint a run left half way, on as many ranks or others."""

    @cache
    def run(recipe: str, before: int, after: int) -> Path:
        folder = tmp_path_factory.mktemp(recipe) / "run"
        interrupted(whole(recipe, before), HALF, folder)
        words = (f"paths.dataset={pictures}", *SETTINGS)
        result = train(recipe, folder, *words, ranks=after, **write_python(folder.parent, PYTHON))
        assert f"going on from {folder}/checkpoints/step_{HALF:07d}" in result.stderr
        return folder

    return run


# ------------------------------------------------------------------------- how far runs are apart


def learned(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The parameters of one network: what has a state in the optimizer."""
    prefix, suffix = f"{name}.optimizer.state.", ".exp_avg"
    keys = [k for k in state if k.startswith(prefix) and k.endswith(suffix)]
    names = [k.removeprefix(prefix).removesuffix(suffix) for k in keys]
    return {k: state[f"{name}.network.{k}"].double() for k in names}


def kept(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The buffers of one network, such as spectral norm's vectors."""
    network, parameters = f"{name}.network.", learned(state, name)
    buffers = {k: v.double() for k, v in state.items() if k.startswith(network)}
    return {k: v for k, v in buffers.items() if k.removeprefix(network) not in parameters}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(sum(((one[k] - other[k]) ** 2).sum() for k in one) ** 0.5)


def differences(one: Path, other: Path, tmp_path: Path, end: int) -> dict[str, float]:
    """||a - b|| / ||a - a half way|| per network, and |a - b| / max |a| per column of the rows."""
    a, b = (full_state(folder, end, tmp_path) for folder in (one, other))
    start = full_state(one, end // 2, tmp_path)
    found = {}
    for name in ("generator", "fake_score", "discriminator"):
        for kind, part in (("parameters", learned), ("buffers", kept)):
            if part(a, name):
                moved = distance(part(a, name), part(start, name)) or 1.0  # tables stay
                found[f"{name} {kind}"] = distance(part(a, name), part(b, name)) / moved
    columns = defaultdict(list)
    for mine, its in zip(timeless_rows(one), timeless_rows(other), strict=True):
        assert mine.keys() == its.keys()
        for name in mine:
            columns[name].append((mine[name], its[name]))
    for name, pairs in columns.items():
        size = max(abs(value) for value, _ in pairs)
        found[name] = max(abs(value - its) for value, its in pairs) / size
    return found


def check_equal(one: Path, other: Path, tmp_path: Path, end: int = WHOLE) -> None:
    found = differences(one, other, tmp_path, end)
    assert {"generator parameters", "fake_score parameters", "discriminator parameters"} <= set(
        found
    )
    assert {"loss/dmd", "loss/adv", "loss/fake", "loss/discriminator"} <= set(found)
    print({name: float(f"{value:.2g}") for name, value in found.items()})
    assert {name: value for name, value in found.items() if not value < TOLERANCE} == {}


def check_identical(one: Path, other: Path, tmp_path: Path) -> None:
    a, b = (full_state(folder, WHOLE, tmp_path) for folder in (one, other))
    assert a.keys() == b.keys() and len(a) > 500
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert timeless_rows(one) == timeless_rows(other)


# --------------------------------------------------------------------------------------- the tests


def turns() -> list[Turn]:
    """What is drawn in each iteration (no adversary: it has no part in the draws)."""
    config = load_config(YAMLS["flux_senseflow"], SETTINGS)
    parts = SimpleNamespace(
        config=config,
        seed=config.train.seed,
        anchors=Anchors(config.anchors.times),
        has_adversary=lambda tau: False,
    )
    return [draw_turn(parts, iteration) for iteration in range(1, WHOLE + 1)]


def test_the_draws_cover_every_case():
    for part in (turns(), turns()[HALF:]):
        lower = [turn for turn in part if turn.anchor]  # at the top there is nothing to simulate
        assert {(t.generator, t.simulate) for t in lower} == {
            (generator, simulate) for generator in (True, False) for simulate in (True, False)
        }
    assert {(t.generator, t.anchor) for t in turns()} == {
        (generator, anchor) for generator in (True, False) for anchor in range(4)
    }


def test_two_ranks_are_one(whole, tmp_path):
    """Two iterations, each with every network's turn."""
    runs = (whole("flux_senseflow", ranks, more=SHORTER) for ranks in (1, 2))
    check_equal(*runs, tmp_path, end=2)


@pytest.mark.long
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_and_micro_batches_do_not_change_a_run(recipe, split, whole, tmp_path):
    check_equal(whole(recipe), whole(recipe, **SPLITS[split]), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", ["flux_senseflow", "sdxl_dmd2"])
def test_resume_is_bit_identical(recipe, ranks, whole, resumed, tmp_path):
    check_identical(whole(recipe, ranks), resumed(recipe, ranks, ranks), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("recipe", ["flux_senseflow", "sdxl_dmd2"])
def test_resume_on_other_ranks_goes_on_the_same(recipe, ranks, whole, resumed, tmp_path):
    other = resumed(recipe, 2, ranks)
    check_equal(whole(recipe, 2), other, tmp_path)
    assert samples(other.parent) == samples(resumed(recipe, 2, 2).parent)


# ------------------------------------------------------------------------------- who reads what


def samples(folder: Path) -> list[tuple[int, int, str, int, str]]:
    """(iteration, index in the global batch, caption, digest of the picture, the real sample's
    caption) of all that was trained on, over all ranks, in the order of the run."""
    found = []
    for file in folder.glob("samples_*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            columns = zip(
                *(row[k] for k in ("indices", "prompts", "pictures", "real")), strict=True
            )
            found += [(row["iteration"], *column) for column in columns]
    return sorted(found)


CHEAP = ["adversarial.kind=none", "isg.weight=0", "ida.lam=null", "fake_score.ttur=100"]


@pytest.mark.long
def test_every_sample_once_per_epoch_over_ranks_workers_and_a_change_of_ranks(pictures, tmp_path):
    """Two ranks to the middle of an epoch, then one; two loading workers in each."""
    words = (f"paths.dataset={pictures}", *SETTINGS, *CHEAP, "data.num_workers=2")
    folder, seen = tmp_path / "run", []
    for ranks, iterations in ((2, HALF), (1, WHOLE)):
        watched = tmp_path / str(ranks)
        watched.mkdir()
        whole = f"train.iter_num={iterations}"
        train("flux_senseflow", folder, *words, whole, ranks=ranks, **write_python(watched, PYTHON))
        assert len(list(watched.glob("samples_*.jsonl"))) == ranks
        seen += samples(watched)
    assert [(s[0], s[1]) for s in seen] == [(i + 1, k) for i in range(WHOLE) for k in range(4)]
    captions = [caption for _, _, caption, _, _ in seen]
    epochs = [captions[i : i + NUM_PICTURES] for i in range(0, len(captions), NUM_PICTURES)]
    everything = json.loads(pictures.read_text())["prompts"]
    for epoch in epochs[:3]:
        assert sorted(epoch) == sorted(everything) and epoch != everything
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({(caption, digest) for _, _, caption, digest, _ in seen}) == NUM_PICTURES
