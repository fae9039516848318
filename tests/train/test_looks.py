"""What pictures look like in numbers: closed forms and drawn cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train_lora.metrics.looks import (
    FLOOR,
    energy_distance,
    looks,
    ratio,
    statistics_distance,
    thumbnails,
)


def picture(red: float, green: float, blue: float, side: int = 32) -> Tensor:
    """Of one colour, given from 0 to 1: (1, 3, side, side) in [-1, 1]."""
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(1, 3, side, side) * 2 - 1


def test_a_plain_picture_has_brightness_and_colour_and_nothing_else() -> None:
    found = looks(picture(1.0, 0.5, 0.25))
    expected = {"brightness": 0.299 + 0.587 * 0.5 + 0.114 * 0.25, "colour": 0.75}
    # float32 pixels
    assert found == pytest.approx({"contrast": 0, "sharpness": 0} | expected, abs=1e-6)


def test_contrast_and_sharpness_of_stripes() -> None:
    """Columns of black and white in turn: every step across is 1, none goes down."""
    stripes = (torch.arange(32) % 2).float().view(1, 1, 1, 32).expand(1, 3, 32, 32) * 2 - 1
    found = looks(stripes)
    assert found["contrast"] == pytest.approx(0.5, abs=1e-6)
    assert found["sharpness"] == pytest.approx(1.0, abs=1e-6)
    wide = (torch.arange(32) // 16).float().view(1, 1, 1, 32).expand(1, 3, 32, 32) * 2 - 1
    assert looks(wide)["contrast"] == pytest.approx(0.5, abs=1e-6)
    assert looks(wide)["sharpness"] == pytest.approx(math.sqrt(1 / 31), abs=1e-6)


def test_looks_are_means_over_pictures() -> None:
    both = torch.cat([picture(0.2, 0.2, 0.2), picture(0.6, 0.6, 0.6)])
    assert looks(both)["brightness"] == pytest.approx(0.4, abs=1e-6)


def test_the_distance_of_two_thumbnails_is_the_root_mean_square_of_their_difference() -> None:
    first, second = thumbnails(torch.cat([picture(0.1, 0.2, 0.3), picture(0.4, 0.2, 0.3)]))
    assert first.shape == (3 * 16 * 16,)
    assert float((first - second).norm()) == pytest.approx(math.sqrt(0.3**2 / 3), rel=1e-5)
    noise = torch.rand(1, 3, 160, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cells = (noise.view(3, 16, 10, 16, 6).mean((2, 4)) + 1) / 2 / math.sqrt(768)
    torch.testing.assert_close(thumbnails(noise)[0], cells.flatten(), rtol=1e-5, atol=1e-7)


def test_energy_distance_by_hand() -> None:
    first = torch.tensor([[[0.0], [2.0]]])
    second = torch.tensor([[[1.0], [4.0]]])
    # Across, pairs of other seeds: |0 - 4| and |2 - 1|; within: 2 and 3.
    assert energy_distance(first, second) == pytest.approx(2 * 2.5 - 2 - 3)


def test_energy_distance_is_0_for_equal_clouds_and_sees_shift_and_collapse() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 200, 8, 4, generator=generator)
    assert energy_distance(first, first) == pytest.approx(0, abs=1e-12)
    # Independent draws of one distribution: the estimate's own error, about 0.02 for 200 x 8.
    assert abs(energy_distance(first, second)) < 0.1
    assert energy_distance(first, second + 1.0) > 1.0
    collapsed = second[:, :1].expand_as(second)
    assert energy_distance(first, collapsed) > 1.0


def test_ratios_and_their_summary() -> None:
    assert ratio(0.3, 0.2) == pytest.approx(1.5)
    assert ratio(0.0, 0.0) == 1.0
    assert ratio(0.0, 0.5) == pytest.approx(FLOOR / 0.5)
    assert statistics_distance({"a": 1.0, "b": 1.0}) == 0
    up_and_down = {"a": 2.0, "b": 0.5}
    assert statistics_distance(up_and_down) == pytest.approx(math.log(2))
