"""The sampling loop against diffusers' LCM and DDIM schedulers and the formulas of the paper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from dmd2_core import (
    Denoiser,
    EDMSchedule,
    FlowSchedule,
    SeededNoise,
    StepPlan,
    VPSchedule,
    add_noise,
    few_step_sample,
    initial_sample,
)

SDXL: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
VP = VPSchedule.sdxl()
SHAPE = (2, 4, 8, 8)
FOUR = StepPlan.evenly(4)


def network(x: Tensor, t: Tensor, condition: None = None) -> Tensor:
    """A nonlinear stand-in that depends on the sample, the position and the time."""
    ramp = torch.linspace(-1, 1, 64, dtype=x.dtype).view(8, 8)
    return torch.tanh(0.7 * x + ramp) + torch.sin(t.view(-1, 1, 1, 1).to(x.dtype) / 100)


def denoise_with(schedule: VPSchedule, prediction: Any = "epsilon") -> Callable[..., Tensor]:
    denoiser = Denoiser(network, schedule, prediction)
    return lambda x, t: denoiser(x, t, None)


def randn(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fixed_noise(step: int, like: Tensor) -> Tensor:
    return randn(100 + step, like.dtype)


def forbidden_noise(step: int, like: Tensor) -> Tensor:
    raise AssertionError(f"noise was asked for at step {step}")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_four_steps_are_the_lcm_loop(prediction: str) -> None:
    zero_snr = prediction == "v_prediction"
    schedule = VP.zero_terminal_snr() if zero_snr else VP
    scheduler = LCMScheduler(
        **SDXL,
        prediction_type=prediction,
        original_inference_steps=1000,
        # LCM's boundary condition adds 0.25 / (scaling * t)^2 of x_t: 1e-20 at this scaling.
        timestep_scaling=1e7,
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # float64: compare loops, not tables
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    generator = torch.Generator().manual_seed(5)
    theirs = eps = randn(1)
    for t in scheduler.timesteps:
        output = network(theirs, t.expand(2))
        theirs, denoised = scheduler.step(output, t, theirs, generator=generator, return_dict=False)
    own = torch.Generator().manual_seed(5)
    ours = few_step_sample(
        denoise_with(schedule, "v" if zero_snr else "epsilon"),
        initial_sample(schedule, FOUR, eps),
        schedule,
        FOUR,
        noise=lambda step, like: torch.randn(like.shape, generator=own, dtype=like.dtype),
    )
    # Both loops are float64; errors grow by 14.6 at the first step.
    torch.testing.assert_close(ours, denoised, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_strength_zero_is_ddim(prediction: str, num_steps: int) -> None:
    zero_snr = prediction == "v_prediction"
    scheduler = DDIMScheduler(
        **SDXL,
        prediction_type=prediction,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    # Their own table, whose error is tested elsewhere, in float64.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = VPSchedule(scheduler.alphas_cumprod)
    scheduler.set_timesteps(num_steps)
    plan = StepPlan.evenly(num_steps)
    assert tuple(scheduler.timesteps.tolist()) == plan.timesteps
    theirs = x = randn(2)
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t.expand(2)), t, theirs).prev_sample
    denoise = denoise_with(schedule, "v" if zero_snr else "epsilon")
    ours = few_step_sample(denoise, x, schedule, plan, noise=forbidden_noise, strength=0.0)
    # float64 on both sides, amplified by 14.6 at the first step.
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_strength_mixes_fresh_and_implied_noise() -> None:
    plan = StepPlan(timesteps=(999, 499))
    x = randn(3)
    denoise = denoise_with(VP)
    t = torch.full((2,), 999)
    x0 = denoise(x, t)
    eps = 0.6 * fixed_noise(1, x) + 0.8 * network(x, t)  # 0.6^2 + 0.8^2 = 1
    expected = denoise(add_noise(VP, x0, eps, torch.full((2,), 499)), torch.full((2,), 499))
    for strength in (0.6, (0.6,)):
        got = few_step_sample(denoise, x, VP, plan, noise=fixed_noise, strength=strength)
        # The implied noise is (x - alpha x0) / sigma instead of the output: float64 rounding.
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_strengths_belong_to_steps() -> None:
    denoise, x = denoise_with(VP), randn(3)
    asked: list[int] = []

    def noise(step: int, like: Tensor) -> Tensor:
        asked.append(step)
        return fixed_noise(step, like)

    few_step_sample(denoise, x, VP, FOUR, noise=noise, strength=(0.0, 0.5, 0.0))
    assert asked == [2]
    # The entries keep their meaning when the run starts later.
    asked.clear()
    late = StepPlan.evenly(4, start=2)
    few_step_sample(denoise, x, VP, late, noise=noise, strength=(1.0, 1.0, 0.0))
    assert asked == []


def test_stop_gives_what_the_student_sees_at_that_step() -> None:
    denoise, x = denoise_with(VP), randn(4)
    seen: dict[int, Tensor] = {}
    full = few_step_sample(
        denoise, x, VP, FOUR, noise=fixed_noise, callback=lambda i, x_t, _: seen.update({i: x_t})
    )
    for k in range(4):
        stopped = few_step_sample(denoise, x, VP, FOUR, noise=fixed_noise, stop=k)
        assert torch.equal(stopped, seen[k])
    assert few_step_sample(denoise, x, VP, FOUR, noise=forbidden_noise, stop=0) is x
    assert torch.equal(denoise(seen[3], torch.full((2,), 249)), full)


def test_callback_sees_every_step() -> None:
    calls: list[tuple[int, Tensor, Tensor]] = []
    denoise = denoise_with(VP)
    final = few_step_sample(
        denoise, randn(5), VP, FOUR, noise=fixed_noise, callback=lambda *a: calls.append(a)
    )
    assert [index for index, _, _ in calls] == [0, 1, 2, 3]
    for index, x_t, x0_hat in calls:
        assert torch.equal(x0_hat, denoise(x_t, torch.full((2,), FOUR.timesteps[index])))
    assert torch.equal(calls[-1][2], final)


def test_one_step_at_conditioning_timestep_399() -> None:
    plan = StepPlan.evenly(1, conditioning_timestep=399)
    assert plan.timesteps == (999,)
    eps = randn(6)
    x = initial_sample(VP, plan, eps)
    # alpha^2 + sigma^2 is 1 to the last bit of float64.
    torch.testing.assert_close(x, eps, rtol=1e-15, atol=0)
    got = few_step_sample(denoise_with(VP), x, VP, plan, noise=forbidden_noise)
    abar = 0.4260863
    output = network(eps, torch.full((2,), 399))
    expected = (eps - (1 - abar) ** 0.5 * output) / abar**0.5
    # abar is given with 7 decimals; x0 is about 5.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_conditioning_timestep_in_k_diffusion_space() -> None:
    """In x / alpha, where ComfyUI samples, the same image comes out."""
    plan = StepPlan.evenly(1, conditioning_timestep=399)
    sigmas = VP.k_sigma(torch.tensor([999, 399])).tolist()
    k_plan = StepPlan(timesteps=(sigmas[0],), conditioning_timestep=sigmas[1])
    eps = randn(6)
    x = initial_sample(EDMSchedule(), k_plan, eps)
    # Spec of the host: pure noise scaled by sqrt(1 + sigma_399^2).
    torch.testing.assert_close(x, (1 + sigmas[1] ** 2) ** 0.5 * eps, rtol=1e-15, atol=0)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.tolist() == [sigmas[1]] * 2
        assert sigma.dtype == torch.float64
        alpha = (1 + sigma.view(-1, 1, 1, 1) ** 2).rsqrt()
        return denoise_with(VP)(x * alpha, torch.full((2,), 399))

    got = few_step_sample(denoise, x, EDMSchedule(), k_plan, noise=forbidden_noise)
    expected = few_step_sample(denoise_with(VP), eps, VP, plan, noise=forbidden_noise)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64 both


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_four_steps_in_k_diffusion_space(strength: float) -> None:
    """ComfyUI's space again, all steps and any share of fresh noise."""
    sigmas = VP.k_sigma(torch.tensor(FOUR.timesteps))
    k_plan = StepPlan(timesteps=tuple(sigmas.tolist()))
    eps = randn(7)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        step = int((sigmas - sigma[0]).abs().argmin())
        t = torch.full((2,), FOUR.timesteps[step])
        return denoise_with(VP)(x * VP.alpha(t).view(-1, 1, 1, 1), t)

    x = initial_sample(EDMSchedule(), k_plan, eps)
    got = few_step_sample(denoise, x, EDMSchedule(), k_plan, noise=fixed_noise, strength=strength)
    expected = few_step_sample(
        denoise_with(VP), eps, VP, FOUR, noise=fixed_noise, strength=strength
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)  # float64, 14.6 times


