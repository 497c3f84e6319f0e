"""Rebuild the embedded teachers and their judge from nothing but scikit-learn's digits.

`common` is what all families share: the autoencoder, the judge, the discriminator's DINOv2 and
CLIP, and the reward; it takes 45 minutes on one core, FLUX 50. Every stage writes a folder
beside the output, WORK/STAGE/, which is finished when it holds stage.json and is then not done
again. The output is put together, and replaced, only when all stages are there: pipeline/ (or one
folder per network), stages.json, SHA256SUMS, the old README.md. With --stages the others of an
OUTPUT that is a whole `common` stay as they are.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from safetensors.torch import load_model, save_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from senseflow.common.commands import Parser, exit_status, module_parser, number
from senseflow.common.fields import Threads
from senseflow.common.files import sha256_of
from senseflow.tiny import flux, flux2, qwen_image, sd35, sdxl, z_image
from senseflow.tiny.backbone import save_vit, train_clip, train_vit
from senseflow.tiny.judge import train_judge
from senseflow.tiny.lesson import Learner, Lesson, teach
from senseflow.tiny.reward import train_reward
from senseflow.tiny.vae import train_vae

SEED = 0
_STAGE_FILE = "stage.json"
_SUMS_FILE, _README_FILE = "SHA256SUMS", "README.md"
_LEARNER_FILE = "learner.safetensors"
# Of a quick build: enough to run every line, not to learn anything.
_QUICK_ITERATIONS, _QUICK_PICTURES, _QUICK_BATCH = 200, 100, 4  # divisors


@dataclass(frozen=True)
class Site:
    """Where a build works, and whether it is a quick one."""

    work: Path
    common: Path
    quick: bool

    def vae(self) -> AutoencoderKL:
        """The autoencoder of all families."""
        return AutoencoderKL.from_pretrained(self.common / "vae")

    def iterations(self, full: int) -> int:
        """How many iterations to do of `full`."""
        return max(2, full // _QUICK_ITERATIONS) if self.quick else full

    def lesson(self, full: Lesson) -> Lesson:
        """What to do of the lesson `full`."""
        if not self.quick:
            return full
        return dataclasses.replace(
            full,
            iterations=self.iterations(full.iterations),
            num_pictures=full.num_pictures // _QUICK_PICTURES,
            batch_size=full.batch_size // _QUICK_BATCH,
        )


Figures = dict[str, float]
Stage = Callable[[Site, Path], Figures]  # writes the given folder, returns its figures


def build_vae(site: Site, folder: Path) -> Figures:
    """The autoencoder."""
    vae, figures = train_vae(site.iterations(2400), SEED)
    vae.save_pretrained(folder)
    return figures


def build_judge(site: Site, folder: Path) -> Figures:
    """The classifier that measures."""
    judge, figures = train_judge(site.iterations(1000), SEED)
    judge.save(folder)
    return figures


def build_dinov2(site: Site, folder: Path) -> Figures:
    """The discriminator's image backbone."""
    vit, figures = train_vit(site.iterations(2400), SEED)
    save_vit(vit, folder)
    return figures


def build_clip(site: Site, folder: Path) -> Figures:
    """The discriminator's text tower."""
    vit = timm.create_model(f"local-dir:{site.work / 'dinov2'}", pretrained=True)
    assert isinstance(vit, VisionTransformer)
    return train_clip(vit.eval(), site.iterations(400), SEED, folder)


def build_reward(site: Site, folder: Path) -> Figures:
    """What the tiny recipes with rewards train for."""
    return train_reward(site.iterations(3000), SEED, folder)


def build_flow(site: Site, folder: Path) -> Figures:
    """FLUX without guidance, from random weights."""
    torch.manual_seed(SEED)
    lesson = Lesson(8250, 2e-3, 60_000, dark_weight=1, seed=SEED)
    learner, figures = teach(site.vae(), flux.FluxLearner(), site.lesson(lesson))
    save_learner(learner, folder)
    return figures


def build_refine(site: Site, folder: Path) -> Figures:
    """FLUX without guidance, with more of the dark pictures that it learns last."""
    learner = load_flux(site.work / "flow")
    lesson = Lesson(2000, 1e-3, 20_000, dark_weight=4, seed=SEED + 1)
    learner, figures = teach(site.vae(), learner, site.lesson(lesson))
    save_learner(learner, folder)
    return figures


