"""Which family an input is of; one of another family is answered with the script to use."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from senseflow.config.recipes import FAMILIES, RECIPES
from senseflow.teachers.family import Family
from senseflow.teachers.folder import pipeline_class_of, require_components
from senseflow.weights.quantized import require_plain


def family_of(base: Path, flag: str) -> Family:
    """The family of a pipeline folder, by its model_index.json.

    flag: what the folder was given as. Raises ValueError when it is of none, or may be of two.
    """
    found = pipeline_class_of(base, f"{flag} {base} is not a diffusers pipeline folder")
    alike = [f for f in FAMILIES if f.pipeline_class == found]
    if not alike:
        known = ", ".join(sorted({f.pipeline_class for f in FAMILIES}))
        raise ValueError(f"{flag} {base} is a {found}; there are students of {known}")
    meant = [f for f in alike if f.is_this_size(base)]
    if not meant:
        known = " and ".join(f.title for f in alike)
        raise ValueError(
            f"{flag} {base} is {alike[0].model_of(base)}; there are students of {known}"
        )
    if len(meant) > 1:
        titles = " or ".join(f.title for f in meant)
        raise ValueError(
            f"{flag} {base} may be {titles}: it has no {meant[0].component}/config.json to tell"
        )
    require_components(base, meant[0].optional)
    meant[0].require_widths(base)
    return meant[0]


def check_base(family: Family, base: Path) -> None:
    """Raise ValueError unless the folder is a pipeline of this family."""
    found = pipeline_class_of(
        base, f"{family.base_flag} {base} is not a diffusers folder of {family.title}"
    )
    meant = [f for f in FAMILIES if f.pipeline_class == found and f.is_this_size(base)]
    if found != family.pipeline_class:
        raise ValueError(
            f"{family.base_flag} {base} is a {found}; {family.title} is a "
            f"{family.pipeline_class}{_use(meant)}"
        )
    if family.title not in {f.title for f in meant}:
        raise ValueError(
            f"{family.base_flag} {base} is {family.model_of(base)}, not {family.title}{_use(meant)}"
        )
    require_components(base, family.optional)
    family.require_widths(base)


def check_card_family(family: Family, checkpoint: Path, name: str) -> None:
    """Raise ValueError unless the family of a student's card is this one."""
    if name != family.name:
        others = [f for f in FAMILIES if f.name == name]
        raise ValueError(
            f"checkpoint {checkpoint} is a student of family {name}, not {family.name}: name the "
            f"teacher that it was distilled from{_use(others)}"
        )


def check_config(family: Family, file: Path, config: dict[str, Any]) -> None:
    """Raise ValueError when a config.json is that of another family's network."""
    found = config.get("_class_name")
    require_plain(str(file), config)
    others = [f for f in FAMILIES if f.network_class == found]
    if others and found != family.network_class:
        raise ValueError(
            f"{file} is of a {found}; {family.title} has a {family.network_class}{_use(others)}"
        )


def check_keys(family: Family, file: Path, keys: Iterable[str]) -> None:
    """Raise ValueError when weights are plainly another family's."""
    keys = list(keys)
    others = [f for f in FAMILIES if any(key.startswith(f.key_marks) for key in keys)]
    if others and family.name not in {f.name for f in others}:
        raise ValueError(
            f"the weights in {file} are of a {others[0].network_class}; {family.title} has a "
            f"{family.network_class}{_use(others)}"
        )


def _use(families: list[Family]) -> str:
    titles = {f.title for f in families}
    drawn = dict.fromkeys(r.draws for r in RECIPES.values() if r.family.title in titles)
    scripts = " or ".join(drawn)
    return f": use {scripts}" if scripts else ""
