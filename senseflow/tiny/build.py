"""Rebuild the embedded teachers and their judges from nothing but scikit-learn's digits.

    python -m senseflow.tiny.build flux --output assets/tiny/flux      (about 85 minutes, one core)
    python -m senseflow.tiny.build flux --quick --output /tmp/flux     (minutes; same sizes)

Every stage writes a folder beside the output; a finished stage is not done again. The output is put
together, and replaced, only when all stages are there.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from senseflow.tiny.backbone import save_vit, train_clip, train_vit
from senseflow.tiny.flux import Lesson, distil_guidance, new_transformer, save_pipeline, train_flow
from senseflow.tiny.judge import train_judge
from senseflow.tiny.text import FluxText
from senseflow.tiny.vae import train_vae

SEED = 0
_STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Budget:
    """Iterations of each stage, and pictures whose latents are kept in memory for the flow."""

    vae: int
    flow: int
    refine: int
    guidance: int
    judge: int
    dinov2: int
    clip: int
    pictures: int


FULL = Budget(
    vae=2400,
    flow=8250,
    refine=2000,
    guidance=800,
    judge=1000,
    dinov2=2400,
    clip=400,
    pictures=60_000,
)
QUICK = Budget(
    vae=150, flow=120, refine=20, guidance=20, judge=60, dinov2=40, clip=20, pictures=4000
)


def build_vae(work: Path, budget: Budget) -> dict:
    """The autoencoder."""
    vae, figures = train_vae(budget.vae, SEED)
    vae.save_pretrained(work / "vae")
    return figures


def build_flow(work: Path, budget: Budget) -> dict:
    """Text encoders and the transformer without guidance, from random weights."""
    torch.manual_seed(SEED)
    text, transformer = FluxText().eval(), new_transformer()
    lesson = Lesson(budget.flow, 2e-3, budget.pictures, dark_weight=1, seed=SEED)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    transformer, text, figures = train_flow(vae, transformer, text, lesson)
    save_flow(transformer, text, work / "flow")
    return figures


def build_refine(work: Path, budget: Budget) -> dict:
    """The same networks, with more of the dark pictures that they learn last."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    lesson = Lesson(budget.refine, 1e-3, budget.pictures // 3, dark_weight=4, seed=SEED + 1)
    transformer, text, figures = train_flow(vae, *load_flow(work / "flow"), lesson)
    save_flow(transformer, text, work / "refine")
    return figures


def save_flow(transformer: FluxTransformer2DModel, text: FluxText, folder: Path) -> None:
    """Write a transformer and its text encoders."""
    transformer.save_pretrained(folder / "transformer")
    text.save(folder)


def load_flow(folder: Path) -> tuple[FluxTransformer2DModel, FluxText]:
    """Read what `save_flow` wrote."""
    return FluxTransformer2DModel.from_pretrained(folder / "transformer"), FluxText.load(folder)


def build_guidance(work: Path, budget: Budget) -> dict:
    """The transformer with guidance distilled into its embedding."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    lesson = Lesson(budget.guidance, 7e-4, budget.pictures // 4, dark_weight=2, seed=SEED + 2)
    student, figures = distil_guidance(vae, *load_flow(work / "refine"), lesson)
    student.save_pretrained(work / "guidance")
    return figures


def build_judge(work: Path, budget: Budget) -> dict:
    """The classifier that measures."""
    judge, figures = train_judge(budget.judge, SEED)
    judge.save(work / "judge")
    return figures


def build_dinov2(work: Path, budget: Budget) -> dict:
    """The discriminator's image backbone."""
    vit, figures = train_vit(budget.dinov2, SEED)
    save_vit(vit, work / "dinov2")
    return figures


def build_clip(work: Path, budget: Budget) -> dict:
    """The discriminator's text tower."""
    vit = timm.create_model(f"local-dir:{work / 'dinov2'}", pretrained=True).eval()
    return train_clip(vit, budget.clip, SEED, work / "clip")


STAGES: dict[str, Callable[[Path, Budget], dict]] = {
    "vae": build_vae,
    "flow": build_flow,
    "refine": build_refine,
    "guidance": build_guidance,
    "judge": build_judge,
    "dinov2": build_dinov2,
    "clip": build_clip,
}


def run_stage(name: str, work: Path, budget: Budget) -> None:
    """Do one stage, unless it is finished, and record its time and figures."""
    record = work / name / _STAGE_FILE
    if record.exists():
        return
    start = time.monotonic()
    figures = STAGES[name](work, budget)
    record.write_text(json.dumps({**figures, "time_s": round(time.monotonic() - start)}) + "\n")


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS, in the format of sha256sum, of every file in `folder` but its README."""
    skipped = {"SHA256SUMS", "README.md"}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in skipped)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in files
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def forget_paths(folder: Path) -> None:
    """Take the folder a network was loaded from, which diffusers notes, out of its config."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def assemble(work: Path, output: Path) -> None:
    """Put the finished stages together as `output`, replacing what was there but its README."""
    fresh = work / "assembled"
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(
        AutoencoderKL.from_pretrained(work / "vae"),
        FluxTransformer2DModel.from_pretrained(work / "guidance"),
        FluxText.load(work / "refine"),
        fresh / "pipeline",
    )
    forget_paths(fresh / "pipeline")
    for name in ("judge", "dinov2", "clip"):
        shutil.copytree(work / name, fresh / name, ignore=shutil.ignore_patterns(_STAGE_FILE))
    stages = {name: json.loads((work / name / _STAGE_FILE).read_text()) for name in STAGES}
    (fresh / "stages.json").write_text(json.dumps(stages, indent=2) + "\n")
    readme = output / "README.md"
    if readme.exists():
        shutil.copy(readme, fresh)
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    write_checksums(fresh)
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(fresh, output)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Rebuild an embedded teacher: real diffusers classes, trained on digits.",
        epilog="example: python -m senseflow.tiny.build flux --quick --output /tmp/flux",
    )
    parser.add_argument("teacher", choices=["flux"])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--work", type=Path, help="folder of stages (default: OUTPUT.building)")
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work or arguments.output.with_name(arguments.output.name + ".building")
    for name in arguments.stages:
        run_stage(name, work, QUICK if arguments.quick else FULL)
    if all((work / name / _STAGE_FILE).exists() for name in STAGES):
        assemble(work, arguments.output)


if __name__ == "__main__":
    main()
