"""The checks that need a GPU, in as many minutes as there are, into one folder.

    python -m benchmarks.gpu --output runs/gpu --minutes 10

First a choice of `tests/test_gpu.py`, then `benchmarks.step` at full size with random weights, and
`senseflow.plan` of the same to compare with. Each piece is a process of its own: one that fails, or
takes longer than it may, ends no other. OUTPUT/summary.md is written again after each, so that what
was done is there whenever the machine is taken away. What it needs beside torch stands in
docs/benchmarks.md.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from senseflow.common.commands import number
from senseflow.common.fields import Count
from senseflow.common.files import ROOT, write_whole
from senseflow.common.templates import markdown_table

LEAST_S = 10  # a piece with less time left is not begun


@dataclass(frozen=True)
class Piece:
    """One process: its name, the words after `python`, and the seconds that it may take."""

    name: str
    words: Sequence[str]
    limit_s: int


def pieces(output: Path) -> list[Piece]:
    """What is worth the first minutes, first."""

    def test(name: str, which: str, limit_s: int = 120) -> Piece:
        words = ["-m", "pytest", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", which]
        return Piece(name, words, limit_s)

    def step(name: str, config: str, *overrides: str, limit_s: int = 150) -> Piece:
        flags = ["--data", "cached", "--repeats", "2", "--output", str(output / f"{name}.md")]
        config = f"configs/{config}"
        words = ["-m", "benchmarks.step", "--config", config, *flags, "train.batch_size=1"]
        return Piece(name, [*words, *overrides], limit_s)

    def plan(name: str, config: str) -> Piece:
        words = ["-m", "senseflow.plan", "--config", f"configs/{config}", "--gpus", "1"]
        return Piece(name, [*words, "--memory", "140", "train.batch_size=1"], 90)

    medium, lora = "SD35/sd35_senseflow.yaml", "FLUX/flux_senseflow_lora.yaml"
    return [
        Piece("versions", ["-m", "torch.utils.collect_env"], 60),
        test("trains", "trains_on_the_device and flux_senseflow"),
        test("as_on_the_host", "computes_what_the_host_does"),
        test("resume", "resume_is_bit_identical and flux_senseflow"),
        step("step_medium", medium),
        step("step_flux_lora", lora),
        test("smaller", "smaller_optimizer and all"),
        test("signal", "signal_saves"),
        test("recompute", "recomputing_activations"),
        plan("plan_medium", medium),
        plan("plan_flux_lora", lora),
    ]


def run(piece: Piece, output: Path, limit_s: float) -> str:
    """Run a piece, its words into a file of its own; returns how it ended."""
    words = [sys.executable, *piece.words]
    with (output / f"{piece.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            return f"longer than {limit_s:.0f} s"
    return "done" if code == 0 else f"exit status {code}"


def run_all(chosen: list[Piece], output: Path, seconds: float) -> int:
    """Every piece for which there is time; returns how many did not end well."""
    output.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + seconds, []
    for piece in chosen:
        began = time.monotonic()
        limit_s = min(piece.limit_s, end - began)
        how = "no time left" if limit_s < LEAST_S else run(piece, output, limit_s)
        rows.append([piece.name, how, f"{time.monotonic() - began:.0f}", " ".join(piece.words)])
        table = markdown_table(["piece", "how it ended", "seconds", "python"], rows)
        write_whole(output / "summary.md", table + "\n")
        print(" ".join(rows[-1][:3]), flush=True)
    return sum(row[1] != "done" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of what they say")
    parser.add_argument("--minutes", type=number(Count), default=10, help="for all of it (10)")
    args = parser.parse_args()
    output = args.output.resolve()
    sys.exit(run_all(pieces(output), output, 60 * args.minutes) > 0)


if __name__ == "__main__":
    main()
