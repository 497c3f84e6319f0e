"""Counted FLOPs of every kind of iteration against the least work the method needs.

    python -m benchmarks.flops --config configs/FLUX/flux_senseflow_tiny.yaml [--output FILE.md]

Each (turn, anchor, simulated or not) is run and counted apart by torch's FlopCounterMode, on the
real iteration with its real data. The least work is made of stand-alone counts of each network:
forwards F of student, teacher and fake score, 3 F for a trained one (and F / k for every k-th block
recomputed); on a plain turn k + 1 + 3 of them, on a generator turn k + 3 + (2 for ISG) +
(2 for DMD) + 3, k being the simulated steps, with one more for each guided forward of a teacher
under classifier-free guidance; one prompt encoding; one VAE encoding unless simulated. SenseFlow's
adversary, where omega is not 0: one decoding (with the way back on generator turns), DINOv2 of fake
(likewise), real and reference, and the heads. DMD2's: an encoder pass and the head on real and fake
with all gradients, on generator turns another on the fake with the gradient of its latent alone;
the real samples' own prompts and VAE encoding. A rollout (reward.weight): a forward of the student
at each of the K anchors, without gradient, and its end decoded and scored, before advantages are
known; then 3 F for each step that trains, that of the drawn anchor with the other losses. The
rewards' own gradient (reward.last_weight): there and back through them, and through the decoder
where no adversary's is there to share.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from senseflow.common.templates import markdown_table
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.data.sampler import Batch
from senseflow.distill.adversaries import BottleneckDiscriminator, VFMDiscriminator
from senseflow.distill.algorithm import draw_turn, train_iteration
from senseflow.distill.measures import Measures
from senseflow.distill.state import Distillation, batch_on_device, frozen, reflects
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run
from senseflow.engine.loop import Run
from senseflow.teachers.encoded import Conditioning


def count(work: Callable[[], object]) -> int:
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count_both_ways(work: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """FLOPs of a call and of its gradient with respect to x alone."""
    x = x.detach().requires_grad_(True)
    return count(lambda: work(x).sum().backward())


@dataclass(frozen=True)
class VFMPieces:
    """Stand-alone FLOPs of SenseFlow's adversary for one micro-batch."""

    decode: int
    decode_back: int
    dino: int
    dino_back: int
    heads: int  # real, fake and reference with all gradients: the heads' own step
    heads_judge: int  # fake and reference, gradient to the features of the fake alone
    text: int
    reference: bool

    def least(self, generator: bool, plays: bool) -> int:
        """Of one iteration; images are read, not decoded."""
        if not plays:
            return 0
        total = self.text + self.dino * (1 + self.reference) + self.heads
        if generator:
            return total + self.decode_back + self.dino_back + self.heads_judge
        return total + self.decode + self.dino


@dataclass(frozen=True)
class BottleneckPieces:
    """Stand-alone FLOPs of DMD2's adversary for one micro-batch."""

    real: int  # the real samples' latents and, drawn apart, their prompts
    loss: int  # real and fake, gradients of fake score and head
    judge: int  # fake, gradient of its latent alone

    def least(self, generator: bool, plays: bool) -> int:
        """Of one iteration."""
        return self.real + self.loss + (self.judge if generator else 0)


@dataclass(frozen=True)
class Pieces:
    """Stand-alone FLOPs of one micro-batch."""

    student: int
    teacher: int
    prompts: int
    encode: int
    adversary: VFMPieces | BottleneckPieces | None
    decode: int
    decode_back: int
    score: int  # images by all rewards
    score_back: int


def count_pieces(d: Distillation, batch: Batch) -> Pieces:
    """Count every network on its own."""
    num, shape = len(batch.prompts), d.adapter.latent_shape()
    x_t = torch.randn(num, *shape, device=d.device)
    t = torch.full((num,), 500.0, device=d.device)
    if batch.images is None:
        raise ValueError("the least work is counted on images: name a JSON in paths.dataset")
    batch = batch_on_device(d, batch)
    cond = d.adapter.encode_prompts(batch.prompts)
    with torch.no_grad():
        student = count(lambda: d.adapter.predict(d.generator.network, x_t, t, cond))
        teacher = count(lambda: d.adapter.predict_guided(d.teacher, x_t, t, cond, t / 500))
        prompts = count(lambda: d.adapter.encode_prompts(batch.prompts))
        encode = count(lambda: d.adapter.encode_images(batch.images))
    adversary = None
    if isinstance(d.discriminator, VFMDiscriminator):
        adversary = count_vfm(d, d.discriminator, batch, x_t)
    elif isinstance(d.discriminator, BottleneckDiscriminator):
        extra = prompts + encode if batch.other else encode
        adversary = count_bottleneck(d, d.discriminator, extra, x_t, t, cond)
    with torch.no_grad():
        images, decode = d.adapter.decode(x_t), count(lambda: d.adapter.decode(x_t))
    decode_back = count_both_ways(d.adapter.decode, x_t)
    scores = count_rewards(d, images, batch.prompts)
    return Pieces(student, teacher, prompts, encode, adversary, decode, decode_back, *scores)