def build_guidance(site: Site, folder: Path) -> Figures:
    """FLUX with guidance distilled into its embedding, as a pipeline."""
    learner, vae = load_flux(site.work / "refine"), site.vae()
    lesson = Lesson(800, 7e-4, 15_000, dark_weight=2, seed=SEED + 2)
    learner, figures = flux.distil_guidance(vae, learner, site.lesson(lesson))
    learner.pipeline(vae).save_pretrained(folder)
    return figures


def save_learner(learner: nn.Module, folder: Path) -> None:
    """Write the weights of a learner."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(learner, str(folder / _LEARNER_FILE))


def load_flux(folder: Path) -> flux.FluxLearner:
    """Read what `save_learner` wrote of a FLUX learner."""
    learner = flux.FluxLearner()
    load_model(learner, folder / _LEARNER_FILE)
    return learner


def build_teacher(
    new: Callable[[], Learner],
    lesson: Lesson,
    site: Site,
    folder: Path,
    vae_of: Callable[[Site], nn.Module] = Site.vae,
) -> Figures:
    """A teacher that is guided by CFG, from random weights, as a pipeline."""
    torch.manual_seed(SEED)
    vae = vae_of(site)
    learner, figures = teach(vae, new(), site.lesson(lesson))
    learner.pipeline(vae).save_pretrained(folder)
    return figures


def build_flux2_vae(site: Site, folder: Path) -> Figures:
    """The autoencoder of all families in FLUX.2's class, with the statistics of its patches."""
    vae = flux2.with_statistics(site.vae(), SEED)
    vae.save_pretrained(folder)
    return {"std": float(vae.bn.running_var.sqrt().mean())}


def flux2_vae(site: Site) -> AutoencoderKLFlux2:
    """The one that the stage before has made."""
    return AutoencoderKLFlux2.from_pretrained(site.work / "vae")


def build_qwen_vae(site: Site, folder: Path) -> Figures:
    """Qwen-Image's own class of autoencoder, for which that of all families is no start."""
    vae, figures = train_vae(site.iterations(2400), SEED, qwen_image.QWEN_VAE)
    vae.save_pretrained(folder)
    return figures


def qwen_vae(site: Site) -> AutoencoderKLQwenImage:
    """The one that the stage before has made."""
    return AutoencoderKLQwenImage.from_pretrained(site.work / "vae")


_cfg_lesson = partial(Lesson, num_pictures=60_000, dark_weight=2, seed=SEED)
_sd35 = {size: partial(sd35.SD35Learner, size) for size in sd35.SIZES}
# The stages of each output, in order.
TARGETS: dict[str, dict[str, Stage]] = {
    "common": {
        "vae": build_vae,
        "judge": build_judge,
        "dinov2": build_dinov2,
        "clip": build_clip,
        "reward": build_reward,
    },
    "flux": {"flow": build_flow, "refine": build_refine, "guidance": build_guidance},
    "sd35_medium": {"teach": partial(build_teacher, _sd35["sd35_medium"], _cfg_lesson(7500, 2e-3))},
    "sd35_large": {"teach": partial(build_teacher, _sd35["sd35_large"], _cfg_lesson(6500, 2e-3))},
    "sdxl": {
        "teach": partial(build_teacher, sdxl.SDXLLearner, _cfg_lesson(6500, 1.5e-3, batch_size=96))
    },
    "flux2_klein": {
        "vae": build_flux2_vae,
        "teach": partial(
            build_teacher, flux2.Flux2Learner, _cfg_lesson(7500, 2e-3), vae_of=flux2_vae
        ),
    },
    "z_image": {"teach": partial(build_teacher, z_image.ZImageLearner, _cfg_lesson(7500, 2e-3))},
    "qwen_image": {
        "vae": build_qwen_vae,
        "teach": partial(
            build_teacher, qwen_image.QwenImageLearner, _cfg_lesson(7500, 2e-3), vae_of=qwen_vae
        ),
    },
}


