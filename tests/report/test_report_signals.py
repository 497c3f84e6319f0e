"""The warning signals on made-up curves: each rule triggers where it should and nowhere else."""

import math

import numpy as np
import pytest

from senseflow.report.signals import (
    MIN_ROWS,
    RULES,
    Curve,
    Facts,
    curves_of,
    find_signals,
    quarters_of,
)

N = 40
T = np.linspace(0, 1, N)
FACTS = Facts(max_grad_norm=1.0, ida=True, adversary="vfm")


def noisy(values, share=0.05, seed=0):
    """Multiplied by noise of that share."""
    return np.asarray(values) * (1 + share * np.random.default_rng(seed).standard_normal(N))


def curve(values) -> Curve:
    return Curve(10.0 * np.arange(1, len(values) + 1), np.asarray(values, dtype=np.float64))


def healthy() -> dict[str, Curve]:
    """As a run of the demo: losses rise and level out or fall, the gap saturates, drift wobbles."""
    flat, noise = np.ones(N), np.random.default_rng(1).standard_normal((3, N))
    return {
        "loss/dmd": curve(noisy(0.2 + 0.6 * (1 - np.exp(-6 * T)), 0.2)),
        "loss/fake": curve(noisy(0.5 + 6 * np.exp(-8 * T), 0.1, 2)),
        "loss/isg": curve(noisy(0.1 * flat, 0.4, 3)),
        "loss/adv": curve(0.02 * noise[0]),
        "loss/discriminator": curve(noisy(0.3 * flat, 0.5, 4)),
        "grad_norm/generator": curve(noisy(4 * flat, 0.4, 5)),
        "grad_norm/fake_score": curve(noisy(1 + 16 * np.exp(-6 * T), 0.1, 6)),
        "grad_norm/discriminator": curve(noisy(0.05 * flat, 0.4, 7)),
        "ida/gap": curve(noisy(0.06 * (1 - np.exp(-5 * T)) + 0.005, 0.03, 8)),
        "discriminator/margin": curve(noisy(0.03 * flat, 0.3, 9)),
        "drift/mean": curve(0.02 * noise[1]),
        "drift/contrast": curve(-0.06 * np.exp(-4 * T) + 0.01 * noise[2]),
        "drift/saturation": curve(0.03 + 0.01 * noise[0]),
        "lr/generator": curve(np.linspace(1e-4, 1e-5, N)),
        "time_s/iteration": curve(noisy(flat, 0.5, 10)),
        "mem_gib": curve(np.minimum(60 + 100 * T, 70)),
    }


def triggered(facts: Facts = FACTS, **changes) -> set[tuple[str, str]]:
    """(rule, curve) of the healthy run with some curves replaced; "__" stands for "/"."""
    curves = healthy() | {name.replace("__", "/"): curve(v) for name, v in changes.items()}
    return {(signal.rule, signal.curve) for signal in find_signals(curves, facts)}


def test_a_healthy_run_is_left_alone():
    assert find_signals(healthy(), FACTS) == []


def test_no_rows_and_few_rows_are_left_alone():
    assert find_signals({}, FACTS) == []
    few = {name: Curve(c.iterations[:2], c.values[:2]) for name, c in healthy().items()}
    assert find_signals(few, FACTS) == []
    steps = np.repeat([1.0, 2.0, 4.0, 8.0], 3)  # no trend is clearer, in 12 rows
    short = {"loss/fake": curve(steps), "ida/gap": curve(steps / 100)}
    assert find_signals(short, FACTS) == [] and quarters_of(curve(steps)) is None
    assert quarters_of(curve(np.repeat(steps, 2))) is not None and MIN_ROWS == 16


def test_random_walks_and_noise_rarely_trigger():
    """Of 200 runs of noise around constants none is warned of."""
    for seed in range(200):
        changes = {
            name: noisy(level * np.ones(N), 0.5, seed + 1000 * k)
            for k, (name, level) in enumerate(
                {"loss__dmd": 0.5, "loss__fake": 1, "ida__gap": 0.05, "drift__mean": 0.04}.items()
            )
        }
        assert triggered(**changes) == set(), seed


