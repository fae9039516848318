"""Coefficients against the closed forms of the paper and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from dmd2_core import (
    EDMSchedule,
    FlowSchedule,
    SteppedSchedule,
    VPSchedule,
    add_noise,
    coefficients,
    k_sigma,
)

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("t", "abar", "ratio"),
    [
        (999, 0.0046601, 14.61464),
        (749, 0.0566235, 4.08173),
        (499, 0.2776697, 1.61289),
        (399, 0.4260863, 1.16058),
        (249, 0.6754324, 0.69320),
    ],
)
@pytest.mark.parametrize("schedule", [VPSchedule.sdxl(), VPSchedule.sd15()])
def test_vp_tables(schedule: VPSchedule, t: int, abar: float, ratio: float) -> None:
    time = torch.tensor(t)
    # The table is printed with 7 and 5 decimals, cut or rounded: one unit in the last place.
    assert schedule.alpha(time).item() ** 2 == pytest.approx(abar, abs=1e-7)
    assert schedule.sigma(time).item() ** 2 == pytest.approx(1 - abar, abs=1e-7)
    assert schedule.k_sigma(time).item() == pytest.approx(ratio, abs=1e-5)


def test_vp_is_variance_preserving_and_float64() -> None:
    schedule = VPSchedule.sdxl()
    t = torch.arange(1000).view(10, 100)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.shape == t.shape
    assert alpha.dtype == sigma.dtype == torch.float64
    # Two square roots and squares in float64: a few units of 1.1e-16.
    torch.testing.assert_close(
        alpha**2 + sigma**2, torch.ones(10, 100).double(), rtol=0, atol=1e-15
    )


def test_zero_terminal_snr_agrees_with_diffusers_and_keeps_the_first_step() -> None:
    ours = VPSchedule.sdxl().zero_terminal_snr()
    theirs = DDIMScheduler(**SDXL, rescale_betas_zero_snr=True).alphas_cumprod.double()
    # Theirs multiplies 1000 factors in float32 (each off by 6e-8 at most, random signs).
    torch.testing.assert_close(ours.alphas_cumprod, theirs, rtol=3e-5, atol=1e-7)
    t = torch.tensor([0, 999])
    assert ours.alpha(t)[1] == 0.0
    assert ours.sigma(t)[1] == 1.0
    assert ours.k_sigma(t)[1] == torch.inf
    assert ours.has_zero_terminal_snr
    assert not VPSchedule.sdxl().has_zero_terminal_snr
    # One multiplication and division in float64.
    first = VPSchedule.sdxl().alphas_cumprod[0]
    torch.testing.assert_close(ours.alphas_cumprod[0], first, rtol=1e-15, atol=0)


def test_add_noise_agrees_with_ddim() -> None:
    scheduler = DDIMScheduler(**SDXL)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 8, 8, generator=generator)
    t = torch.tensor([999, 749, 499, 249, 0])
    noised = add_noise(VPSchedule.sdxl(), x0, eps, t)
    # Their table is float32 (see above); values up to about 4.
    torch.testing.assert_close(noised, scheduler.add_noise(x0, eps, t), rtol=1e-5, atol=1e-5)
    assert noised.dtype == torch.float32


def test_add_noise_rounds_once() -> None:
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([20, 500, 980])
    exact = add_noise(VPSchedule.sdxl(), x0.double(), eps.double(), t)
    assert torch.equal(add_noise(VPSchedule.sdxl(), x0, eps, t), exact.float())


def test_flow_agrees_with_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    steps = scheduler.timesteps[[0, 400, 999]]
    times = scheduler.sigmas[[0, 400, 999]]
    # Float32 products of values up to about 4 against one rounding of ours.
    torch.testing.assert_close(
        add_noise(FlowSchedule(), x0, eps, times),
        scheduler.scale_noise(x0, steps, eps),
        rtol=1e-6,
        atol=1e-6,
    )


def test_edm_levels_agree_with_diffusers() -> None:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(1000)
    levels = EDMSchedule().karras_levels()
    # Theirs is a 7th power in float32: 7 * 6e-8 and the rounding of the root.
    torch.testing.assert_close(levels, scheduler.sigmas[:-1].double(), rtol=3e-6, atol=0)
    assert levels[0].item() == pytest.approx(80.0)
    assert levels[-1].item() == pytest.approx(0.002)
    assert torch.equal(EDMSchedule().sigma(levels), levels)
    assert torch.equal(EDMSchedule().alpha(levels), torch.ones(1000).double())
    assert torch.equal(k_sigma(EDMSchedule(), levels), levels)


def test_edm_steps_are_karras_levels_from_clean_to_noisy() -> None:
    steps = torch.tensor([[0, 20], [980, 999]])
    clean, noisy = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    by_hand = [(clean + step / 999 * (noisy - clean)) ** 7 for step in (0, 20, 980, 999)]
    levels = SteppedSchedule.edm().time(steps)
    # Powers of 1/7 and 7 in float64, the second multiplying the error of the first by 7.
    torch.testing.assert_close(
        levels, torch.tensor(by_hand, dtype=torch.float64).view(2, 2), rtol=1e-13, atol=0
    )
    every = SteppedSchedule.edm().time(torch.arange(1000))
    assert torch.equal(every.flip(0), EDMSchedule().karras_levels())
    assert torch.equal(SteppedSchedule.edm().sigma(steps), levels)
    assert torch.equal(SteppedSchedule.edm().alpha(steps), torch.ones(2, 2).double())


def test_flow_steps_are_thousandths_of_the_way_to_noise() -> None:
    schedule, steps = SteppedSchedule.flow(), torch.tensor([0, 499, 999])
    assert schedule.sigma(steps).tolist() == [0.001, 0.5, 1.0]
    assert schedule.alpha(steps).tolist() == [0.999, 0.5, 0.0]
    assert schedule.num_timesteps == 1000


def test_steps_must_lead_from_clean_to_noisy() -> None:
    with pytest.raises(ValueError, match="cleanest step to the noisiest"):
        SteppedSchedule(EDMSchedule(), EDMSchedule().karras_levels())


def test_edm_noising_adds_sigma_times_noise() -> None:
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    sigma = SteppedSchedule.edm().time(torch.tensor([0, 500, 999]))
    noised = add_noise(EDMSchedule(), x0, eps, sigma)
    assert torch.equal(noised, x0 + sigma.view(3, 1, 1, 1) * eps)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (torch.tensor([1000]), r"1000 is outside 0\.\.999"),
        (torch.tensor([0.5]), "are integers here"),
    ],
)
def test_wrong_edm_steps_are_refused(steps: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteppedSchedule.edm().time(steps)


def test_coefficients_broadcast_over_the_batch() -> None:
    like = torch.zeros(3, 4, 8, 8)
    alpha, sigma = coefficients(VPSchedule.sdxl(), torch.tensor([0, 10, 999]), like)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == torch.float64
    alpha, _ = coefficients(VPSchedule.sdxl(), torch.tensor(999), like)
    assert alpha.shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\(2,\).*3 samples.*one time per sample"):
        coefficients(VPSchedule.sdxl(), torch.tensor([0, 10]), like)


@pytest.mark.parametrize("t", [-1, 1000])
def test_times_outside_the_table_are_named(t: int) -> None:
    with pytest.raises(ValueError, match=rf"timestep {t} is outside 0\.\.999"):
        VPSchedule.sdxl().alpha(torch.tensor([5, t]))


def test_fractional_times_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32: use t\.long"):
        VPSchedule.sdxl().sigma(torch.tensor([5.0]))


@pytest.mark.parametrize(
    ("table", "message"),
    [([[0.9, 0.8]], r"\(1, 2\)"), ([0.5, 0.6], "decrease"), ([1.2, 0.5], "1.2"), ([0.9], "T >= 2")],
)
def test_a_wrong_table_is_refused(table: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPSchedule(torch.tensor(table))


def test_wrong_edm_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_min 3\.0"):
        EDMSchedule(sigma_min=3.0, sigma_max=2.0)
    with pytest.raises(ValueError, match="num is 1"):
        EDMSchedule().karras_levels(1)
