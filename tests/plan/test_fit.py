"""The set of changes that fits, against all sets; the plans are made up, but for one small one."""

import json
import shlex
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from statuses import status_of

from senseflow.cache.__main__ import build_parser as cache_parser
from senseflow.config.config import Config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.plan import command
from senseflow.plan import fit as fitting
from senseflow.plan.__main__ import main
from senseflow.plan.costs import Costs, Gpu, kinds_of, likely_worst_first
from senseflow.plan.fit import Changes, fit
from senseflow.plan.host import Host
from senseflow.plan.plan import Plan, Wanted
from senseflow.plan.rehearsal import Kind
from senseflow.plan.remedies import candidates, changed, together
from senseflow.plan.reserve import reserve
from senseflow.plan.tracker import PhaseCost

FILE = Path("configs/FLUX/flux_senseflow_tiny.yaml")
RECIPE = RECIPES["flux_senseflow"]
WANTED = Wanted(FILE, ("train.batch_size=4", "ema.decay=0.9"), 1, 1)
MIB = 2**20
SAVED = {  # MiB of 1,000, by what is changed
    "train.grad_accumulation=4": 100,
    "cached": 150,
    "parallel.recomputation=selective": 120,
    "parallel.recomputation=full": 200,
    "optimizer.head_states=8bit": 40,
    "optimizer.states=8bit": 90,
    "precision.masters=bfloat16": 60,
    "precision.head_masters=bfloat16": 20,
    "precision.vae=bfloat16": 80,
    "precision.heads=bfloat16": 30,
    "ema.decay=null": 10,
}
"""In the order of what they cost."""


def size(wanted: Wanted, generator: bool = True, plain: int = -500, apart: int = 100) -> int:
    """MiB; of overrides of one key the last counts. A plain turn needs `plain` more than a
    generator's, and has no image to decode: the VAE's type changes nothing of it. `apart`: what
    micro-batches save."""
    last = dict(override.split("=", 1) for override in wanted.overrides)
    made = {f"{key}={value}" for key, value in last.items()} | {wanted.data}
    if not generator:
        made -= {"precision.vae=bfloat16"}
    sizes = SAVED | {"train.grad_accumulation=4": apart}
    saved = sum(each for change, each in sizes.items() if change in made)
    return 1000 - saved + (0 if generator else plain)


@cache
def config_of(overrides: tuple[str, ...]) -> Config:
    return load_recipe(RECIPE, FILE, list(overrides))


class MadeUp:
    """In the place of `make_plan`."""

    def __init__(self, plain: int = -500, apart: int = 100) -> None:
        self.plain, self.apart = plain, apart
        self.asked: list[tuple[Wanted, frozenset[Kind]]] = []

    def __call__(self, wanted, kinds=None, within=None) -> Plan:
        config = config_of(wanted.overrides)
        traced: dict[Kind, dict[str, PhaseCost]] = {}
        kinds = kinds or likely_worst_first(kinds_of(config))
        for kind in kinds:
            num_bytes = size(wanted, kind.generator, self.plain, self.apart) * MIB
            traced[kind] = {"generate": PhaseCost(peak=num_bytes, flops=10**12)}
            if within and num_bytes > within.room(wanted.world_size, 1):
                break
        self.asked.append((wanted, frozenset(traced)))
        costs, data = Costs(config, traced), wanted.data or "images"
        return Plan(wanted, config, "made up", data, {}, costs, kinds)


def gpu(mib: float) -> Gpu:
    return Gpu(memory=mib / 1024, mfu=0.4, reserve=0)


def least(every: Changes, fits) -> Changes:
    """Of all sets that fit the one whose dearest change is the cheapest, and so on."""
    found = [s for n in range(len(every) + 1) for s in combinations(every, n) if fits(s)]
    return min(found, key=lambda changes: sum(2 ** every.index(c) for c in changes))


@pytest.fixture(scope="module")
def every() -> Changes:
    found = tuple(candidates(MadeUp()(WANTED)))
    named = [change.overrides[-1] for change in found]
    assert ["cached" if "cache" in name else name for name in named] == list(SAVED)
    return found


@pytest.mark.parametrize("room", [1000, 999, 860, 800, 640, 540, 475, 460, 400, 331, 330])
def test_the_set_is_the_cheapest_of_all_that_fit(room, every, monkeypatch):
    monkeypatch.setattr(fitting, "make_plan", made_up := MadeUp())
    found = fit(WANTED, gpu(room))
    expected = least(every, lambda s: size(changed(WANTED, s)) <= room)
    assert found.changes == expected
    assert found.plan.peak <= room * MIB and len(found.plan.costs.traced) == 5
    assert made_up.asked.count((found.plan.wanted, frozenset(found.plan.costs.traced))) == 1
    assert len(made_up.asked) == len({*made_up.asked}) == len(found.rehearsals)
    halvings = 4  # of eleven changes
    assert len(found.rehearsals) <= (1 if not expected else 4 + halvings + len(every) - 1)


@pytest.mark.parametrize("room", [860, 730, 640, 500, 440, 400])
def test_micro_batches_whose_gradients_are_larger_than_samples_are_not_used(
    room, every, monkeypatch
):
    monkeypatch.setattr(fitting, "make_plan", made_up := MadeUp(apart=-50))
    found = fit(WANTED, gpu(room))
    assert found.changes == least(every, lambda s: size(changed(WANTED, s), apart=-50) <= room)
    assert every[0] not in found.changes
    assert sum(every[0].overrides[0] in wanted.overrides for wanted, _ in made_up.asked) == 1


