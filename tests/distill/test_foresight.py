"""Draws made by a thread are those that would be made when they are asked for."""

import gc
import threading
from dataclasses import replace

import torch
from toy import toy_batch, toy_config, toy_distillation

from senseflow.core.draws import Draws
from senseflow.distill.algorithm import train_iteration
from senseflow.distill.foresight import Foresight
from senseflow.distill.measures import Measures

CPU = torch.device("cpu")


def ask(draws: Draws) -> list[torch.Tensor]:
    return [draws.normal("eps", (3, 2)), draws.uniform("t"), draws.normal("eps 2", (5,))]


def test_what_a_kind_asked_for_is_made_for_its_next_turn():
    foresight, first, next_ = Foresight(CPU), Draws(0, 1, (4, 5)), Draws(0, 2, (4, 5))
    ask(foresight.draws("kind", first))
    foresight.prepare("kind", 1, [next_])
    foresight.prepare("another", 1, [other := Draws(0, 2, (6, 7))])
    foreseen = foresight.draws("kind", next_)
    made = {stream.purpose: future.result() for stream, future in foreseen.coming.items()}
    assert [*made] == ["eps", "t", "eps 2"] and not foresight.draws("another", other).coming
    got, expected = ask(foreseen), ask(next_)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(a is b for a, b in zip(got, made.values(), strict=True)) and not foreseen.coming


def test_what_was_not_foreseen_is_drawn_and_what_was_not_asked_for_let_go():
    foresight = Foresight(CPU)
    ask(foresight.draws("kind", Draws(0, 1, (0,))))
    foresight.prepare("kind", 1, [Draws(0, 2, (0,))])  # which never comes
    foresight.prepare("kind", 3, [Draws(0, 4, (0,))])
    assert [*foresight.coming] == [Draws(0, 4, (0,))]
    unseen = Draws(0, 9, (0,))
    got = foresight.draws("kind", unseen).normal("new", (2,))
    assert torch.equal(got, unseen.normal("new", (2,)))


def test_iterations_are_the_same_with_and_without_foresight():
    """Every turn of ttur 2 and of all anchors, some of which are foreseen and some not."""

    def losses(foresight: Foresight | None) -> list[dict[str, torch.Tensor]]:
        config = toy_config(train=dict(iter_num=12))
        d, measures = replace(toy_distillation(config), foresight=foresight), []
        for iteration in range(1, 13):
            measures.append(Measures())
            train_iteration(d, [toy_batch(2), toy_batch(2, first=2)], iteration, measures[-1])
        return [m.sums for m in measures]

    foresight = Foresight(CPU)
    for one, other in zip(losses(None), losses(foresight), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert not foresight.coming  # none is drawn for an iteration after the last


def test_the_thread_ends_with_the_run():
    foresight = Foresight(CPU)
    ask(foresight.draws("kind", Draws(0, 1, (0,))))
    foresight.prepare("kind", 1, [Draws(0, 2, (0,))])
    (thread,) = (t for t in threading.enumerate() if t.name.startswith("draws"))
    del foresight
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
