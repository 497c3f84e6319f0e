"""Rewards of a plan: the published networks without their files, against arithmetic.

The rehearsal takes a process group of its own, so it runs in a process of its own.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from metric_parts import save_clip_model, save_open_clip
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from senseflow.common.ranks import start_ranks
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.distill.rewards import RewardError, Rewards, Scorer
from senseflow.distill.scorers.specs import SCORERS
from senseflow.plan.blank import BlankRewards, blank_rewards
from senseflow.plan.fakes import Loading, fake_whole
from senseflow.plan.memo import Memo
from senseflow.plan.plan import Wanted, configure
from senseflow.plan.rehearsal import Kind, rehearse
from senseflow.plan.scorer_files import WRITERS, stand_in_files
from senseflow.plan.tracker import PARAMETERS, Tracker

FILE = Path("configs/FLUX/flux_dancegrpo_tiny.yaml")
OPENAI = ("clip_model=ViT-L-14", "clip_quick_gelu=true", "clip_weights=/nowhere/clip.bin")
FILES = {
    "hps_v2.1": ("hps_v2.1=/nowhere/HPS_v2.1_compressed.pt",),
    "hps_v2": ("hps_v2=/nowhere/HPS_v2_compressed.pt",),
    "pick_score": ("pick_score=/nowhere/PickScore_v1", "pick_processor=/nowhere/CLIP-ViT-H-14"),
    "clip": OPENAI,
    "image_reward": ("image_reward=/nowhere/ImageReward", "image_reward_tokenizer=/nowhere/bert"),
    "aesthetic": ("aesthetic=/nowhere/sac.pth", "aesthetic_clip=/nowhere/ViT-L-14.pt"),
}


def weights(width: int, depth: int, mlp: int = 4) -> int:
    """Of a transformer's blocks: attention, two layers of MLP and two norms."""
    return depth * ((4 + 2 * mlp) * width**2 + (9 + mlp) * width)


def clip_weights(vision: int, depth: int, text: int, text_depth: int, width: int) -> int:
    """Of a CLIP with patches of 14 at 224 pixels; 256 patches and a class token."""
    seen = weights(vision, depth) + (3 * 14**2 + 1 + 257 + 4 + width) * vision
    read = weights(text, text_depth) + (49408 + 77 + 2 + width) * text
    return seen + read + 1  # the logit scale


def flops(tokens: int, width: int, depth: int) -> int:
    """Of a transformer's blocks: the layers' products, and attention's two."""
    return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)


def head(width: int) -> list[int]:
    """The layers' products."""
    widths = (width, 1024, 128, 64, 16, 1)
    return [a * b for a, b in pairwise(widths)]


VIT_H = clip_weights(1280, 32, 1024, 24, 1024)
VIT_L = clip_weights(1024, 24, 768, 12, 768)
HEAD = sum(head(768)) + 1024 + 128 + 64 + 16 + 1
# Keys and values of the cross-attention read the image; a third norm is in each layer.
BLIP = weights(1024, 24) + (3 * 16**2 + 1 + 197 + 1 + 2) * 1024
BLIP += weights(768, 12) + 12 * (2 * 768**2 + 2 * 1024 * 768 + (4 + 2) * 768)
BLIP += (30524 + 512 + 2) * 768 + HEAD
CLIP_H_FLOPS = flops(257, 1280, 32) + flops(77, 1024, 24) + 2 * 256 * 588 * 1280
CLIP_H_FLOPS += 2 * (1280 + 1024) * 1024  # into the space of both
CLIP_L_FLOPS = flops(257, 1024, 24) + 2 * 256 * 588 * 1024 + 2 * 1024 * 768
PUBLISHED = {  # weights, bytes in bfloat16 with buffers, FLOPs of one image
    "hps_v2.1": (VIT_H, 2 * VIT_H + 2 * 77**2, CLIP_H_FLOPS),
    "hps_v2": (VIT_H, 2 * VIT_H + 2 * 77**2, CLIP_H_FLOPS),
    "pick_score": (  # its scale is in float32
        VIT_H,
        2 * VIT_H + 2 + 8 * (77 + 257),
        CLIP_H_FLOPS,
    ),
    "clip": (VIT_L, 2 * VIT_L + 2 * 77**2, CLIP_L_FLOPS + flops(77, 768, 12) + 2 * 768**2),
    "image_reward": (
        BLIP,
        2 * BLIP + 8 * 512,
        flops(196 + 1, 1024, 24) + 2 * 196 * 768 * 1024
        + flops(35, 768, 12) + 12 * (4 * 35 * 768**2 + 4 * 197 * 1024 * 768 + 4 * 35 * 197 * 768)
        + 2 * sum(head(768)),
    ),
    "aesthetic": (  # the head is in float32; the text is not read
        VIT_L + HEAD,
        2 * VIT_L + 4 * HEAD + 2 * 77**2,
        CLIP_L_FLOPS + 2 * sum(head(768)),
    ),
}  # fmt: skip