BAD = {
    "NaN": (dict(loss__isg=[1, 1.1] * 19 + [math.nan, 1]), "non-finite values", "loss/isg"),
    "infinite": (dict(ida__gap=[0.1] * 39 + [math.inf]), "non-finite values", "ida/gap"),
    "skipped": (dict(skipped__generator=[1.0, 3.0]), "skipped steps", "skipped/generator"),
    "stopped": (dict(skipped__stops=[1.0] * 3), "skipped steps", "skipped/stops"),
    "linear growth": (dict(loss__dmd=noisy(0.1 + 5 * T**2)), "growing loss", "loss/dmd"),
    "exponential": (dict(loss__fake=noisy(0.1 * np.exp(6 * T))), "growing loss", "loss/fake"),
    "blown up at the end": (
        dict(loss__isg=[*noisy(np.ones(N))[:37], 20, 200, 2000]), "growing loss", "loss/isg",
    ),
    "no gradient": (
        dict(grad_norm__discriminator=[0.1] * 37 + [0.0] * 3),
        "no gradient", "grad_norm/discriminator",
    ),
    "vanished": (
        dict(grad_norm__generator=noisy(10 ** (-6 * T))), "no gradient", "grad_norm/generator",
    ),
    "clipped": (
        dict(grad_norm__fake_score=noisy(500 * np.ones(N))),
        "always clipped", "grad_norm/fake_score",
    ),
    "gap grows": (dict(ida__gap=noisy(0.001 + 0.1 * T, 0.03)), "IDA gap", "ida/gap"),
    "gap is large": (dict(ida__gap=noisy(0.8 * np.ones(N), 0.02)), "IDA gap", "ida/gap"),
    "heads have won": (
        dict(discriminator__margin=noisy(8 * np.minimum(1, 2 * T))),
        "discriminator margin", "discriminator/margin",
    ),
    "heads are blind": (
        dict(discriminator__margin=noisy(1e-5 * np.ones(N), 1)),
        "discriminator margin", "discriminator/margin",
    ),
    "darker and darker": (dict(drift__mean=noisy(-0.2 * T, 0.2)), "image drift", "drift/mean"),
    "more and more saturated": (
        dict(drift__saturation=noisy(0.03 + 0.15 * T)), "image drift", "drift/saturation",
    ),
    "grey": (dict(drift__contrast=noisy(-0.3 * np.ones(N))), "image drift", "drift/contrast"),
    "fake score left behind": (
        dict(loss__fake=noisy(1 + 2 * T), loss__dmd=noisy(1.5 - 1.2 * T)),
        "fake score left behind", "loss/fake",
    ),
    "a held-out reward falls": (
        dict(reward__hps=noisy(1 + T, 0.02), reward__held_out=noisy(2 - T, 0.02, 1)),
        "falling reward", "reward/held_out",
    ),
    "images of one prompt become alike": (
        dict(grpo__diversity=noisy(0.2 - 0.1 * T, 0.02)), "images alike", "grpo/diversity",
    ),
    "learning rate 0": (
        dict(lr__generator=np.maximum(0, 1e-4 * (1 - 2 * T))), "standstill", "lr/generator",
    ),
    "same number": (dict(loss__dmd=[0.3, 0.4] * 10 + [0.25] * 20), "standstill", "loss/dmd"),
    "memory": (dict(mem_gib=40 + 30 * T), "growing memory", "mem_gib"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_rule_finds_its_own(case):
    changes, rule, name = BAD[case]
    assert triggered(**changes) == {(rule, name)}


GOOD = {
    "rises and levels out": dict(loss__dmd=noisy(0.1 + 2 * (1 - np.exp(-5 * T)))),
    "doubles and goes on": dict(loss__dmd=noisy(0.5 + 0.6 * T)),
    "one wild row": dict(loss__fake=[1.0, 1.1] * 19 + [90.0, 1.0]),
    "a zero gradient once": dict(grad_norm__generator=[0.9] * 38 + [0.0, 0.9]),
    "gradients ten times the limit": dict(grad_norm__generator=noisy(10 * np.ones(N))),
    "clipped but at times": dict(grad_norm__generator=[500, 500, 500, 0.5] * 10),
    "a gap as of a random walk": dict(ida__gap=noisy(0.1 * T**0.5, 0.02)),
    "rewards that fall together": dict(
        reward__hps=noisy(2 - T, 0.02), reward__b=noisy(2 - T, 0.02)
    ),
    "a reward that does not move": dict(
        reward__hps=noisy(1 + T, 0.02), reward__b=noisy(T**0, 0.02)
    ),
    "a reward that fell at first": dict(
        reward__hps=noisy(1 + T, 0.02), reward__b=noisy(2 - np.minimum(4 * T, 1), 0.001)
    ),
    "diversity that falls a little": dict(grpo__diversity=noisy(0.2 - 0.015 * T, 0.02)),
    "diversity that comes back": dict(grpo__diversity=noisy(0.1 + 0.4 * (T - 0.5) ** 2, 0.02)),
    "a margin at the hinge": dict(discriminator__margin=noisy(2 * np.ones(N))),
    "drift that comes back": dict(drift__mean=noisy(0.3 * np.exp(-4 * T))),
    "an offset of the guided teacher": dict(drift__saturation=noisy(0.12 * np.ones(N))),
    "drift nobody sees": dict(drift__mean=noisy(0.03 * T)),
    "both grow": dict(loss__fake=noisy(1 + T), loss__dmd=noisy(0.5 + 0.5 * T)),
    "a rate of 0 at the very end": dict(lr__generator=np.linspace(1e-4, 0, N)),
    "memory by a hair": dict(mem_gib=40 + T),
    "memory settles": dict(mem_gib=np.minimum(40 + 90 * T, 60)),
}


@pytest.mark.parametrize("case", GOOD)
def test_none_cries_wolf(case):
    assert triggered(**GOOD[case]) == set()


def test_dmd2s_logistic_margin_may_be_larger():
    change = dict(discriminator__margin=noisy(8 * np.ones(N)))
    logistic = Facts(1.0, True, "bottleneck")
    assert triggered(logistic, **change) == set()
    change = dict(discriminator__margin=noisy(20 * np.ones(N)))
    assert triggered(logistic, **change) == {("discriminator margin", "discriminator/margin")}


def test_a_step_is_looked_for_at_resumes_alone():
    """Iteration 210 is the first row after the resume."""
    step = dict(loss__fake=noisy(np.where(np.arange(N) < 20, 1.0, 2.0)))
    assert triggered(**step) == set()
    resumed = Facts(1.0, True, "vfm", resumed=(210,))
    assert triggered(resumed, **step) == {("step at a resume", "loss/fake")}
    assert triggered(resumed) == set()
    assert triggered(Facts(1.0, True, "vfm", resumed=(110,)), **step) == set()
    assert triggered(Facts(1.0, True, "vfm", resumed=(390,)), **step) == set()  # 2 rows after it
    step["loss__fake"][17] = 5.0  # such values were there before
    assert triggered(resumed, **step) == set()


def test_without_ida_the_words_say_so():
    curves = {"ida/gap": curve(noisy(0.001 + 0.1 * T, 0.03))}
    (with_ida,), (without,) = (find_signals(curves, Facts(1.0, ida)) for ida in (True, False))
    assert "IDA is off" in without.words and "IDA is off" not in with_ida.words


def test_curves_of_rows_with_gaps():
    rows = [
        {"iteration": 10, "a": 1.0},
        {"iteration": 20, "a": 2.0, "b": 5.0},
        {"iteration": 30, "b": 6.0},
    ]
    curves = curves_of(rows)
    assert list(curves) == ["a", "b"]
    assert curves["a"].iterations.tolist() == [10, 20] and curves["a"].values.tolist() == [1, 2]
    assert curves["b"].iterations.tolist() == [20, 30] and curves["b"].values.tolist() == [5, 6]


def test_quarters_are_medians_with_their_errors():
    """Four constants; then Gaussian noise, whose median's error is sqrt(pi / 2) sigma / sqrt(n)."""
    q = quarters_of(curve([1] * 5 + [2] * 5 + [4] * 5 + [8] * 5))
    assert q and q.medians == (1, 2, 4, 8) and q.errors == (0, 0, 0, 0)
    noise = np.random.default_rng(0).standard_normal(40_000)
    q = quarters_of(curve(noise))
    assert q and q.errors == pytest.approx([(math.pi / 2) ** 0.5 / 100] * 4, rel=0.05)


def test_every_rule_says_what_it_looks_for():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert {rule for _, rule, _ in BAD.values()} | {"step at a resume"} == set(names)
    assert all(rule.meaning.endswith(".") for rule in RULES)
