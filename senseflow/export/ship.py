"""From checked flags to a folder that can be shipped: the student in a form, its card, its copy of
the teacher's licence; and to the Hub, where that is asked for."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from senseflow.common.files import only_writer
from senseflow.common.quiet import quiet_libraries
from senseflow.config.sections import Dtype
from senseflow.engine.export import whole_folder
from senseflow.evaluate.results import Result
from senseflow.export import hub
from senseflow.export.card import CardFacts, read_evaluation, write_model_card
from senseflow.export.folders import fill
from senseflow.export.samples import copy_samples, read_samples
from senseflow.export.source import Source, find_source, in_steps
from senseflow.export.terms import terms_of
from senseflow.teachers.published import Terms

logger = logging.getLogger("senseflow")


@dataclass(frozen=True)
class Export:
    """What is written in which form, what its card says, and where it is sent: the flags."""

    checkpoint: Path | None  # None: what is at `output` is only to be sent
    output: Path
    form: str
    ema: bool
    steps: int | None  # None: at all anchors
    dtype: Dtype | None
    pretrained_model: Path | None
    link: bool
    name: str | None
    prompt: str
    base_model: str | None
    license: str | None
    license_name: str | None
    license_link: str | None
    results: list[Path]
    row: str | None
    samples: list[Path]
    push_to_hub: str | None
    dry_run: bool
    public: bool


def ship(wanted: Export) -> None:
    """Write the folder, unless it is there and is only to be sent; then send it, or say what would
    go.

    Raises ValueError for what cannot be exported, OSError for what cannot be written or sent.
    """
    quiet_libraries()
    if wanted.push_to_hub:
        hub.check_push(wanted.push_to_hub, wanted.dry_run)
    if wanted.checkpoint is None:
        hub.check_shipped(wanted.output)
    else:
        write(wanted, wanted.checkpoint)
    if wanted.push_to_hub and wanted.dry_run:
        logger.info("%s", hub.listing(wanted.output, wanted.push_to_hub, wanted.public))
    elif wanted.push_to_hub:
        hub.push(wanted.output, wanted.push_to_hub, wanted.public)


def write(wanted: Export, checkpoint: Path) -> None:
    """The folder, whole or not at all."""
    source = find_source(checkpoint, wanted.pretrained_model, wanted.ema, wanted.dtype)
    if wanted.steps is not None:
        source = in_steps(source, wanted.steps)
    if wanted.form == "lora" and not source.is_lora:
        raise ValueError(
            f"{checkpoint} was trained in full: python -m senseflow.extract_lora --base "
            f"{source.base} --student {checkpoint} --rank 64 --output {wanted.output} makes a LoRA "
            "of it"
        )
    facts = card_facts(wanted, source)
    if wanted.push_to_hub and (missing := missing_in(facts.terms)):
        raise ValueError(
            f"--push_to_hub: {source.base} is not {source.family.title} itself: say its "
            f"{missing[1]}"
        )
    output = wanted.output
    with only_writer(output), whole_folder(output) as partial:
        fill(wanted.form, partial, source, output.name, wanted.link)
        copy_samples(partial, facts.samples)
        # the texts that must go with every copy of the weights
        for file in [*source.base.glob("LICENSE*"), *source.base.glob("NOTICE*")]:
            shutil.copyfile(file, partial / file.name)
        write_model_card(partial, source, facts)
    logger.info("%s", said_terms(facts.terms))
    what = "EMA of the student" if source.card.ema else "student"
    dtype = str(source.layout.dtype).removeprefix("torch.")
    logger.info("%s of iteration %d in %s, %s", what, source.card.iteration, output, dtype)


def said_terms(terms: Terms) -> str:
    """What the card says of teacher and licence, and what to do if that is wrong."""
    if missing := missing_in(terms):
        return f"README.md lacks the teacher's {missing[0]}: say {missing[1]} before you share it"
    return (
        f"README.md names the teacher {terms.base_model}, licence "
        f"{terms.license_name or terms.license}; if it is another, say --base_model and --license"
    )


def missing_in(terms: Terms) -> tuple[str, str] | None:
    """Which of the teacher's name and licence is not known, and the flags that say it."""
    stated = {
        "name": ("--base_model", terms.base_model),
        "licence": ("--license", terms.license),
    }
    lacking = {what: flag for what, (flag, value) in stated.items() if value is None}
    return (" and ".join(lacking), " and ".join(lacking.values())) if lacking else None


def card_facts(wanted: Export, source: Source) -> CardFacts:
    """What the flags say for the card; raises ValueError before anything is written."""
    results = read_evaluation(wanted.results)
    named = Terms(wanted.base_model, wanted.license, wanted.license_name, wanted.license_link)
    return CardFacts(
        name=wanted.name or wanted.output.name,
        form=wanted.form,
        place=wanted.push_to_hub or wanted.output.name,
        file=wanted.output.name,
        terms=terms_of(source.family, source.base, named),
        results=results,
        row=own_row(wanted.row, results),
        samples=read_samples(wanted.samples),
        prompt=wanted.prompt,
    )


def own_row(row: str | None, results: list[Result]) -> str | None:
    """The student's row of the results: the one that is named, or the only one."""
    names = list(dict.fromkeys(entry["name"] for entry in results))
    if row is None:
        return names[0] if len(names) == 1 else None
    if row not in names:
        raise ValueError(f"--row {row} is none of the results' rows {', '.join(names) or '(none)'}")
    return row
