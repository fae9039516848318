"""Metrics against independent implementations and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from train_lora.metrics.diversity import diversity
from train_lora.metrics.frechet import frechet_distance


def test_frechet_distance_agrees_with_scipys_matrix_root() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    second = torch.randn(300, 12, generator=generator, dtype=torch.float64) @ mixing + 0.3
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = first.mean(0).numpy() - second.mean(0).numpy()
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    # Both in float64; sqrtm of an unsymmetric product is good to about 1e-8.
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_of_a_cloud_to_its_shifted_copy_is_the_squared_shift() -> None:
    cloud = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
    shift = torch.arange(8.0)
    # float32 inputs: the shift itself is rounded to about 1e-7 of the values.
    assert frechet_distance(cloud, cloud + shift) == pytest.approx(float(shift @ shift), rel=1e-5)


def test_frechet_distance_survives_fewer_samples_than_features() -> None:
    cloud = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    # A singular covariance: roots of rounded zeros, about sqrt(1e-16) each, are all that is left.
    assert frechet_distance(cloud, cloud) == pytest.approx(0.0, abs=1e-5)


def test_diversity_is_the_mean_distance_within_prompts_only() -> None:
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[100.0, 0.0], [100.0, 1.0]]])
    assert diversity(features) == pytest.approx((5.0 + 1.0) / 2)
