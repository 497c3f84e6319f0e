"""How the images of an evaluation lie in their folders: by seed, or as a benchmark wants them.

GenEval and T2I-CompBench are measured by their authors' programs, in environments of their own.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from senseflow.sampling.job import Prompt, Shot, prompt_shot
from senseflow.sampling.prompts import chosen, read_prompts_file

TEACHER = "teacher"  # its folder
SEED_STRIDE = 1_000_000  # from image to image of one prompt
SEED_FOLDER = re.compile(r"seed_(\d+)")
SAMPLES, SIDECARS = "samples", "sidecars"
CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
GENEVAL_TASKS = (
    "single_object", "two_object", "counting", "colors", "position", "color_attr",
)  # fmt: skip
MOST_BYTES = 255  # of a file's name


@dataclass(frozen=True)
class Collection:
    """The prompts of one file; of T2I-CompBench, one category."""

    name: str
    file: Path
    prompts: list[Prompt]


@dataclass(frozen=True)
class Layout:
    """How files are called, and what a benchmark asks for besides."""

    num_seeds: int  # images per prompt, by default
    read: Callable[[list[Path], str | None], list[Collection]]  # files, the prompts' column
    shots: Callable[[Path, Collection, int, int], list[Shot]]  # folder, prompts, num_seeds, seed
    note: Callable[[Shot], tuple[Path, str] | None] = lambda shot: None  # a file to be beside it


@dataclass(frozen=True)
class Selection:
    """Which images a folder gets: of some of the prompts, from one or several seeds."""

    layout: Layout
    collections: list[Collection]
    num_seeds: int  # images per prompt
    start_idx: int  # first prompt of each collection
    num_prompts: int | None  # from there on; None: all

    def shots(self, folder: Path, seed: int) -> list[Shot]:
        """The images; raises ValueError when the folder holds others, which would be counted."""
        shots = []
        for one in self.collections:
            every = self.layout.shots(folder, one, self.num_seeds, seed)
            refuse_foreign(every)
            prompts = chosen(one.prompts, one.file, self.start_idx, self.num_prompts)
            wanted = {prompt.index for prompt in prompts}
            shots += [shot for shot in every if shot.prompt.index in wanted]
        return shots


def refuse_foreign(shots: list[Shot]) -> None:
    """Raise ValueError when their folders hold images of other prompts, which would be counted.

    So would those of other seeds, in seed_* folders beside theirs.
    """
    expected: dict[Path, set[str]] = {}
    for shot in shots:
        expected.setdefault(shot.file.parent, set()).add(shot.file.name)
    for folder, names in expected.items():
        found = {f.name for f in folder.glob("*.png") if not f.name.startswith(".")}
        if foreign := sorted(found - names):
            raise ValueError(
                f"{folder} holds {len(foreign)} images of other prompts, such as {foreign[0]}: "
                "choose another --output_dir, or remove them"
            )
    for parent in sorted({f.parent for f in expected if SEED_FOLDER.fullmatch(f.name)}):
        for folder in seed_folders(parent):
            if folder not in expected and any(folder.glob("*.png")):
                raise ValueError(
                    f"{folder} holds images of another seed, which would be counted: say more "
                    "--seeds, choose another --output_dir, or remove it"
                )


def seed_folders(folder: Path) -> list[Path]:
    """Its seed_0, seed_1, ... that are there, in the order of their numbers."""
    if not folder.is_dir():
        return []
    found = [f for f in folder.iterdir() if f.is_dir() and SEED_FOLDER.fullmatch(f.name)]
    return sorted(found, key=lambda f: int(f.name.removeprefix("seed_")))


# seed_0/00000_words.png


def read_one(files: list[Path], column: str | None = None) -> list[Collection]:
    """The prompts of the one file."""
    if len(files) != 1:
        raise ValueError(f"--prompts_file takes one file in this layout, not {len(files)}")
    return [Collection(files[0].stem, files[0], read_prompts_file(files[0], named=column))]


def seed_shots(folder: Path, collection: Collection, num_seeds: int, seed: int) -> list[Shot]:
    """A folder per seed, in each one image of every prompt, as the scripts_* name them."""
    return [
        prompt_shot(folder / f"seed_{sample}", prompt, seed + SEED_STRIDE * sample)
        for sample in range(num_seeds)
        for prompt in collection.prompts
    ]


# PLACE/samples/NAME.png of the benchmarks, with PLACE/sidecars/NAME.json


def benchmark_shot(place: Path, name: str, prompt: Prompt, seed: int, sample: int) -> Shot:
    """A prompt's image number `sample`, of the seed that it has in `seed_shots`."""
    file, sidecar = place / SAMPLES / f"{name}.png", place / SIDECARS / f"{name}.json"
    return Shot(prompt, seed + prompt.index + SEED_STRIDE * sample, file, sidecar)


