"""Names in the text are still names: configuration keys and their values, files, modules,
functions, equations."""

import dataclasses
import importlib
import re
import typing
from functools import cache

import pytest
from doc_pages import ROOT, Page, pages, top_folders, tracked
from doc_programs import ELSEWHERE, is_path

from senseflow.config import strict_yaml
from senseflow.config.config import REMOVED, Config
from senseflow.config.yaml_text import parse_yaml

NAME = r"[a-z_][a-z0-9_]*"
KEY = re.compile(rf"({NAME})\.({NAME}|\*)(?:(?:=|: ?)(.+))?")
FILE = re.compile(
    r"[\w.*/-]*\w\.("
    r"py|sh|md|ya?ml|json|jsonl|txt|csv|png|html|cff|sbatch|toml|zip|pth?|bin|safetensors|pkl|tar|tsv|jpe?g|webp|caption)"
)
DOTTED = re.compile(r"(?:\w+[./])*\w+\.[A-Za-z_]\w*|(?:\w+/)+\w+")
MEASURE = re.compile(r"(loss|grad_norm|discriminator|ida|lr|drift|time_s)/\w+")
PLACEHOLDER = re.compile(r"/path/to|\b(NAME|RUN|DIR|FILE|TEACHER|STUDENT|OWNER)\b")
SECTIONS = typing.get_type_hints(Config)
WRITTEN_BY_USERS = {
    # files of the user's, of other programs, and of libraries, that no line of the package names
    "dataset.json", "coco5k.json", "vqa_result.json", "evaluation_metadata.jsonl",
    "summary_scores.py", "CLIP_similarity.py", "3_in_1.py", "8.png", "10.png", "plan.json",
    "val2017.zip", "annotations_trainval2017.zip", "HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt",
    "vgg16-397923af.pth", "examples/dataset",
    "vit_large_patch14_dinov2.lvd142m",
}  # fmt: skip
LIBRARIES = ("torch", "diffusers", "transformers", "timm", "open_clip", "huggingface_hub")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_names_in_the_text(page: Page):
    wrong = []
    for span in page.spans:
        try:
            check_name(page, span)
        except AssertionError as error:
            wrong.append(f"`{span}`: {error}")
    assert not wrong, "\n".join(wrong)


def check_name(page: Page, span: str) -> None:
    """Raise AssertionError for a key, file, module or function that is not there."""
    if span.startswith(ELSEWHERE) or PLACEHOLDER.search(span) or span in WRITTEN_BY_USERS:
        return
    overrides = [word for word in span.split() if re.match(rf"{NAME}\.{NAME}=", word)]
    if len(overrides) > 1:
        for override in overrides:
            check_name(page, override)
        return
    key = KEY.fullmatch(span)
    if span == "key.sub=value":
        return
    if MEASURE.fullmatch(span):
        assert f"{span.split('/')[0]}/" in package_text() and span.split("/")[1] in package_text()
    elif key and (key[1] in SECTIONS or key[3] is not None):
        check_key(key[1], key[2], key[3])
    elif FILE.fullmatch(span):
        assert is_file(page, span), "no such file, and no line of the package names it"
    elif "/" in span and first_folder(span) and " " not in span:
        assert is_path(span.rstrip("/")) or is_object(span), "no such file or function"
    elif "/" not in span and DOTTED.fullmatch(span):
        assert is_object(span), "no key, module, function or file"


def first_folder(span: str) -> bool:
    """Whether a path begins at the root, or in the package."""
    first = span.split("/")[0]
    if first == "evaluation":  # the folder of results in docs/evaluation.md
        return False
    if first == "common":  # of the embedded teachers, in docs/tiny.md
        return False
    return first in top_folders() or (ROOT / "senseflow" / first).is_dir()


def check_key(section: str, key: str, value: str | None) -> None:
    """A section of the configuration, a key of it or a removed one, and a value of its type."""
    if f"{section}.{key}" in REMOVED:
        return
    assert section in SECTIONS, f"the configuration has no section {section}"
    hints = typing.get_type_hints(SECTIONS[section], include_extras=True)
    assert key == "*" or key in hints, f"{section} has no key {key}"
    if value is None or key == "*" or re.fullmatch(r"[A-Z][A-Z_]*|k|\.\.\.", value):
        return
    try:
        strict_yaml._convert(parse_yaml(value, key), hints[key], f"{section}.{key}")
    except ValueError as error:
        raise AssertionError(str(error)) from None


def is_file(page: Page, name: str) -> bool:
    """A file of the repository, from its root, from the page's folder, from the package, or by its
    name alone; or one whose name a line of the package says."""
    name = name.removeprefix("./")
    if is_path(name) or is_path(f"senseflow/{name}") or (page.file.parent / name).exists():
        return True
    if "/" in name and name.split("/")[0] in top_folders():
        return False
    last = name.split("/")[-1]
    fits = str.endswith if last.startswith("*") else str.__eq__
    last = last.removeprefix("*")
    stem, _, suffixes = last.partition(".")
    return (
        last in WRITTEN_BY_USERS
        or len(stem) == 1  # x.jpg: any
        or ("." in suffixes and f".{suffixes}" in package_text())
        or any(fits(path.split("/")[-1], last) for path in tracked())
        or last in package_text()
    )


@cache
def package_text() -> str:
    """All lines of the package, for the names of files it writes."""
    files = [name for name in tracked() if re.match(r"(senseflow|benchmarks)/.*\.py$", name)]
    return "\n".join((ROOT / name).read_text() for name in [*files, "Makefile"])


def is_object(span: str) -> bool:
    """A module, class, function or attribute: of the package, with or without its name in front, by
    dots or as a path; or of a library."""
    dotted = span.replace("/", ".")
    if span[0].isupper():
        return any(exists(f"{module}.{dotted}") for module in with_class(span.split(".")[0]))
    candidates = [dotted, f"senseflow.{dotted}", f"senseflow.engine.{dotted}"]
    if dotted.split(".")[0] not in (*LIBRARIES, "senseflow", "benchmarks", "tests", "examples"):
        candidates = candidates[1:]
    return any(exists(candidate) for candidate in candidates)


@cache
def with_class(name: str) -> list[str]:
    """The modules of the package that define a class."""
    files = [f for f in tracked() if re.match(r"senseflow/.*\.py$", f)]
    found = [
        f for f in files if re.search(rf"^class {name}\b", (ROOT / f).read_text(), re.MULTILINE)
    ]
    return [f.removesuffix(".py").replace("/", ".") for f in found]


@cache
def exists(dotted: str) -> bool:
    """Whether a module, or an attribute on the way from one, has this name."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if dataclasses.is_dataclass(found) and part in found.__dataclass_fields__:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_the_check_sees_what_is_gone():
    page = pages()[0]
    for span in (
        "ida.lambda", "gone.weight: 1", "isg.loss: l3", "train.batch_size=many",
        "configs/gone.yaml", "core/gone.py", "senseflow.gone", "core/dmd.gone", "distill.gone",
        "gone_file.json", "torch.gone",
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check_name(page, span)
