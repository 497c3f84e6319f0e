"""IDA beside learning rates that decay, in closed form: one dimension, one Gaussian.

Teacher, student and fake score are the exact denoiser of N(0, s^2), each with its own s; the
teacher's is 1, and data are drawn from it. The student denoises x_tau in one step. What it gives is
a Gaussian too, narrower than its own s, so that the s with which it matches the teacher (2.04) is
not the s of its samples (1): as at full size, theta is not where phi belongs. Every expectation is
exact, so nothing here is noise. Needs no torch:

    python examples/ida_gaussian.py
"""

import argparse
import math
from dataclasses import dataclass

from senseflow.common.commands import number
from senseflow.common.fields import Count, Fraction

TAU = 0.75  # sigma of the student's input, on the flow path: alpha = 1 - sigma
TIMES = [(i + 0.5) / 16 for i in range(16)]  # of L_DMD and L_fake, uniform
LAM = 0.97
TTUR = 5


@dataclass
class Adam:
    """One parameter, the log of s."""

    lr: float
    value: float = 0.0
    first: float = 0.0
    second: float = 0.0
    steps: int = 0

    def step(self, gradient: float, factor: float) -> None:
        """A step at `factor` of the learning rate."""
        self.steps += 1
        self.first += 0.1 * (gradient - self.first)
        self.second += 0.001 * (gradient**2 - self.second)
        mean = self.first / (1 - 0.9**self.steps)
        root = math.sqrt(self.second / (1 - 0.999**self.steps))
        self.value -= self.lr * factor * mean / (root + 1e-8)


def gain(log_s: float, sigma: float) -> tuple[float, float]:
    """What a denoiser multiplies x_t by to get x_0, and the derivative by log s."""
    alpha, variance = 1 - sigma, math.exp(2 * log_s)
    total = alpha**2 * variance + sigma**2
    return alpha * variance / total, 2 * alpha * variance * sigma**2 / total**2


def variance_of(log_s: float) -> float:
    """Of the student's samples, from x_tau of variance alpha^2 + sigma^2."""
    return gain(log_s, TAU)[0] ** 2 * ((1 - TAU) ** 2 + TAU**2)


def dmd_gradient(theta: float, phi: float) -> float:
    """Of the KL divergence's DMD form by theta: E (x_0_fake - x_0_real)(x_t) dx / dtheta."""
    k, slope = gain(theta, TAU)
    apart = sum((1 - t) * (gain(phi, t)[0] - gain(0.0, t)[0]) for t in TIMES)
    return apart / len(TIMES) * slope / k * variance_of(theta)


def fake_gradient(phi: float, variance: float) -> float:
    """Of L_fake, the velocity's mean square error on samples of this variance, by phi."""
    total = 0.0
    for t in TIMES:
        k, slope = gain(phi, t)
        total += 2 / t**2 * (k * ((1 - t) ** 2 * variance + t**2) - (1 - t) * variance) * slope
    return total / len(TIMES)


def distil(
    lam: float | None, lr: float, end: float, decay: float, iterations: int, throughout: bool = True
) -> list[float]:
    """KL(student || teacher), |phi - theta| and the s of student and fake score at the end.

    decay: the last share of the run, over which both rates go to `end` of themselves, as with
    `lr_scheduler`. throughout: IDA in the decay too.
    """
    theta, phi = Adam(lr), Adam(lr)
    for iteration in range(1, iterations + 1):
        left = min(1.0, (iterations - iteration) / (decay * iterations)) if decay else 1.0
        factor = end + (1 - end) * left
        if iteration % TTUR == 0:
            theta.step(dmd_gradient(theta.value, phi.value), factor)
            if lam is not None and (throughout or left == 1):
                phi.value = lam * phi.value + (1 - lam) * theta.value
        phi.step(fake_gradient(phi.value, variance_of(theta.value)), factor)
    ratio = variance_of(theta.value)
    kl = (ratio - 1 - math.log(ratio)) / 2
    return [kl, abs(phi.value - theta.value), math.exp(theta.value), math.exp(phi.value)]


SCHEDULES = {
    "constant": (1.0, 0.0),
    "to a tenth, last quarter": (0.1, 0.25),
    "to 0, last half": (0.0, 0.5),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="IDA and the fake score's learning rate.")
    parser.add_argument(
        "--iterations", type=number(Count), default=20000, help="of each row (20000)"
    )
    parser.add_argument("--lr", type=number(Fraction), default=1e-2, help="of both networks (0.01)")
    args = parser.parse_args()
    reach = TTUR * args.lr / (1 - LAM)
    print(
        f"N = {TTUR}, lr {args.lr:g}: IDA lets phi be N lr / (1 - lambda) = {reach:.2g} from theta"
    )
    print("| IDA | learning rates | KL | phi - theta | s of student | s of fake score |")
    print("|---|---|---|---|---|---|")
    for words, lam, throughout in (
        ("none", None, True),
        (str(LAM), LAM, True),
        (f"{LAM}, none in the decay", LAM, False),
    ):
        for name, (end, decay) in SCHEDULES.items():
            if decay or throughout:
                found = distil(lam, args.lr, end, decay, args.iterations, throughout)
                cells = [words, name, *(f"{value:.4f}" for value in found)]
                print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