# GenEval: 00000/metadata.jsonl, 00000/samples/0000.png


def read_geneval(files: list[Path], column: str | None = None) -> list[Collection]:
    """The prompts of evaluation_metadata.jsonl, each with its line."""
    (collection,) = read_one(files, column)
    for prompt in collection.prompts:
        tag = (prompt.record or {}).get("tag")
        if tag not in GENEVAL_TASKS:
            raise ValueError(
                f"--prompts_file {collection.file}: entry {prompt.index} has the tag {tag!r}; "
                "--layout geneval takes GenEval's evaluation_metadata.jsonl"
            )
    return [collection]


def geneval_shots(folder: Path, collection: Collection, num_seeds: int, seed: int) -> list[Shot]:
    """A folder per prompt; sidecars beside `samples`."""
    return [
        benchmark_shot(folder / f"{prompt.index:05d}", f"{sample:04d}", prompt, seed, sample)
        for prompt in collection.prompts
        for sample in range(num_seeds)
    ]


def geneval_note(shot: Shot) -> tuple[Path, str] | None:
    """With a prompt's first image, its line of the prompts file."""
    if shot.file.stem != "0000":
        return None
    return shot.file.parents[1] / "metadata.jsonl", json.dumps(shot.prompt.record) + "\n"


# T2I-CompBench: color/samples/a red car and a blue bench_000007.png


def read_categories(files: list[Path], column: str | None = None) -> list[Collection]:
    """The prompts of each file, the category by its name; what follows a tab is not the prompt."""
    collections: list[Collection] = []
    for file in files:
        name = file.stem.removesuffix("_val")
        if name not in CATEGORIES or name in {c.name for c in collections}:
            raise ValueError(
                f"--prompts_file {file}: --layout t2i_compbench takes one file for each category, "
                f"named CATEGORY_val.txt or CATEGORY.txt, of {', '.join(CATEGORIES)}"
            )
        prompts = read_prompts_file(file, cut_at_tab=True, named=column)
        for prompt in prompts:
            _check_file_name(file, prompt)
        collections.append(Collection(name, file, prompts))
    return collections


def _check_file_name(file: Path, prompt: Prompt) -> None:
    """The benchmark reads the prompt from the file's name, up to the first underscore."""
    name = f"{prompt.text}_000000.png"
    if "/" in name or "\0" in name or "_" in prompt.text or len(name.encode()) > MOST_BYTES - 9:
        raise ValueError(
            f"--prompts_file {file}: prompt {prompt.index} cannot be part of a file's name, as "
            f"T2I-CompBench wants it: {prompt.text[:80]!r}"
        )


def category_shots(folder: Path, collection: Collection, num_seeds: int, seed: int) -> list[Shot]:
    """The images of a category, numbered throughout; sidecars beside `samples`."""
    shots = []
    for prompt in collection.prompts:
        for sample in range(num_seeds):
            name = f"{prompt.text}_{prompt.index * num_seeds + sample:06d}"
            shots.append(benchmark_shot(folder / collection.name, name, prompt, seed, sample))
    return shots


LAYOUTS = {
    "seeds": Layout(1, read_one, seed_shots),
    "geneval": Layout(4, read_geneval, geneval_shots, geneval_note),
    "t2i_compbench": Layout(10, read_categories, category_shots),
}
