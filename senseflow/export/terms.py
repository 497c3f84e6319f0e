"""The licence that binds a student: its teacher's."""

import math
from dataclasses import replace
from pathlib import Path

from senseflow.teachers.family import Family
from senseflow.teachers.published import Terms
from senseflow.weights.stored import component_weights

BUFFERS = ("pos_embed.pos_embed",)  # among the weights, and not learned


def terms_of(family: Family, base: Path, named: Terms) -> Terms:
    """What is named, else what is known of a teacher with the public one's parameters.

    Raises ValueError for another licence without its name, and for a name without one.
    """
    if named.license is None and (named.license_name or named.license_link):
        raise ValueError("--license_name and --license_link are for --license other")
    if named.license == "other" and not named.license_name:
        raise ValueError("--license other needs --license_name, and --license_link to its text")
    public = family.published
    is_public = num_parameters(base / family.component) == public.num_parameters
    own = public.terms if is_public else Terms(None, None)
    terms = own if named.license is None else named
    return replace(terms, base_model=named.base_model or own.base_model)


def num_parameters(component: Path) -> int:
    """The parameters in a component folder, counted by their shapes alone."""
    weights = component_weights(component)
    return sum(math.prod(weights.read(key).shape) for key in weights.keys if key not in BUFFERS)
