"""What the judge measures of pictures beside a family's own samples."""

import math
from pathlib import Path

import pytest
import torch

from senseflow.tiny.captions import attributes_of
from senseflow.tiny.judge import Judge, diversity
from senseflow.tiny.measure import measure_row
from senseflow.tiny.pictures import evaluation_prompts, render

JUDGE = Path("assets/tiny/common/judge")


def test_diversity_is_of_all_pairs_or_of_those_chosen():
    """Triangles of sides 3, 4, 5 and 6, 8, 10."""
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    features = torch.stack([triangle, 2 * triangle])
    assert diversity(features) == pytest.approx((3 + 4 + 5 + 6 + 8 + 10) / 6)
    chosen = torch.tensor([[True, True, False], [False, True, True]])
    assert diversity(features, chosen) == pytest.approx((3 + 10) / 2)
    assert diversity(features, torch.ones(2, 3, dtype=torch.bool)) == diversity(features)
    assert math.isnan(diversity(features, torch.eye(3, dtype=torch.bool)[:2]))


def test_pictures_with_errors_are_left_out_of_the_diversity_of_right_ones():
    """Pictures of another prompt are far from all others, and wrong."""
    judge, prompts = Judge.load(JUDGE), evaluation_prompts(40, held_out=False)
    generator = torch.Generator().manual_seed(0)
    right = [render(attributes_of(prompts), generator) for _ in range(2)]
    wrong = render(attributes_of([*prompts[1:], prompts[0]]), generator)
    two, three = (measure_row(judge, torch.stack(x), prompts, {}) for x in (right, [*right, wrong]))
    assert two["all"] > 0.95 and three["all"] < 0.7
    assert three["diversity"] > 1.5 * two["diversity"]
    assert three["diversity_right"] == pytest.approx(two["diversity_right"])
    none = measure_row(judge, torch.stack([wrong, wrong]), prompts, {})
    assert "diversity_right" not in none