def test_image_to_image_starts_at_a_trained_step() -> None:
    plan = StepPlan.evenly(4, start=2)
    assert plan.active == (499, 249)
    x0, eps = randn(8), randn(9)
    x = initial_sample(VP, plan, eps, x0)
    abar = 0.2776697  # of 499, with 7 decimals
    expected = abar**0.5 * x0 + (1 - abar) ** 0.5 * eps
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    times: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        times.append(int(t[0]))
        return 0 * x

    few_step_sample(denoise, x, VP, plan, noise=lambda step, like: fixed_noise(step, like))
    assert times == [499, 249]
    with pytest.raises(ValueError, match="start is 2 but there is no image: pass x0"):
        initial_sample(VP, plan, eps)


def test_pure_noise_is_not_add_noise_and_keeps_its_bits() -> None:
    eps = randn(10, torch.float32)
    assert torch.equal(initial_sample(VP, FOUR, eps), eps)
    flow = StepPlan(timesteps=(1.0, 0.75, 0.5, 0.25))
    assert torch.equal(initial_sample(FlowSchedule(), flow, eps), eps)


@pytest.mark.parametrize(
    ("num_steps", "timesteps"),
    [
        (1, (999,)),
        (2, (999, 499)),
        (3, (999, 666, 333)),
        (4, (999, 749, 499, 249)),
        (8, (999, 874, 749, 624, 499, 374, 249, 124)),
    ],
)
def test_even_plans(num_steps: int, timesteps: tuple[int, ...]) -> None:
    assert StepPlan.evenly(num_steps).timesteps == timesteps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": ()}, "timesteps is empty"),
        ({"timesteps": (999, 999)}, "descend, got 999 after 999"),
        ({"timesteps": (249, 999)}, "descend, got 999 after 249"),
        ({"timesteps": (1000,)}, r"1000, outside the integers 0\.\.999"),
        ({"timesteps": (999, -1)}, r"-1, outside the integers"),
        ({"timesteps": (14.6, float("nan"))}, "has nan: give noise levels"),
        ({"timesteps": (float("inf"), 1.0)}, "has inf: give noise levels"),
        ({"timesteps": (10**400, 1.0)}, "give noise levels"),
        ({"timesteps": (999, True)}, "has True"),
        ({"timesteps": (999, "249")}, "has '249'"),
        ({"timesteps": (999, 499), "start": 2}, r"start is 2 .* 2 steps: choose .* 0\.\.1"),
        ({"timesteps": (999, 499), "start": -1}, "start is -1"),
        ({"timesteps": (999,), "conditioning_timestep": 1000}, "conditioning_timestep has 1000"),
        ({"timesteps": (999,), "conditioning_timestep": 1.5}, "conditioning_timestep has 1.5"),
        (
            {"timesteps": (999, 499), "start": 1, "conditioning_timestep": 399},
            "399 belongs to pure noise, but start is 1: leave one",
        ),
        (
            {"timesteps": (999, 749), "conditioning_timestep": 399},
            "timestep 399 comes before 749: use 1 step, or later timesteps below 399",
        ),
    ],
)
def test_bad_plans_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepPlan(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5: choose 0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": (1.0, 1.0)}, "2 values for 3 re-injections"),
        ({"strength": (1.0, -0.1, 1.0)}, "strength is -0.1"),
        ({"stop": 4}, r"stop is 4: choose 0\.\.3"),
        ({"stop": -1}, "stop is -1"),
    ],
)
def test_bad_runs_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_step_sample(denoise_with(VP), randn(0), VP, FOUR, noise=forbidden_noise, **arguments)


def test_too_many_or_no_steps() -> None:
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"num_steps is {num_steps}: choose 1\.\.1000"):
            StepPlan.evenly(num_steps)


def test_an_image_does_not_depend_on_its_batch() -> None:
    whole = SeededNoise(7)
    last = SeededNoise(7, first_index=1)
    x = randn(11, torch.float32)
    denoise = denoise_with(VP)
    both = few_step_sample(denoise, x, VP, FOUR, noise=whole)
    alone = few_step_sample(denoise, x[1:], VP, FOUR, noise=last)
    # Elementwise network: not even the last bit may differ.
    assert torch.equal(both[1:], alone)
