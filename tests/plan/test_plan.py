"""A plan against arithmetic, against counts of the real iteration, and made wrong on purpose.

The rehearsals take a process group of their own, so they run in a process of their own: once, for
all tests. Two ranks of the embedded FLUX teacher, two samples on each.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.flops import count, count_pieces
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.config.teacher import teacher_settings
from senseflow.distill.algorithm import take_turn
from senseflow.distill.measures import Measures
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run
from senseflow.plan import remedies as planning_remedies
from senseflow.plan.blank import PlanData
from senseflow.plan.costs import Costs, Gpu, kinds_of, peak
from senseflow.plan.host import Host, measure
from senseflow.plan.plan import Plan, Wanted, configure
from senseflow.plan.rehearsal import Kind, NetworkBytes, Rehearsal, rehearse, silent_anchors
from senseflow.plan.remedies import Change, Remedy, candidates, changed, remedies, together, twice
from senseflow.plan.text import as_markdown, as_tree
from senseflow.plan.tracker import GATHERED, OFFLOADED, PhaseCost, Tracker
from senseflow.tiny.pictures import write_dataset
from senseflow.weights.packed import torch_packs

FILE = Path("configs/FLUX/flux_senseflow_tiny.yaml")
RECIPE = RECIPES["flux_senseflow"]
PLAIN, GENERATOR = Kind(False, 1, False, 4), Kind(True, 1, False, 4)
TURNS = {"first": GENERATOR, "generator": GENERATOR, "plain": PLAIN}
KEPT = 3 * 2**20


def wanted(world_size: int, batch_size: int, *overrides: str) -> Wanted:
    """Without the adversary, whose operations outnumber the others by far."""
    sizes = (f"train.batch_size={batch_size}", "adversarial.kind=none")
    return Wanted(FILE, (*sizes, *overrides), 1, world_size)


def phases_of(rehearsal: Rehearsal, kind: Kind) -> dict[str, dict]:
    return {name: vars(cost) for name, cost in rehearsal.iterate(kind).items()}


def rehearse_two_ranks(folder: Path) -> dict[str, object]:
    config, _ = configure(RECIPE, wanted(2, 4), folder)
    with rehearse(config, RECIPE.family, 2, "images") as rehearsal:
        facts: dict[str, object] = {}
        facts["networks"] = {k: vars(v) for k, v in rehearsal.hold().items()}
        held = rehearsal.tracker.now
        facts["generator"] = phases_of(rehearsal, GENERATOR)
        facts["plain"] = phases_of(rehearsal, PLAIN)
        facts["left behind"] = rehearsal.tracker.now - held
        network, kept = rehearsal.parts.fake_score.network, []
        block = network.transformer_blocks[0]
        hook = block.register_forward_hook(lambda *_: kept.append(torch.empty(KEPT)))
        facts["one kept"] = phases_of(rehearsal, PLAIN)
        facts["num kept"] = len(kept)
        hook.remove()
        kept.clear()
    return facts


def rehearse_gathered(folder: Path) -> dict[str, object]:
    """Networks that stay gathered, on two ranks."""
    kept = ("parallel.reshard_after_forward=false", "ida.lam=0.9")
    config, _ = configure(RECIPE, wanted(2, 4, *kept), folder)
    with rehearse(config, RECIPE.family, 2, "images") as rehearsal:
        rehearsal.hold()
        return {kind: phases_of(rehearsal, turn) for kind, turn in TURNS.items()}


def rehearse_offloaded(folder: Path, place: str) -> dict[str, object]:
    """Two heads, in host memory or not, on two ranks."""
    heads = ("train.batch_size=2", "adversarial.taps=[0]", f"parallel.offload={place}")
    config, _ = configure(RECIPE, Wanted(FILE, heads, 1, 2), folder)
    with rehearse(config, RECIPE.family, 2, "images") as rehearsal:
        network = rehearsal.parts.discriminator.heads.network
        sizes = [p.numel() for p in network.parameters()]
        rehearsal.hold()
        return {"sizes": sizes, "phases": phases_of(rehearsal, PLAIN)}


def count_one_rank(folder: Path) -> dict[str, object]:
    """FLOPs of the real iteration with as many samples and of each network alone, by torch's own
    counter."""
    write_dataset(folder, num=4, seed=0, num_prompts=1)
    config, _ = configure(RECIPE, wanted(1, 2, f"paths.dataset={folder / 'data.json'}"), folder)
    run = prepare(read_run(config, RECIPE.family), folder / "run")
    batches = next(run.data(1))
    real: dict[str, object] = {"alone": vars(count_pieces(run.parts, batches[0]))}
    for name, kind in (("plain", PLAIN), ("generator", GENERATOR)):
        turn = kind.turn(run.parts)
        real[name] = count(lambda turn=turn: take_turn(run.parts, turn, batches, Measures()))
    return real


def rehearse_roles(folder: Path, *more: str) -> dict[str, object]:
    """LoRA from caches, on one rank."""
    lora = ("lora.rank=2", "lora.targets=[to_q]", "student.guidance=3.5")
    config, _ = configure(RECIPE, wanted(1, 2, *lora, *more, "optimizer.states=8bit"), folder)
    with rehearse(config, RECIPE.family, 1, "cached") as rehearsal:
        held = {name: vars(network) for name, network in rehearsal.hold().items()}
        phases = phases_of(rehearsal, GENERATOR)
    return {"held": held, "generate": phases["generate"], "phases": phases}


def rehearse_dmd2_roles(_: int, folder: Path) -> None:
    """Who works in a plain turn of DMD2 with LoRA."""
    recipe = RECIPES["sdxl_dmd2"]
    lora = ("train.batch_size=2", "lora.rank=2", "lora.targets=[to_q]")
    file = Path("configs/sdxl/sdxl_dmd2_tiny.yaml")
    config, _ = configure(recipe, Wanted(file, lora, 1, 1), folder)
    with rehearse(config, recipe.family, 1, "images") as rehearsal:
        phases = phases_of(rehearsal, PLAIN)
    names = sorted({name for cost in phases.values() for name in cost["work"]})
    (folder / "names.json").write_text(json.dumps(names))


PACKS = pytest.mark.skipif(not torch_packs(), reason="FSDP2 of this torch shards no bytes")


def work(_: int, folder: Path) -> None:
    torch.set_num_threads(1)
    facts = rehearse_two_ranks(folder / "two") | {"roles": rehearse_roles(folder / "roles")}
    if torch_packs():
        facts |= {"packed": rehearse_roles(folder / "packed", "lora.base=nf4")}
    facts |= {"kept": rehearse_gathered(folder / "kept")}
    facts |= {place: rehearse_offloaded(folder / place, place) for place in ("none", "heads")}
    facts |= {"host": vars(measure())}
    facts |= {"real": count_one_rank(folder / "one")}
    (folder / "facts.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    for name in ("one", "two", "roles", "packed", "kept", "none", "heads"):
        (folder / name).mkdir()
    mp.spawn(work, (folder,))
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Of student and fake score, parameters and buffers; of each unit's parameters."""
    config, _ = configure(RECIPE, wanted(2, 4), tmp_path_factory.mktemp("shapes"))
    source = RECIPE.family.student(teacher_settings(config))
    own = {id(p) for block in source.blocks for p in block.parameters()}
    units = [list(block.parameters()) for block in source.blocks]
    units.append([p for p in source.network.parameters() if id(p) not in own])
    return [[tuple(p.shape) for p in unit] for unit in units], list(source.network.buffers())


