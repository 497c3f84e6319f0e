"""Measure an embedded teacher and its students: attribute accuracies, FID-T, FID-real, diversity.

    python -m senseflow.tiny.measure --pipeline assets/tiny/flux/pipeline \
        --judge assets/tiny/flux/judge --student mine=runs/mine --output report

Samples are drawn with FluxPipeline itself. FID-T is the Frechet distance, in the judge's features,
to the teacher's own pictures at 28 steps of the same prompts; every other row, the teacher at 28
steps included (the floor that sampling noise leaves), starts from other noise than that reference.
FID-real is the distance to rendered pictures of those prompts. Half of the prompts are held out.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image, ImageDraw
from tqdm import tqdm

from senseflow.evaluation.frechet import FeatureStatistics, frechet_distance
from senseflow.models.flux import student_source
from senseflow.sampling.student import load_student
from senseflow.tiny.captions import attributes_of, is_held_out
from senseflow.tiny.judge import Judge, diversity
from senseflow.tiny.pictures import SIZE, evaluation_prompts, render, to_pil
from senseflow.tiny.text import T5_LENGTH

TEACHER_STEPS = 28
REFERENCE_SEED, REAL_SEED = 10_000, 20_000
COLUMNS = {
    "fid_t": "FID-T",
    "fid_real": "FID-real",
    "digits": "digits",
    "colours": "colours",
    "mean": "mean attribute",
    "all": "all attributes",
    "all_held_out": "all, held-out prompts",
    "diversity": "diversity",
}


@dataclass(frozen=True)
class Method:
    """One row: which transformer ("teacher" or a student's name), how many steps, which sampler."""

    network: str
    num_steps: int
    sampler: str = "euler"
    first_seed: int = 0

    def label(self) -> str:
        """The row's name in tables and pictures."""
        steps = f"{self.num_steps} step" + ("s" if self.num_steps > 1 else "")
        sampler = "" if self.num_steps in (1, TEACHER_STEPS) else f", {self.sampler}"
        suffix = " (reference)" if self.first_seed == REFERENCE_SEED else ""
        return f"{self.network}, {steps}{sampler}{suffix}"


def few_step_methods(network: str) -> list[Method]:
    """4 and 2 steps with both samplers, and 1 step, where both are the same."""
    both = [Method(network, steps, sampler) for steps in (4, 2) for sampler in ("euler", "x0")]
    return [*both, Method(network, 1)]


def initial_latents(prompt_indices: range, seed: int, shape: tuple[int, int]) -> torch.Tensor:
    """Unit noise (B, *shape), one generator per prompt and seed, whatever the batch."""
    generator = torch.Generator()
    noise = [
        torch.randn(shape, generator=generator.manual_seed(1_000_003 * seed + index))
        for index in prompt_indices
    ]
    return torch.stack(noise)


@dataclass
class Sampler:
    """Draws pictures of `prompts` with a FluxPipeline and any of several transformers."""

    pipeline: FluxPipeline
    transformers: dict[str, FluxTransformer2DModel]
    prompts: list[str]
    guidance: float
    batch_size: int = 250

    @torch.no_grad()
    def draw(self, method: Method, seed: int) -> torch.Tensor:
        """One picture per prompt: (P, 3, 32, 32) in [-1, 1]."""
        pipeline = self.pipeline
        pipeline.transformer = self.transformers[method.network]
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, stochastic_sampling=method.sampler == "x0"
        )
        factor = 2 * pipeline.vae_scale_factor
        shape = ((SIZE // factor) ** 2, pipeline.transformer.config.in_channels)
        pictures = []
        for start in range(0, len(self.prompts), self.batch_size):
            chunk = range(start, min(start + self.batch_size, len(self.prompts)))
            # FluxPipeline hands its scheduler no generator: fresh noise comes from the global one.
            torch.manual_seed(1_000_003 * seed + start)
            output = pipeline(
                prompt=[self.prompts[index] for index in chunk],
                num_inference_steps=method.num_steps,
                guidance_scale=self.guidance,
                height=SIZE,
                width=SIZE,
                latents=initial_latents(chunk, seed, shape),
                max_sequence_length=T5_LENGTH,
                output_type="pt",
            )
            pictures.append(output.images.float() * 2 - 1)
        return torch.cat(pictures)

    def draw_seeds(self, method: Method, num_seeds: int) -> torch.Tensor:
        """Pictures (seeds, P, 3, 32, 32) from `num_seeds` consecutive seeds."""
        seeds = range(method.first_seed, method.first_seed + num_seeds)
        return torch.stack([self.draw(method, seed) for seed in seeds])


def measure_row(
    judge: Judge, pictures: torch.Tensor, prompts: list[str], references: dict
) -> dict[str, float]:
    """All measures of pictures (seeds, P, 3, 32, 32) of `prompts`, as named in `COLUMNS`."""
    num_seeds = len(pictures)
    row = judge.measure(pictures.flatten(0, 1), prompts * num_seeds, references)
    held_out = [index for index, prompt in enumerate(prompts) if is_held_out(prompt)]
    if held_out:
        unseen = [prompts[index] for index in held_out] * num_seeds
        measured = judge.measure(pictures[:, held_out].flatten(0, 1), unseen, {})
        row["all_held_out"] = measured["all"]
        row["mean_held_out"] = measured["mean"]
    if num_seeds > 1:
        features = judge.features(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        row["diversity"] = diversity(features.transpose(0, 1))
        if "fid_t" in references:  # to compare rows pair by pair
            each = [
                frechet_distance(FeatureStatistics.of(f), references["fid_t"]) for f in features
            ]
            row["fid_t_by_seed"] = each
    return row


def measure_all(
    sampler: Sampler, judge: Judge, methods: list[Method], num_seeds: int, num_shown: int
) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    """Measures of each method by label, and the first `num_shown` pictures of each."""
    reference = Method("teacher", TEACHER_STEPS, first_seed=REFERENCE_SEED)
    real_scenes = attributes_of(sampler.prompts * num_seeds)
    real = render(real_scenes, torch.Generator().manual_seed(REAL_SEED))
    references = {"fid_real": FeatureStatistics.of(judge.features(real))}
    rows: dict[str, dict[str, float]] = {"real pictures": {}}
    shown = {"real pictures": real[:num_shown]}
    for method in tqdm([reference, *methods], desc="measure"):
        pictures = sampler.draw_seeds(method, num_seeds)
        if method is reference:
            features = judge.features(pictures.flatten(0, 1))
            references["fid_t"] = FeatureStatistics.of(features)
        rows[method.label()] = measure_row(judge, pictures, sampler.prompts, references)
        shown[method.label()] = pictures[0, :num_shown]
    real = real.unflatten(0, (num_seeds, -1))
    rows["real pictures"] = measure_row(judge, real, sampler.prompts, references)
    return rows, shown


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of the measures."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, row in rows.items():
        cells = [
            "-" if key not in row else f"{row[key]:z.2f}" if "fid" in key else f"{row[key]:.3f}"
            for key in COLUMNS
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_comparison(shown: dict[str, torch.Tensor], prompts: list[str], zoom: int = 2) -> Image:
    """A picture with one row per method and one column per prompt, labelled."""
    cell, margin, header = SIZE * zoom + 4, 190, 92
    columns = len(next(iter(shown.values())))
    canvas = Image.new("RGB", (margin + columns * cell, header + len(shown) * cell), "white")
    pen = ImageDraw.Draw(canvas)
    for column, prompt in enumerate(prompts[:columns]):
        words = prompt.replace(" left of ", "\nleft of\n").replace(" above ", "\nabove\n")
        text = words.replace(" on ", "\non ").replace("purple", "purpl.")
        text += "\n(held out)" if is_held_out(prompt) else ""
        pen.multiline_text((margin + column * cell, 4), text, fill="black", font_size=9)
    for line, (label, images) in enumerate(shown.items()):
        top = header + line * cell
        pen.text((6, top + cell // 2 - 8), label, fill="black", font_size=11)
        for column, image in enumerate(to_pil(images)):
            enlarged = image.resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + column * cell, top))
    return canvas


def mixed_prompts(num: int) -> list[str]:
    """`num` evaluation prompts, of the training and of the held-out scenes in turn."""
    trained = evaluation_prompts((num + 1) // 2, held_out=False)
    held_out = evaluation_prompts((num + 1) // 2, held_out=True)
    pairs = zip(trained, held_out, strict=True)
    return [prompt for pair in pairs for prompt in pair][:num]


def untrained(pipeline: Path) -> FluxTransformer2DModel:
    """The student before its first iteration: the teacher without its guidance embedding."""
    source = student_source(pipeline, None, None, None)
    network = source.network.to_empty(device="cpu")
    network.load_state_dict({key: source.read(key) for key in network.state_dict()})
    return network.eval()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure an embedded FLUX teacher and its students.",
        epilog="example: python -m senseflow.tiny.measure --pipeline assets/tiny/flux/pipeline "
        "--judge assets/tiny/flux/judge --student mine=student_folder --output report",
    )
    parser.add_argument("--pipeline", type=Path, required=True, help="FluxPipeline folder")
    parser.add_argument("--judge", type=Path, required=True, help="judge folder")
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="NAME=CKPT",
        help="a run folder or any checkpoint the sampling scripts take; may be repeated",
    )
    parser.add_argument("--num_prompts", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="pictures per prompt")
    parser.add_argument("--guidance", type=float, default=3.5, help="the teacher's guidance")
    parser.add_argument("--columns", type=int, default=12, help="prompts in the picture")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, and write table.md, results.json and comparison.png."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    pipeline = FluxPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    transformers = {"teacher": pipeline.transformer, "untrained": untrained(arguments.pipeline)}
    methods = [Method("teacher", TEACHER_STEPS), *few_step_methods("teacher")]
    methods += [Method("untrained", 4, "euler"), Method("untrained", 4, "x0")]
    for student in arguments.student:
        name, _, folder = student.partition("=")
        if not folder or name in transformers:
            raise ValueError(f"--student wants NAME=FOLDER with a name of its own, got {student!r}")
        transformers[name] = load_student(Path(folder))
        methods += few_step_methods(name)
    prompts = mixed_prompts(arguments.num_prompts)
    sampler = Sampler(pipeline, transformers, prompts, arguments.guidance)
    judge = Judge.load(arguments.judge)
    rows, shown = measure_all(sampler, judge, methods, arguments.seeds, arguments.columns)
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = format_table(rows)
    (arguments.output / "table.md").write_text(table)
    (arguments.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw_comparison(shown, prompts).save(arguments.output / "comparison.png")
    print(table)


if __name__ == "__main__":
    main()
