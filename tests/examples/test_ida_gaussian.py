"""The closed forms of examples/ida_gaussian.py, and what it shows."""

import math

import pytest

from examples.ida_gaussian import LAM, TAU, TIMES, TTUR, distil, fake_gradient, gain, variance_of

OPTIMUM = math.log(2.0402)  # of the student: its samples then have the teacher's variance


def test_where_student_and_fake_score_belong():
    alpha = 1 - TAU
    s2 = TAU**2 / (math.sqrt(alpha**2 + TAU**2) * alpha - alpha**2)  # gain 1 / sqrt(a^2 + sigma^2)
    assert math.log(s2) / 2 == pytest.approx(OPTIMUM, abs=1e-4)
    assert variance_of(OPTIMUM) == pytest.approx(1, abs=1e-4)
    for variance in (0.3, 1.0, 2.5):
        assert fake_gradient(math.log(variance) / 2, variance) == pytest.approx(0, abs=1e-12)


def test_the_gradient_of_the_fake_score_is_its_losss():
    def loss(phi: float) -> float:
        """E (v_hat - v)^2 = E (x_0_hat - x_0)^2 / sigma^2 over samples of variance 1.7."""
        total = 0.0
        for t in TIMES:
            k, alpha = gain(phi, t)[0], 1 - t
            total += (k**2 * (alpha**2 * 1.7 + t**2) - 2 * k * alpha * 1.7 + 1.7) / t**2
        return total / len(TIMES)

    numeric = (loss(0.3 + 1e-5) - loss(0.3 - 1e-5)) / 2e-5
    assert fake_gradient(0.3, 1.7) == pytest.approx(numeric, rel=1e-6)


def test_ida_leaves_a_bias_where_the_rates_decay():
    lr, iterations = 0.01, 5000
    kl, apart, *_ = distil(None, lr, 0.0, 1.0, iterations)
    assert kl < 1e-3 and apart == pytest.approx(OPTIMUM, abs=0.02)
    kl, *_ = distil(LAM, lr, 1.0, 0.0, iterations)
    assert kl < 1e-3
    kl, apart, *_ = distil(LAM, lr, 0.0, 1.0, iterations)
    assert kl > 0.1 and apart < OPTIMUM - 0.5
    kl, *_ = distil(LAM, lr, 0.0, 0.5, iterations, throughout=False)
    assert kl < 1e-3
    kl, apart, *_ = distil(LAM, 0.1 * lr, 1.0, 0.0, iterations)
    assert kl > 0.1 and apart <= TTUR * 0.1 * lr / (1 - LAM)