def half(shape: tuple[int, ...]) -> int:
    """Elements of rank 0's rows of two."""
    return -(-shape[0] // 2) * math.prod(shape[1:])


def test_what_stays_is_arithmetic(facts, shapes):
    units, buffers = shapes
    held = facts["networks"]["generator"]
    assert held == facts["networks"]["fake_score"]
    numel = sum(half(shape) for unit in units for shape in unit)
    num = sum(len(unit) for unit in units)
    assert held["numel"] == sum(math.prod(shape) for unit in units for shape in unit)
    assert held["parameters"] == {"float32": 4 * numel + sum(b.nbytes for b in buffers)}
    assert held["gradients"] == 4 * numel
    assert held["states"] == 2 * 4 * numel + 4 * num  # two moments, and the steps of each tensor


@PACKS
def test_roles_share_one_base_and_caches_need_no_text_encoder(facts, tmp_path):
    config, _ = configure(RECIPE, wanted(1, 2), tmp_path)
    teacher = RECIPE.family.teacher(teacher_settings(config)).network
    layers = [m.weight.shape for k, m in teacher.named_modules() if k.endswith("to_q")]
    rank_a, rank_b = (2 * sum(shape[side] for shape in layers) for side in (1, 0))
    held = facts["roles"]["held"]
    assert held.keys() == {"generator", "fake_score", "teacher", "vae"}
    assert held["teacher"]["gradients"] == held["teacher"]["states"] == 0
    trained = [held[name]["numel"] for name in ("generator", "fake_score")]
    assert trained == [rank_b, rank_b]  # the fixed A is one buffer of both
    base = sum(p.nbytes for p in teacher.parameters()) + sum(b.nbytes for b in teacher.buffers())
    every = sum(sum(held[name]["parameters"].values()) for name in held if name != "vae")
    assert every == base + 4 * (rank_a + 2 * rank_b)
    packed = facts["packed"]["held"]
    blocks = [
        m for b in RECIPE.family.teacher(teacher_settings(config)).blocks for m in b.modules()
    ]
    sizes = [m.weight.shape for m in blocks if isinstance(m, nn.Linear)]
    # half a byte for each weight, and a float32 for 64 of them
    assert packed["teacher"]["parameters"]["uint8"] == sum(r * (c // 2 + c // 16) for r, c in sizes)
    spared = sum(4 * r * c for r, c in sizes)
    assert packed["teacher"]["parameters"]["float32"] == (
        held["teacher"]["parameters"]["float32"] - spared
    )
    assert packed["teacher"]["numel"] == held["teacher"]["numel"]
    one, two = (facts[name]["phases"] for name in ("roles", "packed"))
    assert {k: c["flops"] for k, c in one.items()} == {k: c["flops"] for k, c in two.items()}
    assert max(c["peak"] for c in two.values()) < max(c["peak"] for c in one.values()) - spared / 2


def test_a_unit_is_gathered_for_each_forward_and_backward(facts, shapes):
    units, _ = shapes
    whole = 2 * 4 * sum(half(shape) for unit in units for shape in unit)
    fake_score = facts["plain"]["fake_score"]
    assert fake_score["sent"] == {"all-gather": 2 * whole, "reduce-scatter": whole}
    assert fake_score["calls"] == {"all-gather": 2 * len(units), "reduce-scatter": len(units)}


@pytest.mark.parametrize("kind", ["plain", "generator"])
def test_flops_are_those_of_the_real_iteration(facts, kind):
    assert sum(cost["flops"] for cost in facts[kind].values()) == facts["real"][kind]


def test_the_work_of_each_network_is_its_forwards_times_how_often_they_are_asked_for(facts):
    """The student's once, on its turn once more for ISG; the fake score's for its own step, on the
    student's turn for DMD; the teacher's for DMD and for ISG; backwards cost two and a half or two
    forwards: attention's is more than twice its forward."""
    alone = facts["real"]["alone"]
    often = {"plain": (1, 1, 0), "generator": (2, 2, 2)}
    for kind, times in often.items():
        done = Counter()
        for cost in facts[kind].values():
            done.update(cost["work"])
        names = ("generator", "fake_score", "teacher")
        units = (alone["student"], alone["student"], alone["teacher"])
        assert [done[n] for n in names] == [n * one for n, one in zip(times, units, strict=True)]
        assert done["text_encoder"] + done["text_encoder_2"] == alone["prompts"]
        assert done["vae.encoder"] == alone["encode"] and "vae.decoder" not in done
        backwards = {name: num for name, num in done.items() if name.startswith("backward")}
        phases = ("fake_score", "generator") if kind == "generator" else ("fake_score",)
        assert backwards.keys() == {f"backward, {phase}" for phase in phases}
        assert all(2 < num / alone["student"] < 2.5 for num in backwards.values())
        assert sum(done.values()) == facts["real"][kind]


@pytest.mark.long
def test_a_pass_through_the_encoder_of_a_shared_base_is_its_roles_work(tmp_path):
    """DMD2's classifier reads the fake score, no teacher acts; the autoencoder is whole."""
    backwards = ["backward, discriminator", "backward, fake_score"]
    networks = ["fake_score", "generator", "heads", "text_encoder", "text_encoder_2", "vae.encoder"]
    mp.spawn(rehearse_dmd2_roles, (tmp_path,))
    assert json.loads((tmp_path / "names.json").read_text()) == [*backwards, *networks]


def test_an_iteration_leaves_nothing_behind(facts):
    """But for what libraries keep once, such as tables of positions, and numbers of a few bytes."""
    assert 0 <= facts["left behind"] < 2**16


def test_an_activation_that_is_kept_is_seen(facts):
    """Kept by the fake score's forward; its step comes after it."""
    before, after = (facts[name]["optimizer"]["peak"] for name in ("plain", "one kept"))
    assert facts["num kept"] >= 1
    assert after - before == pytest.approx(4 * KEPT * facts["num kept"], abs=2**10)


@pytest.mark.parametrize(
    ("kind", "gathered"),
    [
        ("first", {"generator": 1, "fake_score": 1, "between": 1}),
        ("generator", {"generator": 1, "fake_score": 1, "between": 1}),
        ("plain", {"fake_score": 1}),
    ],
)
def test_networks_that_stay_gathered_are_seen(facts, shapes, kind, gathered):
    """The fake score is gathered anew after its step, and after IDA; the student after its own, for
    the next iteration; the teacher never. All three are held at once, until the student moves."""
    units, _ = shapes
    found = {name: cost["gatherings"] for name, cost in facts["kept"][kind].items()}
    # Text encoders are resharded; elsewhere the student is gathered beside them.
    expected = {"generate": facts["plain"]["generate"]["gatherings"] - len(units)}
    expected |= {name: num * len(units) for name, num in gathered.items()}
    assert {name: num for name, num in found.items() if num} == expected
    whole = 2 * 4 * sum(half(shape) for unit in units for shape in unit)
    phase = "fake_score" if kind == "plain" else "generator"
    held = facts["kept"][kind][phase]["parts"][GATHERED]
    assert facts["plain"]["fake_score"]["parts"][GATHERED] < whole < 3 * whole <= held


def test_heads_in_host_memory_are_not_on_the_gpu(facts):
    """Masters and two moments, float32, a step's count for each parameter, and the gradients of
    the head before."""
    place, away = (facts[name]["phases"] for name in ("none", "heads"))
    sizes = facts["heads"]["sizes"]
    held = 3 * 4 * sum(sizes) // 2 + 4 * len(sizes)
    assert place["fake_score"]["parts"][OFFLOADED] == 0
    assert away["fake_score"]["parts"][OFFLOADED] == held
    assert place["fake_score"]["peak"] - away["fake_score"]["peak"] == held
    of_one = 4 * sum(sizes) // 2 // 2
    assert place["discriminator"]["peak"] - away["discriminator"]["peak"] == held + of_one


def rehearse_silent(_: int, folder: Path) -> None:
    eight = "anchors.times=[1000, 875, 750, 625, 500, 375, 250, 125]"
    least = (eight, "adversarial.least_omega=0.01", "train.batch_size=2")
    config, _ = configure(RECIPE, Wanted(FILE, least, 1, 1), folder)
    with rehearse(config, RECIPE.family, 1, "images") as rehearsal:
        found = silent_anchors(rehearsal.parts)
    (folder / "silent.json").write_text(json.dumps(found))


def test_which_anchors_have_no_adversary(tmp_path):
    """omega is alpha^2: at the shift of FLUX's anchors (.75 is .9045) .0019, .0091, .0255 below the
    top one of eight. The anchor below those that are silent is traced."""
    mp.spawn(rehearse_silent, (tmp_path,))
    assert json.loads((tmp_path / "silent.json").read_text()) == [0, 1, 2]
    config = load_recipe(RECIPE, FILE, ["anchors.times=[1000, 875, 750, 625, 500, 375, 250, 125]"])
    assert {kind.anchor for kind in kinds_of(config, [0, 1, 2])} == {0, 1, 3, 7}


def made_up_costs(p: float, num: int) -> Costs:
    """Every forward costs 1, an encoding 10, a generator turn 100 more."""
    config = load_recipe(RECIPE, FILE, [f"backward_simulation.probability={p}"])
    config = replace(config, anchors=replace(config.anchors, times=config.anchors.times[:num]))

    def phases(kind: Kind) -> dict[str, PhaseCost]:
        way = 0 if kind.anchor == 0 else kind.anchor if kind.simulate else 10
        rest = PhaseCost(flops=100 * kind.generator)
        return {"generate": PhaseCost(flops=1 + way), "fake_score": rest}

    return Costs(config, {kind: phases(kind) for kind in kinds_of(config)})


@pytest.mark.parametrize(("p", "num"), [(0.5, 4), (0.0, 4), (1.0, 4), (0.5, 2), (0.5, 1)])
def test_the_mean_weighs_every_kind(p, num):
    costs = made_up_costs(p, num)
    often = 100 / costs.config.fake_score.ttur
    ways = [0.0] + [p * k + (1 - p) * 10 for k in range(1, num)]
    expected = 1 + often + sum(ways) / num
    assert costs.mean(lambda cost: cost.flops) == pytest.approx(expected)


@pytest.mark.parametrize("num", [2, 3, 4])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rolls", [True, False])
@pytest.mark.parametrize("named", [(), (1,), (2,), (2, 3), (1, 3), (1, 2, 3, 4), (4,)])
def test_the_mean_with_rewards(named, rolls, p, num):
    """A rollout costs 1000 whatever is drawn, and 7 where the last anchor's x is no step that
    trains; the rewards' own gradient 500 at its anchors, of which the last is number 1."""
    times = [1000, 750, 500, 250][:num]
    chosen = [t for n, t in zip(range(num, 0, -1), times, strict=True) if n in named]
    config = load_recipe(RECIPE, FILE, [
        f"backward_simulation.probability={p}", f"reward.weight={int(rolls)}",
        f"reward.last_weight={int(bool(chosen))}", f"reward.anchors={chosen or 'null'}",
        "reward.models=[a:b]", f"anchors.times={times}",
    ])  # fmt: skip

    def phases(kind: Kind) -> dict[str, PhaseCost]:
        rolled = kind.generator and rolls
        way = 0 if kind.anchor == 0 or rolled else kind.anchor if kind.simulate else 10
        learns = 500 * (times[kind.anchor] in chosen) + 7 * (rolled and kind.anchor == num - 1)
        found = {"generate": PhaseCost(flops=1 + way)}
        found["generator"] = PhaseCost(flops=(100 + learns) * kind.generator)
        return found | ({"rollout": PhaseCost(flops=1000)} if rolled else {})

    mean = Costs(config, {k: phases(k) for k in kinds_of(config)}).mean(lambda cost: cost.flops)
    often = 1 / config.fake_score.ttur
    ways = sum(p * k + (1 - p) * 10 for k in range(1, num)) / num
    turn = 100 + 500 * len(chosen) / num + (1000 + 7 / num if rolls else ways)
    assert mean == pytest.approx(1 + often * turn + (1 - often) * ways)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("named", ["null", "[500]"])
@pytest.mark.parametrize(
    ("drawn", "rolls"),
    [((2, 4), True), ((2, 4), False), ((2, 2, 4), True), ((2, 2, 4), False), ((1, 4), False)],
)
def test_the_mean_with_several_numbers_of_steps(drawn, named, rolls, p):
    """Of two steps and of four, each as often as it is named. A rollout costs 1000 a step, an
    encoding 10, the rewards' own gradient 500: at the last anchor of each, or at 500, where it is
    one. Sampling in one step has no density, and no rollout."""
    config = load_recipe(RECIPE, FILE, [
        f"backward_simulation.probability={p}", f"reward.weight={int(rolls)}",
        f"anchors.steps={list(drawn)}", "reward.last_weight=1", f"reward.anchors={named}",
        "reward.models=[a:b]",
    ])  # fmt: skip
    reflecting = {"null": {(1, 0), (2, 1), (4, 3)}, "[500]": {(2, 1), (4, 2)}}[named]

    def cost(generator: bool, anchor: int, simulate: bool, steps: int) -> float:
        rolled = generator and rolls
        way = 0 if anchor == 0 or rolled else anchor if simulate else 10
        learns = 500 * ((steps, anchor) in reflecting) + 7 * (rolled and anchor == steps - 1)
        return 1 + way + (100 + learns) * generator + 1000 * steps * rolled

    def phases(kind: Kind) -> dict[str, PhaseCost]:
        whole = cost(kind.generator, kind.anchor, kind.simulate, kind.steps)
        own = cost(False, kind.anchor, kind.simulate, kind.steps)
        if kind.generator and rolls:
            return {"generate": PhaseCost(flops=1), "generator": PhaseCost(flops=whole - 1)}
        return {"generate": PhaseCost(flops=own), "generator": PhaseCost(flops=whole - own)}

    mean = Costs(config, {k: phases(k) for k in kinds_of(config)}).mean(lambda cost: cost.flops)
    often, expected = 1 / config.fake_score.ttur, 0.0
    for steps in drawn:
        for anchor in range(steps):
            for simulate, chance in ((True, p), (False, 1 - p)):
                turns = often * cost(True, anchor, simulate, steps)
                turns += (1 - often) * cost(False, anchor, simulate, steps)
                expected += chance * turns / len(drawn) / steps
    assert mean == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rolls", [True, False])
@pytest.mark.parametrize("drawn", ["null", "[2, 4]"])
@pytest.mark.parametrize("silent", [(), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)])
def test_the_mean_where_the_adversary_plays_at_some_anchors(silent, drawn, rolls, p):
    """It costs 50, and 30 more on theta's turn; of two steps the second begins at the third anchor.
    A rollout costs 1000 a step, 7 more where its last step trains nothing."""
    config = load_recipe(RECIPE, FILE, [
        f"backward_simulation.probability={p}", f"reward.weight={int(rolls)}",
        f"anchors.steps={drawn}", "reward.models=[a:b]",
    ])  # fmt: skip

    def parts(generator: bool, anchor: int, simulate: bool, steps: int) -> tuple[float, float]:
        rolled = generator and rolls
        way = 0 if anchor == 0 or rolled else anchor if simulate else 10
        plays = anchor * 4 // steps not in silent
        rolling = 1000 * steps + 7 * (anchor == steps - 1) if rolled else 0
        return 1 + way, (50 + 30 * generator) * plays + 100 * generator + rolling

    def phases(kind: Kind) -> dict[str, PhaseCost]:
        way, rest = parts(kind.generator, kind.anchor, kind.simulate, kind.steps)
        return {"generate": PhaseCost(flops=way), "discriminator": PhaseCost(flops=rest)}

    traced = {kind: phases(kind) for kind in kinds_of(config, silent)}
    often, expected, walks = 1 / config.fake_score.ttur, 0.0, [2, 4] if drawn != "null" else [4]
    for steps, generator in product(walks, (True, False)):
        for anchor, (simulate, chance) in product(range(steps), ((True, p), (False, 1 - p))):
            share = (often if generator else 1 - often) * chance / len(walks) / steps
            expected += share * sum(parts(generator, anchor, simulate, steps))
    mean = Costs(config, traced, silent).mean(lambda cost: cost.flops)
    assert mean == pytest.approx(expected)


def test_the_worst_kind_is_the_one_with_the_highest_moment():
    config = made_up_costs(0.5, 4).config
    low, high = ({"a": PhaseCost(peak=5), "b": PhaseCost(peak=n)} for n in (6, 7))
    costs = Costs(config, {GENERATOR: low, PLAIN: high})
    assert costs.worst() == PLAIN and peak(high) == 7


GPU = Gpu(memory=80, reserve=6, mfu=0.4)
HOST = Host(operation=1e-5, gathering=2e-3)


def made_up_plan(size_gib: float) -> Plan:
    costs = made_up_costs(0.5, 4)
    for phases in costs.traced.values():
        for name, cost in phases.items():
            cost.peak = int((size_gib - (name == "generate")) * 2**30)
            cost.parts = {GATHERED: cost.peak}
    networks = {"generator": NetworkBytes(10, {"float32": 2**30}, 2**30, 2**31)}
    return Plan(
        wanted(2, 4), costs.config, "as published", "images", networks, costs, [*costs.traced]
    )


def test_words_say_whether_it_fits_and_what_helps():
    text = as_markdown(made_up_plan(50), GPU, HOST, [])
    assert "74 of 80 are for tensors, 6 are kept for the CUDA context, work spaces, NCCL" in text
    assert "**It fits**, with 24.0 to spare" in text and "| generator | 10 | 1.00 float32 |" in text
    helps = [Remedy("less of it", ("a.b=1",), 60 * 2**30, True)]
    text = as_markdown(made_up_plan(78.5), GPU, HOST, helps)
    assert "**4.5 too much**" in text and "| less of it | `a.b=1` | 60.00 | yes |" in text


def test_words_say_whose_reward_is_not_counted():
    plan = made_up_plan(50)
    assert "Rewards:" not in as_markdown(plan, GPU, HOST, [])
    for models, uncounted in ((["hps_v2.1"], False), (["hps_v2.1", "a:b"], True)):
        words = ["reward.weight=1", f"reward.models=[{', '.join(models)}]", "reward.group_size=2"]
        config = load_recipe(RECIPE, FILE, words)
        text = as_markdown(replace(plan, config=config), GPU, HOST, [])
        assert f"decoded and scored by {', '.join(models)}, as published where" in text
        assert ("What a function of yours holds and computes (a:b) is not" in text) == uncounted


def test_the_tree_is_json():
    tree = json.loads(json.dumps(as_tree(made_up_plan(50), GPU, HOST, [])))
    assert tree["fits"] and tree["peak"] == 50 * 2**30
    assert (tree["memory_gib"], tree["reserve_gib"]) == (80, 6)
    assert tree["time_s"]["H100"] == pytest.approx(tree["mean_flop"] / (0.4 * 989e12))


def test_the_hosts_floor_is_operations_and_units_at_their_prices():
    """100 operations and 3 gatherings in `generate`, 1,000 more on a generator's turn; by hand."""
    plan = made_up_plan(50)
    for kind, phases in plan.costs.traced.items():
        phases["generate"].operations, phases["generate"].gatherings = 100, 3
        phases["fake_score"].operations = 1000 * kind.generator
    often = 1 / plan.config.fake_score.ttur
    floor = (100 + 1000 * often) * 1e-5 + 3 * 2e-3
    tree = as_tree(plan, GPU, HOST, [])
    assert tree["host_floor_s"] == pytest.approx(floor)
    assert tree["mean_gatherings"] == pytest.approx(3)
    slow = as_markdown(plan, GPU, HOST, [])
    assert f"needs **{floor:.2f} s** where nothing is compiled" in slow
    assert "A100, H100, H200 would wait for it" in slow
    for phases in plan.costs.traced.values():
        phases["generate"].flops = 10**15
    assert "they do not wait for it" in as_markdown(plan, GPU, HOST, [])


def test_the_hosts_prices_are_given_or_measured(facts):
    assert measure(1e-5, 2e-3) == Host(1e-5, 2e-3)
    found = Host(**facts["host"])
    assert found.measured
    assert 1e-7 < found.operation < 1e-3 and 0 < found.gathering < 0.1


def test_operations_and_gatherings_are_counted(facts, shapes):
    """The fake score's step gathers each unit on the way there and on the way back."""
    units, _ = shapes
    step = facts["plain"]["fake_score"]
    assert step["gatherings"] == 2 * len(units)
    assert step["operations"] > 2 * sum(len(unit) for unit in units)


def test_operations_on_fake_tensors_are_those_on_real_ones():
    """Attention asks a fake tensor for its device, which no host starts."""

    def counted() -> int:
        with Tracker() as tracker:
            x = torch.ones(1, 2, 4, 8).requires_grad_()
            torch.nn.functional.scaled_dot_product_attention(x, x, x).square().sum().backward()
        return sum(cost.operations for cost in tracker.phases.values())

    real = counted()
    with FakeTensorMode():
        assert counted() == real > 5


def test_changes_are_those_the_configuration_has_not_made():
    def found(gpus: int, *overrides: str, data: PlanData = "images") -> list[tuple[str, ...]]:
        config = load_recipe(RECIPE, Path("configs/FLUX/flux_senseflow.yaml"), list(overrides))
        wanted = Wanted(FILE, overrides, 1, gpus)
        plan = Plan(wanted, config, "as published", data, {}, Costs(config, {}), [])
        return [change.overrides for change in candidates(plan)]

    some, every = "optimizer.head_states=8bit", "optimizer.states=8bit"
    moments = [(some,), ("optimizer.head_states=null", every)]
    heads = ("precision.head_masters=bfloat16",)
    rounded = [
        *moments,
        ("precision.masters=bfloat16",),
        heads,
        ("precision.vae=bfloat16",),
        ("precision.heads=bfloat16",),
    ]
    wholly = ("parallel.activation_checkpointing=1", "parallel.recomputation=full")
    assert found(8) == [("paths.cache=runs/flux_senseflow_cache",), wholly, *rounded]
    assert found(8, data="cached") == [wholly, *rounded]
    assert found(8, data="prompts")[0] == ("paths.cache=runs/flux_senseflow_cache",)
    assert found(8, "data.crop=random") == [wholly, *rounded]
    assert found(4, data="cached")[0] == ("train.grad_accumulation=2",)
    shuffled = "adversarial.reference=shuffled"  # needs two samples at a time
    assert found(4, shuffled, data="cached") == [wholly, *rounded]
    assert found(2, shuffled)[0] == ("train.grad_accumulation=2",)
    resharded = ("parallel.reshard_after_forward=true",)
    assert found(4, "parallel.reshard_after_forward=false")[0] == resharded
    selective = ("parallel.activation_checkpointing=1", "parallel.recomputation=selective")
    assert found(8, "parallel.activation_checkpointing=0")[1:3] == [selective, wholly]
    assert found(8, "ema.decay=0.99", "parallel.replicas=2")[-1] == ("ema.decay=null",)
    assert found(8, "parallel.replicas=2")[1] == ("parallel.replicas=1",)
    lora = ("lora.rank=4", "student.guidance=3.5", "paths.student_config=null")
    roles = found(8, *lora)
    assert ("precision.masters=bfloat16",) not in roles and heads in roles
    assert roles[-2:] == [("lora.base=int8",), ("lora.base=nf4",)]
    again = found(8, *lora, "lora.base=int8", "ema.decay=0.9")
    assert again[-2:] == [("lora.base=nf4",), ("ema.decay=null",)]
    assert found(8, some) == [found(8)[0], wholly, *rounded[1:]]
    assert found(8, every) == [found(8)[0], wholly, *rounded[2:]]
    assert found(8, every, "optimizer.head_states=bfloat16")[2:] == [moments[0], *rounded[2:]]
    assert found(8, "adversarial.kind=none")[2] == (every,)


def test_of_changes_of_one_key_the_last_counts():
    some, whole, cached = (
        Change("", "", overrides, "cache" in overrides[0])
        for overrides in (("a.b=1", "a.c=2"), ("a.c=3",), ("paths.cache=runs/x",))
    )
    assert together((some, whole, cached)) == ("a.b=1", "a.c=3", "paths.cache=runs/x")
    planned = changed(Wanted(FILE, ("c.d=4",), 1, 1), (some, whole, cached))
    assert planned == Wanted(FILE, ("c.d=4", "a.b=1", "a.c=3"), 1, 1, "cached")


def test_twice_the_gpus_keeps_each_ones_share():
    config = made_up_costs(0.5, 4).config
    more = twice(Wanted(FILE, ("train.batch_size=4", "a=1"), 1, 8), config)
    assert (more.nodes, more.gpus, more.overrides) == (2, 8, ("a=1", "train.batch_size=96"))


def test_each_change_is_planned_anew_and_gpus_double_until_it_fits(monkeypatch):
    asked = []

    def plan_of(changed, kinds):
        asked.append(changed)
        return made_up_plan(160 / changed.world_size)

    monkeypatch.setattr(planning_remedies, "make_plan", plan_of)
    found = remedies(made_up_plan(80), replace(GPU, memory=51))
    assert [remedy.overrides[:2] for remedy in found[-1:]] == [("--nodes 1", "--gpus 4")]
    assert found[-1].peak == 40 * 2**30
    assert [remedy.fits for remedy in found] == [False] * (len(found) - 1) + [True]
    assert [changed.world_size for changed in asked] == [2] * (len(found) - 1) + [4]
