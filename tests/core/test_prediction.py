"""Conversions between what networks predict and x0: round trips, zero SNR, EDM preconditioning."""

import math
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from torch import Tensor

from dmd2_core import (
    Denoiser,
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    Prediction,
    VPSchedule,
    add_noise,
    coefficients,
    edm_preconditioned,
    edm_scalings,
    from_x0,
    target,
    to_x0,
)

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
VP = VPSchedule.sdxl()
CASES: dict[str, tuple[NoiseSchedule, Tensor]] = {
    "vp": (VP, torch.tensor([999, 749, 0])),
    "zero_snr": (VP.zero_terminal_snr(), torch.tensor([999, 749, 0])),
    "edm": (EDMSchedule(), torch.tensor([80.0, 1.0, 0.002])),
    "flow": (FlowSchedule(), torch.tensor([1.0, 0.5, 0.01])),
}


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x0, eps


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_means_x0_and_back(prediction: Prediction, name: str) -> None:
    schedule, t = CASES[name]
    if prediction == "epsilon" and name in ("zero_snr", "flow"):
        t = t[1:].repeat(2)[:3]  # eps says nothing about x0 at alpha = 0
    x0, eps = pair()
    alpha, sigma = coefficients(schedule, t, x0)
    x_t = add_noise(schedule, x0, eps, t)
    output = target(prediction, x0, eps, alpha, sigma)
    recovered = to_x0(prediction, output, x_t, alpha, sigma)
    # float64 amplified by sigma / alpha, at most 80 (EDM): 80 * 1.1e-16 * |x| ~ 4.
    torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-12)
    # The inverse divides by sigma: 1 / 0.002 at the least, squared by the error of x_t - x0.
    torch.testing.assert_close(
        from_x0(prediction, x0, x_t, alpha, sigma), output, rtol=0, atol=1e-11
    )


def test_v_is_finite_and_exact_at_zero_snr() -> None:
    x0, eps = pair(torch.float32)
    schedule = VP.zero_terminal_snr()
    alpha, sigma = coefficients(schedule, torch.full((3,), 999), x0)
    x_t = add_noise(schedule, x0, eps, torch.full((3,), 999))
    assert torch.equal(x_t, eps)
    # alpha = 0, sigma = 1: v = -x0, exactly.
    assert torch.equal(target("v", x0, eps, alpha, sigma), -x0)
    assert torch.equal(to_x0("v", -x0, x_t, alpha, sigma), x0)
    assert torch.equal(from_x0("v", x0, x_t, alpha, sigma), -x0)
    assert torch.equal(from_x0("epsilon", x0, x_t, alpha, sigma), eps)
    # The implied v is finite whatever x0 the network claims.
    assert from_x0("v", 3 * x0, x_t, alpha, sigma).isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_x0_agrees_with_ddim(prediction: str) -> None:
    names: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.alphas_cumprod = VP.alphas_cumprod  # compare formulas, not tables
    scheduler.set_timesteps(4)
    output, x_t = pair()
    alpha, sigma = coefficients(VP, torch.full((3,), 999), x_t)
    theirs = scheduler.step(output, 999, x_t).pred_original_sample
    # Both float64; epsilon is amplified by 14.6.
    torch.testing.assert_close(
        to_x0(names[prediction], output, x_t, alpha, sigma), theirs, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_conversion_rounds_once(prediction: Prediction) -> None:
    output, x_t = pair(torch.float32)
    alpha, sigma = coefficients(VP, torch.full((3,), 999), x_t)
    exact = to_x0(prediction, output.double(), x_t.double(), alpha, sigma)
    assert torch.equal(to_x0(prediction, output, x_t, alpha, sigma), exact.float())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_has_the_right_gradients(prediction: Prediction) -> None:
    output, x_t = (x[:, :1, :2, :2].clone().requires_grad_() for x in pair())
    alpha, sigma = coefficients(VP, torch.tensor([749, 499, 20]), x_t)

    def convert(output: Tensor, x_t: Tensor) -> Tensor:
        return to_x0(prediction, output, x_t, alpha, sigma) + 0 * x_t

    # The functions are linear, so gradcheck's finite differences are exact but for rounding.
    assert torch.autograd.gradcheck(convert, (output, x_t))


def test_denoiser_passes_time_and_condition_through() -> None:
    x0, eps = pair(torch.float32)
    t = torch.tensor([999, 749, 249])
    seen: list[object] = []

    def network(x_t: Tensor, t: Tensor, condition: str) -> Tensor:
        seen.extend([t, condition])
        return eps.to(torch.bfloat16)

    x_t = add_noise(VP, x0, eps, t)
    result = Denoiser(network, VP, "epsilon")(x_t, t, "a red ring")
    assert seen[0] is t
    assert seen[1] == "a red ring"
    assert result.dtype == torch.float32
    # bf16 noise: relative error 2^-9 of |eps| ~ 4, times 14.6.
    torch.testing.assert_close(result, x0, rtol=0, atol=4 * 14.7 / 2**9)


def test_epsilon_with_zero_snr_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'epsilon' gives no x0.*use 'v'"):
        Denoiser(lambda x, t, c: x, VP.zero_terminal_snr(), "epsilon")
    with pytest.raises(ValueError, match="'eps' is unknown: use one of epsilon, v, sample, flow"):
        Denoiser(lambda x, t, c: x, VP, "eps")  # type: ignore[arg-type]


def test_edm_preconditioning_agrees_with_diffusers() -> None:
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    x_t, _ = pair()
    sigma = torch.tensor([0.01, 1.0, 80.0], dtype=torch.float64)

    def raw(x: Tensor, c_noise: Tensor, condition: None) -> Tensor:
        return torch.tanh(x) + c_noise.view(-1, 1, 1, 1)

    denoiser = Denoiser(edm_preconditioned(raw), EDMSchedule(), "sample")
    wide = sigma.view(-1, 1, 1, 1)
    inner = raw(scheduler.precondition_inputs(x_t, wide), scheduler.precondition_noise(sigma), None)
    theirs = scheduler.precondition_outputs(x_t, inner, wide)
    # Same formulas in float64.
    torch.testing.assert_close(denoiser(x_t, sigma, None), theirs, rtol=1e-13, atol=1e-13)


def test_edm_scalings_keep_the_raw_networks_variances_at_one() -> None:
    sigma = torch.tensor([0.002, 0.3, 0.5, 7.0, 80.0], dtype=torch.float64)
    skip, out, inner, _ = edm_scalings(sigma, 0.5)
    data, ones = 0.5, torch.ones(5).double()
    # Input c_in * x and target (x0 - c_skip * x) / c_out, for data of variance data^2: float64.
    torch.testing.assert_close(inner**2 * (data**2 + sigma**2), ones, rtol=1e-14, atol=0)
    target_variance = ((1 - skip) ** 2 * data**2 + skip**2 * sigma**2) / out**2
    # 1 - skip loses digits where skip is within (sigma / data)^2 = 2e-5 of one.
    torch.testing.assert_close(target_variance, ones, rtol=1e-10, atol=0)
    # At sigma = sigma_data, where signal and noise are equal.
    at = edm_scalings(torch.tensor(0.5, dtype=torch.float64))
    assert [value.item() for value in at] == pytest.approx(
        [0.5, 0.5 / 2**0.5, 2**0.5, math.log(0.5) / 4], rel=1e-15
    )