def test_what_fits_by_one_kind_of_iteration_alone_is_not_said_to_fit(every, monkeypatch):
    """Generator turns fit with the VAE's type; plain turns, the worst then, need the heads'."""
    monkeypatch.setattr(fitting, "make_plan", MadeUp(plain=-30))
    found = fit(WANTED, gpu(340))
    by_one = least(every, lambda s: size(changed(WANTED, s)) <= 340)
    by_all = least(
        every, lambda s: all(size(changed(WANTED, s), turn, -30) <= 340 for turn in (True, False))
    )
    assert [change.overrides for change in (by_one[-1], by_all[-1])] == [
        ("precision.vae=bfloat16",), ("precision.heads=bfloat16",)
    ]  # fmt: skip
    assert found.changes == by_all
    assert found.plan.fits(gpu(340)) and len(found.plan.costs.traced) == 5


def said(monkeypatch, capsys, room: float, *arguments: str) -> tuple[object, str]:
    """Exit status and output of the command on made-up plans."""
    monkeypatch.setattr(fitting, "make_plan", MadeUp())
    monkeypatch.setattr(command, "measure", lambda *_: Host(1e-5, 2e-3))
    words = [str(FILE), *WANTED.overrides, "--gpus", "1", "--fit"]
    numbers = ["--memory", f"{room / 1024}", "--reserve", "0"]
    status = status_of(main, [*words, *numbers, *arguments])
    return status, capsys.readouterr().out


def test_the_words_are_those_of_a_training_script(every, monkeypatch, capsys):
    status, text = said(monkeypatch, capsys, 620)
    assert (
        status == 0
        and "**It fits with this**" in text
        and f"in {len(fitting.make_plan.asked)} rehearsals" in text
    )
    blocks = [block.strip() for block in text.split("```")[1::2]]
    words = shlex.split(blocks[0])
    assert words == [o for index in (0, 1, 3) for o in every[index].overrides]
    config = load_recipe(RECIPE, FILE, [*WANTED.overrides, *words])
    assert config.parallel.recomputation == "full" and config.paths.cache == words[1].removeprefix(
        "paths.cache="
    )
    made = cache_parser().parse_intermixed_args(shlex.split(blocks[1])[3:])
    assert str(made.output) == config.paths.cache
    assert made.overrides == [str(FILE), *WANTED.overrides, words[0], *words[2:]]


def test_json_has_the_set_and_all_that_was_traced(every, monkeypatch, capsys, tmp_path):
    status, _ = said(monkeypatch, capsys, 860, "--output", str(tmp_path / "fit.json"))
    tree = json.loads((tmp_path / "fit.json").read_text())
    assert status == 0 and tree["fits"] and tree["fit"]["fits"]
    assert tree["fit"]["overrides"] == list(every[1].overrides)
    last = tree["fit"]["rehearsals"][-1]
    assert last == {"changes": tree["fit"]["overrides"], "num_kinds": 5, "fits": True,
                    "peak": 850 * MIB}  # fmt: skip


def test_a_budget_that_nothing_meets_has_its_nearest_and_status_1(every, monkeypatch, capsys):
    status, text = said(monkeypatch, capsys, 100)
    assert status == 1 and "**Nothing makes it fit.**" in text
    least_size = size(changed(WANTED, every))
    assert (
        f"{(least_size - 100) / 1024:.2f} GiB too much; GPUs of 0.3 GiB would do, with this" in text
    )
    assert shlex.split(text.split("```")[1]) == list(together(every))
    assert f"in {len(fitting.make_plan.asked)} rehearsals" in text


def test_what_fits_as_it_is_takes_one_rehearsal(monkeypatch, capsys):
    status, text = said(monkeypatch, capsys, 1000)
    assert status == 0 and "**It fits as it is.**" in text and "in 1 rehearsal;" in text


def test_the_reserve_is_of_one_gpu_or_of_several():
    """NCCL's buffers by the sizes in its source, 2 MiB pages, on 32 channels of ring and tree."""
    simple, ll, ll128 = 2**22, 8 * 512 * 8 * 16, 120 * 640 * 8 * 8
    mapped = -(-(simple + ll + ll128) // (2 * MIB)) * 2 * MIB
    communicator = 32 * (1 + 3) * (mapped + 2 * MIB) / 2**30
    assert reserve(1) == 1.5
    assert reserve(8) - reserve(1) - 1 == communicator == 1.5
    assert reserve(2) == reserve(8) and reserve(8, 2) == reserve(8) + 2 * communicator
    assert Gpu(24, 0.4).room(1, 1) == 22.5 * 2**30
    assert Gpu(80, 0.4, reserve=6).room(8, 2) == 74 * 2**30


@pytest.mark.long
def test_a_real_fit_on_the_embedded_teacher(tmp_path):
    """With the memory that a plan from caches needs, a cache is the answer, and the peak is its."""
    small = ["train.batch_size=1", "adversarial.kind=none", "isg.weight=0", "anchors.times=[1000]"]
    file = tmp_path / "plan.json"
    base = [sys.executable, "-m", "senseflow.plan", str(FILE), "--gpus", "1", "--reserve", "0"]
    rest = ["--op-us", "10", "--unit-ms", "1", "--output", str(file)]

    def planned(*words: str) -> dict:
        done = subprocess.run([*base, *rest, *small, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(file.read_text())

    peak = planned("--data", "cached")["peak"]
    found = planned("--fit", "--memory", f"{peak / 2**30 + 1e-5:.9f}")
    assert found["fit"]["overrides"] == ["paths.cache=runs/flux_senseflow_cache"]
    assert found["peak"] == peak and found["fits"]
    first, *_, last = found["fit"]["rehearsals"]
    assert first["peak"] > peak and last["num_kinds"] == 2
