"""Guidance in x0 against guidance in the network's own space."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dmd2_core import (
    Denoiser,
    Prediction,
    VPSchedule,
    classifier_free_guidance,
    coefficients,
    guided,
    to_x0,
)

VP = VPSchedule.sdxl()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_equals_guidance_of_the_output(prediction: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, cond, uncond = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    alpha, sigma = coefficients(VP, torch.tensor([999, 250]), x_t)
    expected = to_x0(prediction, uncond + 8.0 * (cond - uncond), x_t, alpha, sigma)
    got = classifier_free_guidance(
        to_x0(prediction, cond, x_t, alpha, sigma),
        to_x0(prediction, uncond, x_t, alpha, sigma),
        8.0,
    )
    # float64, amplified by 14.6 * 8.
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def recording(calls: list[tuple[int, object]]) -> Denoiser[Tensor]:
    def network(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        calls.append((len(x_t), condition))
        return torch.tanh(x_t) + condition.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000

    return Denoiser(network, VP, "epsilon")


def test_one_call_with_both_halves() -> None:
    calls: list[tuple[int, object]] = []
    denoiser = recording(calls)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, cond, uncond = torch.tensor([500, 100]), torch.tensor([0.3, 0.5]), torch.zeros(2)
    got = guided(denoiser, 3.0)(x_t, t, cond, uncond)
    assert [size for size, _ in calls] == [4]
    expected = classifier_free_guidance(denoiser(x_t, t, cond), denoiser(x_t, t, uncond), 3.0)
    # The same elementwise float32 operations in another batch; vector tails may round apart.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)


def test_scale_one_skips_the_unconditional_half() -> None:
    calls: list[tuple[int, object]] = []
    cond = torch.tensor([0.3, 0.5])
    x_t = torch.zeros(2, 4, 8, 8)
    guided(recording(calls), 1.0)(x_t, torch.tensor([5, 6]), cond, torch.zeros(2))
    assert len(calls) == 1
    assert calls[0][0] == 2
    assert calls[0][1] is cond


class Captions(NamedTuple):
    values: Tensor

    @staticmethod
    def cat(parts: "list[Captions]") -> "Captions":
        return Captions(torch.cat([part.values for part in parts]))


def test_conditions_join_themselves() -> None:
    def network(x_t: Tensor, t: Tensor, condition: Captions) -> Tensor:
        return condition.values.view(-1, 1, 1, 1).expand_as(x_t)

    denoise = guided(Denoiser(network, VP, "sample"), 2.0)
    x_t = torch.zeros(2, 4, 8, 8)
    got = denoise(x_t, torch.tensor([5, 6]), Captions(torch.ones(2)), Captions(torch.zeros(2)))
    assert torch.equal(got, torch.full_like(x_t, 2.0))


def test_a_negative_scale_is_refused() -> None:
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="guidance scale is"):
            guided(recording([]), scale)