def run_stage(name: str, stage: Stage, site: Site) -> None:
    """Do one stage, unless it is finished, and record its time and figures."""
    record = site.work / name / _STAGE_FILE
    if record.exists():
        return
    start = time.monotonic()
    figures = stage(site, record.parent)
    record.write_text(json.dumps({**figures, "time_s": round(time.monotonic() - start)}) + "\n")


def adopt(output: Path, work: Path, names: list[str]) -> None:
    """Count stages of `common` as finished that `output` holds, as they stand there."""
    record = output / "stages.json"
    stages = json.loads(record.read_text()) if record.exists() else {}
    for name in names:
        if name in stages and not (work / name / _STAGE_FILE).exists():
            shutil.copytree(output / name, work / name, dirs_exist_ok=True)
            (work / name / _STAGE_FILE).write_text(json.dumps(stages[name]) + "\n")


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS, in the format of sha256sum, of every file in `folder` but its README."""
    skipped = {_SUMS_FILE, _README_FILE}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in skipped)
    lines = [f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in files]
    (folder / _SUMS_FILE).write_text("".join(lines))


def forget_paths(folder: Path) -> None:
    """Take the folder a network was loaded from, which diffusers notes, out of its config."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def assemble(target: str, work: Path, output: Path) -> None:
    """Put the finished stages together as `output`, replacing what was there but its README.

    Every stage of `common` is a folder of it; of a teacher the last is its pipeline.
    """
    fresh = output.with_name(output.name + ".assembled")
    shutil.rmtree(fresh, ignore_errors=True)
    stages = {n: json.loads((work / n / _STAGE_FILE).read_text()) for n in TARGETS[target]}
    for stage in stages if target == "common" else [*stages][-1:]:
        folder = stage if target == "common" else "pipeline"
        shutil.copytree(work / stage, fresh / folder, ignore=shutil.ignore_patterns(_STAGE_FILE))
    forget_paths(fresh)
    (fresh / "stages.json").write_text(json.dumps(stages, indent=2) + "\n")
    if (output / _README_FILE).exists():
        shutil.copy(output / _README_FILE, fresh)
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    write_checksums(fresh)
    former = output.with_name(output.name + ".former")
    if output.exists():
        output.rename(former)
    fresh.rename(output)
    shutil.rmtree(former, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Build the stages asked for that are not there; all of them are the teacher. Returns 0,
    or 2 for wrong input, said in one line.
    """
    args = build_parser().parse_args(arguments)

    def work() -> None:
        target, output = TARGETS[args.target], args.output.resolve()
        stages = args.stages or list(target)
        if unknown := [name for name in stages if name not in target]:
            known = ", ".join(target)
            raise ValueError(f"{args.target} has no stage {unknown[0]!r}, but {known}")
        stages_in = args.work or output.with_name(output.name + ".building")
        common = args.common or output.with_name("common")
        if args.target != "common" and not (common / "vae" / "config.json").exists():
            raise ValueError(f"no vae/ in {common}: name it with --common, or build it first")
        torch.set_num_threads(args.threads)
        site = Site(stages_in, common, args.quick)
        if args.target == "common":
            adopt(output, site.work, [name for name in target if name not in stages])
        for name, stage in target.items():
            if name in stages:
                run_stage(name, stage, site)
        if all((site.work / name / _STAGE_FILE).exists() for name in target):
            assemble(args.target, site.work, args.output)

    return exit_status(work, "finished stages are kept, the same command goes on")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser(
        "senseflow.tiny.build",
        __doc__,
        "example: python -m senseflow.tiny.build common --output assets/tiny/common\n"
        "         python -m senseflow.tiny.build flux --output assets/tiny/flux\n"
        "         python -m senseflow.tiny.build flux --quick --output quick/flux "
        "--common assets/tiny/common",
    )
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--common", type=Path, help="folder that holds vae/ (default: common, beside OUTPUT)"
    )
    parser.add_argument("--work", type=Path, help="folder of stages (default: OUTPUT.building)")
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything")
    parser.add_argument("--stages", nargs="+", help="only these (default: all)")
    parser.add_argument("--threads", type=number(Threads), default=1, help="CPU threads")
    return parser


if __name__ == "__main__":
    sys.exit(main())
