"""The Frechet distance between two sets of features: FID, FID-T, patch FID, by what is given."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors, in float64.

    All three are sums over samples, so statistics of parts (batches, ranks) add up to the whole.
    """

    num: int
    total: torch.Tensor  # (D,)
    outer: torch.Tensor  # (D, D)

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureStatistics":
        """Statistics of `features` (N, D), of any floating type and device."""
        features = features.detach().double().cpu()
        if not features.isfinite().all():
            raise ValueError(
                "features of images are not finite: the images, or the network, are not"
            )
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of both sets of samples together."""
        return FeatureStatistics(
            self.num + other.num, self.total + other.total, self.outer + other.outer
        )

    def mean(self) -> torch.Tensor:
        """Mean feature vector (D,)."""
        return self.total / self.num

    def covariance(self) -> torch.Tensor:
        """Unbiased covariance (D, D); needs at least two samples."""
        if self.num < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.num}")
        mean = self.mean()
        return (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)


def _symmetric_sqrt(matrix: torch.Tensor) -> torch.Tensor:
    """The square root of a symmetric positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(matrix)
    root: torch.Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), Heusel et al. 2017, equation (6)."""
    covariance_1, covariance_2 = first.covariance(), second.covariance()
    root_1 = _symmetric_sqrt(covariance_1)
    cross = torch.linalg.eigvalsh(root_1 @ covariance_2 @ root_1).clamp(min=0).sqrt().sum()
    distance = (first.mean() - second.mean()).square().sum()
    return float(distance + covariance_1.trace() + covariance_2.trace() - 2 * cross)
