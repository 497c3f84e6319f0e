"""The model card: README.md with the Hub's metadata, of everything a stranger must know."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from senseflow.evaluate.results import Result, merge, read_results
from senseflow.evaluate.table import column_of, compare, markdown
from senseflow.export.samples import Sample, gallery
from senseflow.export.sections import comfyui, licence, responsible_use, sampling, training
from senseflow.export.source import Source
from senseflow.export.usage import usage
from senseflow.teachers.terms import HUB, Terms

PAPER = "https://arxiv.org/abs/2506.00523"
TAGS = ["text-to-image", "diffusion-distillation", "few-step", "senseflow"]


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the student itself."""

    name: str
    form: str
    place: str  # what the usage loads: a repository of the Hub, or the folder's name
    terms: Terms
    results: list[Result]
    row: str | None  # of the results: this student's
    samples: list[Sample]
    prompt: str  # of the usage


def write_model_card(folder: Path, source: Source, facts: CardFacts) -> None:
    """Write README.md."""
    text = model_card(source, facts)
    (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(source: Source, facts: CardFacts) -> str:
    """The card's metadata and text; needs no network."""
    parts = [
        f"# {facts.name}",
        _summary(source, facts),
        gallery(facts.samples),
        usage(source, facts.form, facts.place, facts.terms.base_model, facts.prompt),
        sampling(source),
        comfyui(source, facts.form, facts.name),
        training(source),
        _evaluation(facts),
        responsible_use(),
        licence(facts.terms),
    ]
    body = "\n\n".join(part.strip() for part in parts if part)
    head = metadata(source, facts).to_yaml()
    return str(ModelCard(f"---\n{head}\n---\n\n{body}\n"))


def metadata(source: Source, facts: CardFacts) -> ModelCardData:
    """What the Hub reads: licence, base model, how it is sampled, results."""
    is_adapter = source.is_lora and facts.form in ("component", "lora")
    levels: dict[str, Any] = {source.family.levels.name: list(source.card.anchors)}
    guidance = source.stock.guidance if source.guidance is None else source.guidance
    tags = [*TAGS, source.family.name, *(["lora"] if is_adapter else [])]
    return ModelCardData(
        base_model=facts.terms.base_model,
        base_model_relation="adapter" if is_adapter else "finetune",
        library_name="diffusers",
        license=facts.terms.license,
        license_name=facts.terms.license_name,
        license_link=facts.terms.license_link,
        pipeline_tag="text-to-image",
        tags=tags,
        steps=len(source.card.anchors),
        **levels,
        guidance_scale=guidance,
        model_name=facts.name,
        eval_results=_eval_results(facts) or None,
    )


def _summary(source: Source, facts: CardFacts) -> str:
    card, steps, teacher = source.card, len(source.card.anchors), _teacher(source, facts)
    averaged = f", the average of its weights (EMA, decay {card.ema:g})" if card.ema else ""
    return (
        f"A student that draws in {steps} step{'s' if steps > 1 else ''} without classifier-free "
        f"guidance what its teacher, {teacher}, draws in dozens. Distilled by "
        f"[SenseFlow]({PAPER}); iteration {card.iteration}{averaged}."
    )


def _teacher(source: Source, facts: CardFacts) -> str:
    """As a link where the Hub has it."""
    name = facts.terms.base_model
    if name is None:
        return f"`{source.card.base_name}` (of the kind of {source.family.title})"
    return f"[{name}]({HUB}/{name})" if name.count("/") == 1 else f"`{name}`"


def read_evaluation(files: list[Path]) -> list[Result]:
    """The entries of results files of `senseflow.evaluate`, without the folders of this machine."""
    return merge(_public(entry) for file in files for entry in read_results(file))


def _public(entry: Result) -> Result:
    """Paths as their last name."""
    named = {key: Path(entry[key]).name for key in ("images", "reference") if entry[key]}
    return {**entry, **named}


def _evaluation(facts: CardFacts) -> str:
    if not facts.results:
        return "## Evaluation\n\nNot measured."
    own = f" This student is the row `{facts.row}`." if facts.row else ""
    table = markdown(compare(facts.results))
    return (
        f"## Evaluation\n\nMeasured by `python -m senseflow.evaluate`; N, the number of images, is "
        f"part of every value.{own}\n\n{table}"
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """This student's row for the Hub's index."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{entry['num_images']} images",
            metric_type=entry["metric"],
            metric_name=column_of(entry["metric"]).title,
            metric_value=entry["value"],
        )
        for entry in facts.results
        if facts.row is not None and entry["name"] == facts.row
    ]