def count_rewards(d: Distillation, images: Tensor, prompts: list[str]) -> tuple[int, int]:
    """All rewards without gradient; those that train by their own, with it."""
    if not d.rewards:
        return 0, 0
    rewards = d.rewards
    with torch.no_grad():
        there = count(lambda: rewards.score(images, prompts))
    if d.config.reward.last_weight == 0:
        return there, 0
    return there, count_both_ways(lambda x: rewards.loss(x, prompts), images)


def count_vfm(d: Distillation, adversary: VFMDiscriminator, batch: Batch, x_t: Tensor) -> VFMPieces:
    """Decoder, DINOv2, CLIP and heads."""
    backbone, heads, images = adversary.backbone, adversary.heads.network, batch.images
    with torch.no_grad():
        decode = count(lambda: d.adapter.decode(x_t))
        dino = count(lambda: backbone(images))
        features = backbone(images)
        text = count(lambda: adversary.prompt_encoder(batch.prompts))
        words = adversary.prompt_encoder(batch.prompts).to(d.device)
    has_reference = d.config.adversarial.reference != "none"
    reference = features if has_reference else None
    twice = [torch.cat([f, f]) for f in features]
    own = count(lambda: heads(twice, words, reference).sum().backward())
    heads.zero_grad()
    leaves = [f.detach().requires_grad_(True) for f in features]
    with frozen(heads):
        judge = count(lambda: heads(leaves, words, reference).sum().backward())
    dino_back = count_both_ways(lambda x: torch.cat([f.flatten(1) for f in backbone(x)], 1), images)
    decode_back = count_both_ways(d.adapter.decode, x_t)
    return VFMPieces(decode, decode_back, dino, dino_back, own, judge, text, has_reference)


def count_bottleneck(
    d: Distillation,
    adversary: BottleneckDiscriminator,
    real: int,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
) -> BottleneckPieces:
    """Encoder pass and head."""
    network, head = d.fake_score.network, adversary.heads.network

    def logits(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return head(adversary.adapter.bottleneck(network, x, t, cond))

    both = torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(cond)
    loss = count(lambda: logits(*both).sum().backward())
    for trained in (network, head):
        trained.zero_grad()
    with frozen(network, head):
        judge = count_both_ways(lambda x: logits(x, t, cond), x_t)
    return BottleneckPieces(real, loss, judge)


def least_work(d: Distillation, p: Pieces, iteration: int) -> int:
    """METHOD's minimum of one iteration."""
    turn, config = draw_turn(d, iteration), d.config
    k = turn.anchor if turn.simulate else 0
    if turn.transitions:
        k = len(turn.anchors)
    full = config.parallel.recomputation == "full"  # else no counted work is done twice
    every = config.parallel.activation_checkpointing if full else 0
    trained = 3 + (1 / every if every else 0)
    total = p.prompts + k * p.student + trained * p.student  # simulation; the fake score's step
    total += p.encode * (turn.anchor > 0 and not turn.simulate)
    if turn.generator:
        total += trained * p.student
        total += (p.teacher + p.student) * ((config.isg.weight > 0) + (config.dmd.weight > 0))
        total += trained * p.student * len([s for s in turn.transitions if s != turn.anchor])
        total += (p.decode + p.score) * bool(turn.transitions)
    else:
        total += p.student
    if turn.generator and reflects(d, turn):
        decoded = isinstance(p.adversary, VFMPieces) and turn.adversarial
        total += p.score_back + (0 if decoded else p.decode_back)
    if p.adversary:
        total += p.adversary.least(turn.generator, turn.adversarial)
    return total


def table(run: Run, pieces: Pieces | None = None) -> list[tuple[str, int, int]]:
    """(kind of iteration, counted, least) for every kind; pieces are counted if not given."""
    d = run.parts
    batch = next(run.data(1))[0]
    pieces = pieces or count_pieces(d, batch)
    rows = {}
    for iteration in range(1, 200):
        turn = draw_turn(d, iteration)
        how = "simulated" if turn.simulate else "from data"
        kind = f"{'generator' if turn.generator else 'plain'} turn, anchor {turn.anchor}, {how}"
        if len(turn.anchors) < len(d.anchors):
            kind += f", {len(turn.anchors)} steps"
        if kind not in rows:
            counted = count(lambda i=iteration: train_iteration(d, [batch], i, Measures()))
            rows[kind] = (kind, counted, least_work(d, pieces, iteration))
    return [rows[kind] for kind in sorted(rows)]


def as_markdown(rows: list[tuple[str, int, int]]) -> str:
    """The table, with the worst ratio below it."""
    heads = ["iteration", "counted GFLOP", "least GFLOP", "ratio"]
    cells = [[k, f"{c / 1e9:.3f}", f"{m / 1e9:.3f}", f"{c / m:.3f}"] for k, c, m in rows]
    worst = max(c / m for _, c, m in rows)
    return f"{markdown_table(heads, cells)}\nWorst ratio: {worst:.3f}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML of a recipe")
    parser.add_argument("--output", type=Path, help="markdown file to write the table to")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.config, args.overrides)
        run = prepare(read_run(config, RECIPES[config.recipe].family), Path(folder))
        text = as_markdown(table(run))
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
