"""The Frechet distance on features whose answer is known."""

import functools
import operator

import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from senseflow.evaluate.metrics.frechet import FeatureStatistics, frechet_distance


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    return torch.randn(500, 12, generator=generator) @ mixing


def test_identical_sets_are_at_no_distance(features):
    statistics = FeatureStatistics.of(features)
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-8)


def test_a_shift_of_the_mean_adds_its_square(features):
    shift = torch.linspace(-1, 2, 12)
    distance = frechet_distance(
        FeatureStatistics.of(features), FeatureStatistics.of(features + shift)
    )
    assert distance == pytest.approx(shift.square().sum().item(), rel=1e-5)


def test_a_scale_on_one_axis_adds_its_squared_deviation():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    features = features - features.mean(0)
    scale = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    white = features @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(features.T))).T
    distance = frechet_distance(FeatureStatistics.of(white), FeatureStatistics.of(white * scale))
    assert distance == pytest.approx(1.0, rel=1e-9)


def test_parts_merge_to_the_whole(features):
    parts = [FeatureStatistics.of(part) for part in features.split(130)]
    merged = functools.reduce(operator.add, parts)
    whole = FeatureStatistics.of(features)
    assert merged.num == whole.num
    torch.testing.assert_close(merged.covariance(), whole.covariance())
    torch.testing.assert_close(whole.covariance(), torch.cov(features.double().T))


def test_it_agrees_with_torchmetrics(features):
    first = FeatureStatistics.of(features[:250])
    second = FeatureStatistics.of(1.5 * features[250:].roll(1, dims=1) + 0.3)
    theirs = _compute_fid(first.mean(), first.covariance(), second.mean(), second.covariance())
    assert frechet_distance(first, second) == pytest.approx(theirs.item(), rel=1e-6)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="2 samples"):
        FeatureStatistics.of(torch.zeros(1, 3)).covariance()
