"""The model card: README.md with the Hub's metadata, of everything a stranger must know."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from senseflow.common.templates import templates
from senseflow.config.recipes import RECIPES, Method
from senseflow.evaluate.results import Result, merge, read_results
from senseflow.evaluate.table import column_of, compare, markdown
from senseflow.export.samples import Sample
from senseflow.export.source import Source
from senseflow.teachers.folder import left_out
from senseflow.teachers.published import HUB, Terms

TAGS = ["text-to-image", "diffusion-distillation", "few-step"]
LIBRARIES = {"comfyui": "diffusion-single-file", "original": "diffusion-single-file"}  # the Hub's


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the student itself."""

    name: str
    form: str
    place: str  # what the usage loads: a repository of the Hub, or the folder's name
    file: str  # what a single file is called
    terms: Terms
    results: list[Result]
    row: str | None  # of the results: this student's
    samples: list[Sample]
    prompt: str  # of the usage


def write_model_card(folder: Path, source: Source, facts: CardFacts) -> None:
    """Write README.md: `card.md.j2`, filled, below the metadata; needs no network."""
    head, body = metadata(source, facts).to_yaml(), _body(source, facts)
    text = str(ModelCard(f"---\n{head}\n---\n\n{body}"))
    (folder / "README.md").write_text(text, encoding="utf-8")


def _body(source: Source, facts: CardFacts) -> str:
    card, terms, config = source.card, facts.terms, source.config
    template = templates(Path(__file__).parent).get_template("card.md.j2")
    return template.render(
        facts=facts,
        card=card,
        family=source.family,
        stock=source.stock,
        terms=terms,
        config=config,
        data=Path(config.paths.dataset).name if config else None,
        is_lora=source.is_lora,
        methods=[f"[{method.title}]({method.paper})" for method in methods_of(source)],
        teacher=_teacher(source, facts),
        base=terms.base_model or f"/path/to/{card.base_name}",
        dtype=str(source.layout.dtype),
        imported=imported_of(source, facts.form),
        prompt=json.dumps(facts.prompt, ensure_ascii=False),
        steps=len(card.anchors),
        anchors=[f"{anchor:.4g}" for anchor in card.anchors],
        guidance=guidance_of(source),
        changes=typed(source.stock.changes),
        call=typed(call_of(source)),
        absent=[name for name in left_out(source.base) if name in source.family.optional],
        shift_node=shift_node(source),
        results=markdown(compare(facts.results)) if facts.results else "",
    )


def metadata(source: Source, facts: CardFacts) -> ModelCardData:
    """What the Hub reads: licence, base model, how it is sampled, results."""
    is_adapter = source.is_lora and facts.form in ("component", "lora")
    # with "diffusers" the Hub says that a pipeline is loaded from here, which a component is not
    of_diffusers = "diffusers" if is_adapter or facts.form == "pipeline" else None
    levels: dict[str, Any] = {source.family.levels.name: list(map(short, source.card.anchors))}
    methods = methods_of(source)
    tags = [*TAGS, *([methods[0].title.lower()] if len(methods) == 1 else []), source.family.name]
    tags += ["lora"] if is_adapter else ["comfyui"] if facts.form == "comfyui" else []
    base_model = facts.terms.base_model
    return ModelCardData(
        base_model=base_model,
        base_model_relation=base_model and ("adapter" if is_adapter else "finetune"),
        library_name=LIBRARIES.get(facts.form, of_diffusers),
        license=facts.terms.license,
        license_name=facts.terms.license_name,
        license_link=facts.terms.license_link,
        pipeline_tag="text-to-image",
        tags=tags,
        steps=len(source.card.anchors),
        **levels,
        guidance_scale=call_of(source)[source.family.guidance_key],
        model_name=facts.name,
        eval_results=_eval_results(facts) or None,
    )


def _teacher(source: Source, facts: CardFacts) -> str:
    """The teacher's name, as a link where the Hub has it."""
    name = facts.terms.base_model
    if name is None:
        return f"`{source.card.base_name}` (of the kind of {source.family.title})"
    return f"[{name}]({HUB}/{name})" if name.count("/") == 1 else f"`{name}`"


def methods_of(source: Source) -> list[Method]:
    """What the student is credited to: its recipe's method; where that is not known, those that
    students of its family may be trained by."""
    name = source.card.recipe or (source.config.recipe if source.config else None)
    ours = [r for r in RECIPES.values() if r.family.name == source.family.name]
    return list(dict.fromkeys(r.method for r in ours if r.name == name or name not in RECIPES))


def short(level: float) -> float:
    """A noise level in as few digits as tell its float32; a timestep as it is."""
    return level if isinstance(level, int) else float(str(np.float32(level)))


def read_evaluation(files: list[Path]) -> list[Result]:
    """The entries of results files of `senseflow.evaluate`, without the folders of this machine."""
    entries = [entry for file in files for entry in read_results(file)]
    for entry in entries:
        entry |= {key: Path(entry[key]).name for key in ("images", "reference") if entry[key]}
    return merge(entries)


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


# One student's sampling: its call, its guidance, ComfyUI's node


def call_of(source: Source) -> dict[str, Any]:
    """The arguments of the pipeline's call besides the prompt, at the size trained at."""
    card, stock = source.card, source.stock
    guidance = stock.guidance if source.guidance is None else source.guidance
    levels = {k: list(map(short, v)) if isinstance(v, list) else v for k, v in stock.levels.items()}
    call = {
        "height": card.height,
        "width": card.width,
        **levels,
        source.family.guidance_key: guidance,
    }
    if card.max_sequence_length is not None:
        call["max_sequence_length"] = card.max_sequence_length
    return call


def imported_of(source: Source, form: str) -> list[str]:
    """The classes of diffusers that the script on the card names."""
    names = [source.family.pipeline_class]
    names += [source.family.network_class] if form != "pipeline" and not source.is_lora else []
    return sorted([*names, source.stock.scheduler] if form != "pipeline" else names)


def typed(values: dict[str, Any]) -> list[str]:
    """`key=value` for each keyword argument of a call in Python; those that are None are left
    out."""
    return [f"{key}={value!r}" for key, value in values.items() if value is not None]


def guidance_of(source: Source) -> str:
    """Which guidance the student draws with."""
    if source.guidance is not None:
        return f"{source.guidance:g}, fed to the network's guidance embedding"
    if source.family.embeds_guidance:
        return "none: the network has no guidance embedding, so `guidance_scale` changes nothing"
    off = source.stock.guidance
    return f"none: `{source.family.guidance_key}={off:g}` leaves out the unconditional half"


def shift_node(source: Source) -> str:
    """The node between ComfyUI's loader and sampler by which it draws at the trained levels."""
    family, anchors = source.family, source.card.anchors
    return family.comfyui(anchors, source.guidance) or (
        f"No scheduler of ComfyUI gives the trained {family.levels.name}, "
        f"{', '.join(f'{a:.4g}' for a in anchors)}: hand them to a custom sampler."
    )