def config_of(models: tuple[str, ...], files: tuple[str, ...]) -> Config:
    config = load_config(FILE, ["precision.compute=bfloat16", "reward.last_weight=1"])
    reward = replace(config.reward, models=models, files=files, weights=())
    return replace(config, reward=reward)


def opened(config: Config) -> tuple[Rewards, FakeTensorMode, Memo]:
    mode, memo = FakeTensorMode(allow_non_fake_inputs=True), Memo()
    with mode, Loading(memo) as loading:
        rewards = loading.unwritten(blank_rewards)(config, start_ranks())
    assert rewards
    fake_whole([scorer.network for scorer in rewards.scorers if scorer.network], mode)
    return rewards, mode, memo


def scored(rewards: Rewards, mode: FakeTensorMode, memo: Memo, gradient: bool) -> Tracker:
    tracker = Tracker(memo)
    with mode, tracker, torch.set_grad_enabled(gradient):
        images = torch.empty(1, 3, 64, 64, requires_grad=gradient)
        scores = rewards.score(images, ["a"])
        rewards.require_finite(scores, rewards.scorers)
        assert scores.shape == (1, 1) and scores.requires_grad == gradient
    return tracker


def sizes_of(network: nn.Module) -> tuple[int, int]:
    """Weights, and bytes of weights and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(p.numel() for p in network.parameters()), sum(t.nbytes for t in tensors)


def test_the_sums_are_the_published_ones():
    """986.11 M of open_clip's ViT-H-14 and 427.62 M of ViT-L-14, by open_clip's own table."""
    assert (round(VIT_H / 1e6, 2), round(VIT_L / 1e6, 2)) == (986.11, 427.62)


def test_every_file_of_every_scorer_can_be_made_up():
    paths = {flag for spec in SCORERS for flag in spec.flags if flag.kind in ("file", "folder")}
    assert paths == WRITERS.keys() and FILES.keys() == {spec.name for spec in SCORERS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scorer_holds_and_computes_what_arithmetic_says(name, tmp_path):
    files = stand_in_files(FILES[name], tmp_path / "rewards")
    rewards, mode, memo = opened(config_of((name,), files))
    on_disk = sum(512 * file.stat().st_blocks for file in tmp_path.rglob("*"))
    num, size, work = PUBLISHED[name]
    assert sizes_of(rewards.scorers[0].network) == (num, size) and on_disk < 2**24
    for gradient in (False, True):  # without one, attention is one operation
        tracker = scored(rewards, mode, memo, gradient)
        assert sum(cost.flops for cost in tracker.phases.values()) == work


def test_files_that_are_there_are_used_as_they_are(tmp_path):
    """Weights that torch.load reads, and a folder; nothing is asked of their numbers."""
    pick, (model, weights) = save_clip_model(tmp_path / "pick"), save_open_clip(tmp_path / "clip")
    files = (f"pick_score={pick}", f"clip_weights={weights}", f"clip_model={model}")
    assert stand_in_files(files, tmp_path / "rewards") == files
    for name, words in (("pick_score", files[:1]), ("clip", files[1:])):
        rewards, mode, memo = opened(config_of((name,), words))
        scored(rewards, mode, memo, gradient=True)
        assert sizes_of(rewards.scorers[0].network)[0] < 2**21


@pytest.mark.parametrize(
    ("models", "files", "said"),
    [
        (("hps_v2.1",), ("hps_v2.1=/nowhere/h.pt", "hps_model=ViT-Q"), "--hps_model ViT-Q is neit"),
        (("hps_v2.1",), (), "hps_v2.1 needs hps_v2.1=FILE in reward.files"),
        (("hps_v3",), (), "hps_v3 is neither module:function nor one of clip, hps_v2.1"),
        (("hps_v2.1",), ("hps_v2.1",), "'hps_v2.1' is not of the form name=value"),
    ],
)
def test_what_a_run_refuses_a_plan_refuses(models, files, said, tmp_path):
    with pytest.raises(ValueError) as refused:
        opened(config_of(models, stand_in_files(files, tmp_path)))
    assert said in str(refused.value)


def test_a_reward_that_cannot_be_traced_is_no_free_one():
    ranks, images = start_ranks(), torch.zeros(2, 3, 4, 4)

    def asks(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise RuntimeError("of a number")

    rewards = BlankRewards([Scorer("odd", 1.0, asks, True)], ranks)
    with pytest.raises(RewardError, match="reward odd raised RuntimeError"):
        rewards.over_ranks(rewards.score(images, ["a", "b"]), [0, 1], 2)


def work(_: int, folder: Path) -> None:
    """A generator's turn at the last anchor of two ranks, two samples on each: of HPSv2.1 with
    PickScore beside it and a function of nobody's, and of the function alone."""
    torch.set_num_threads(1)
    sizes = ("train.batch_size=4", "train.grad_accumulation=1", "reward.group_size=2",
             "adversarial.kind=none", "precision.compute=bfloat16", "reward.last_weight=1",
             "paths.initial=null")  # fmt: skip
    both = ("reward.models=[hps_v2.1, pick_score, nobody:knows]", "reward.weights=[1, 0, 1]",
            "reward.files=[hps_v2.1=/nowhere/h.pt, pick_score=/nowhere/p]")  # fmt: skip
    alone = ("reward.models=[nobody:knows]", "reward.weights=[]", "reward.files=[]")
    recipe, facts = RECIPES["flux_dancegrpo"], {}
    for name, own in (("both", both), ("alone", alone)):
        (folder / name).mkdir()
        config, _ = configure(recipe, Wanted(FILE, (*sizes, *own), 1, 2), folder / name)
        with rehearse(config, recipe.family, 2, "images") as rehearsal:
            networks = {k: vars(v) for k, v in rehearsal.hold().items()}
            turn = Kind(True, 3, True, 4)
            phases = {k: vars(v) for k, v in rehearsal.iterate(turn).items()}
        facts[name] = {"networks": networks, "phases": phases}
    (folder / "facts.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    mp.spawn(work, (folder,))
    return json.loads((folder / "facts.json").read_text())


def test_a_plan_has_a_row_of_each_reward_whole_on_every_rank(facts):
    both, alone = (facts[name]["networks"] for name in ("both", "alone"))
    assert both.keys() - alone.keys() == {"reward/hps_v2.1", "reward/pick_score"}
    for name in ("hps_v2.1", "pick_score"):
        held, (num, size, _) = both[f"reward/{name}"], PUBLISHED[name]
        assert held["numel"] == num and sum(held["parameters"].values()) == size
        assert held["gradients"] == held["states"] == 0


def test_rewards_are_counted_where_they_are_asked(facts):
    """Both of each sample of the rollout; that of weight 0 not again where its gradient would be
    asked for, whose way back is a forward's cost but for the weights' and the text's."""
    both, alone = (facts[name]["phases"] for name in ("both", "alone"))
    asked = {"reward": (2, 2), "generator": (2, 0)}
    for phase, times in asked.items():
        done = both[phase]["work"]
        for name, often in zip(("hps_v2.1", "pick_score"), times, strict=True):
            assert done.get(f"reward/{name}", 0) == often * CLIP_H_FLOPS
    back = "backward, generator"
    added = both["generator"]["work"][back] - alone["generator"]["work"][back]
    vision = flops(257, 1280, 32) + 2 * 256 * 588 * 1280 + 2 * 1280 * 1024
    assert vision <= added / 2 < 1.05 * vision  # attention's backward is more than its forward
    held = sum(PUBLISHED[name][1] for name in ("hps_v2.1", "pick_score"))
    for phase in ("reward", "generator"):
        assert both[phase]["parts"][PARAMETERS] - alone[phase]["parts"][PARAMETERS] == held
    assert both["generator"]["peak"] - alone["generator"]["peak"] > held
