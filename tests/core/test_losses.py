"""Losses against closed forms, numerical gradients and each other."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2_core import (
    EDMSchedule,
    Prediction,
    SteppedSchedule,
    VPSchedule,
    add_noise,
    coefficients,
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    edm_loss_weight,
    edm_preconditioned,
    edm_scalings,
    gan_critic_loss,
    gan_generator_loss,
    regression_loss,
    sample_gradient,
    target,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_matching_gradient_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    real = torch.tensor([[0.0, 5.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    fake = torch.tensor([[2.0, 1.0], [4.0, 1.0]]).view(2, 1, 1, 2)
    # mean |x - real| is (1 + 3) / 2 = 2 for the first sample and 1 for the second.
    expected = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).view(2, 1, 1, 2)
    assert torch.equal(distribution_matching_gradient(x, real, fake), expected)


def test_matching_gradient_is_per_sample_and_scale_free() -> None:
    x, real, fake = randn(3, 2, 4, 8, 8)
    whole = distribution_matching_gradient(x, real, fake)
    # Multiplying by a power of two changes no bit of a ratio.
    assert torch.equal(distribution_matching_gradient(4 * x, 4 * real, 4 * fake), whole)
    alone = distribution_matching_gradient(x[1:], real[1:], fake[1:])
    # A mean of 256 float64 numbers may be summed in another order.
    torch.testing.assert_close(alone, whole[1:], rtol=1e-14, atol=0)


def test_matching_gradient_of_undefined_samples_is_zero() -> None:
    x, real, fake = randn(3, 4, 1, 2, 2)
    real[0] = fake[0] = x[0]  # 0 / 0
    real[1] = x[1]  # something / 0
    real[2, 0, 0, 0] = torch.nan
    gradient = distribution_matching_gradient(x, real, fake)
    assert torch.equal(gradient[:3], torch.zeros(3, 1, 2, 2).double())
    assert (gradient[3] != 0).all()


def test_matching_gradient_in_bf16_is_computed_in_float32() -> None:
    x, real, fake = randn(3, 2, 4, 8, 8, dtype=torch.bfloat16)
    gradient = distribution_matching_gradient(x, real, fake)
    assert gradient.dtype == torch.float32
    expected = distribution_matching_gradient(x.float(), real.float(), fake.float())
    assert torch.equal(gradient, expected)


def test_matching_gradient_needs_no_autograd() -> None:
    x, real, fake = randn(3, 2, 4, 8, 8).requires_grad_().unbind()
    assert not distribution_matching_gradient(x, real, fake).requires_grad


def test_matching_loss_has_the_gradient_it_was_given() -> None:
    x, gradient = randn(2, 2, 4, 8, 8)
    x.requires_grad_()
    loss = distribution_matching_loss(x, gradient)
    # x - (x - gradient) rounds: 1.1e-16 of |x| ~ 4, relative to |gradient| down to 1e-3.
    torch.testing.assert_close(loss, 0.5 * gradient.square().mean(), rtol=1e-12, atol=0)
    (derivative,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(derivative, gradient / x.numel(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_denoising_loss(prediction: Prediction) -> None:
    x0, eps, noise = randn(3, 2, 4, 3, 3)
    alpha, sigma = coefficients(VPSchedule.sdxl(), torch.tensor([999, 300]), x0)
    perfect = target(prediction, x0, eps, alpha, sigma)
    assert denoising_loss(prediction, perfect, x0, eps, alpha, sigma).item() == 0.0
    output = (perfect + noise).requires_grad_()
    # float64 means in two orders of summation.
    loss = denoising_loss(prediction, output, x0, eps, alpha, sigma)
    torch.testing.assert_close(loss, noise.square().mean(), rtol=1e-12, atol=0)
    weight = torch.tensor([2.0, 0.5]).double()
    weighted = denoising_loss(prediction, output, x0, eps, alpha, sigma, weight)
    by_hand = (2.0 * noise[0].square().mean() + 0.5 * noise[1].square().mean()) / 2
    torch.testing.assert_close(weighted, by_hand, rtol=1e-12, atol=0)
    # A quadratic: gradcheck's central differences are exact but for rounding.
    assert torch.autograd.gradcheck(
        lambda out: denoising_loss(prediction, out, x0, eps, alpha, sigma, weight), output
    )


def test_denoising_loss_of_a_bf16_network_is_float32() -> None:
    x0, eps = randn(2, 2, 4, 3, 3, dtype=torch.float32)
    alpha, sigma = coefficients(VPSchedule.sdxl(), torch.tensor([999, 300]), x0)
    loss = denoising_loss("epsilon", eps.bfloat16(), x0, eps, alpha, sigma)
    assert loss.dtype == torch.float32
    expected = (eps.bfloat16().float() - eps).square().mean()
    # float32 means of 72 numbers in two orders.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_edm_weight_counts_the_raw_networks_error_alike_at_every_level() -> None:
    x0, eps, raw = randn(3, 4, 3, 4, 4)
    sigma = SteppedSchedule.edm().time(torch.tensor([0, 300, 700, 999]))
    # By hand: 1 / 0.5^2 + 1 / sigma^2; both forms of the paper's table in float64.
    assert edm_loss_weight(torch.tensor(0.5)).item() == 8.0
    torch.testing.assert_close(
        edm_loss_weight(sigma), (sigma**2 + 0.25) / (sigma * 0.5) ** 2, rtol=1e-14, atol=0
    )
    alpha, wide = coefficients(EDMSchedule(), sigma, x0)
    x_t = add_noise(EDMSchedule(), x0, eps, sigma)
    denoised = edm_preconditioned(lambda x, t, condition: raw)(x_t, sigma, None)
    scale = edm_scalings(wide)
    raw_error = raw - (x0 - scale.skip * x_t) / scale.out
    loss = denoising_loss("sample", denoised, x0, eps, alpha, wide, edm_loss_weight(sigma))
    # float64, but D - x0 is a difference of numbers near 1 of size 0.002 at the cleanest level.
    torch.testing.assert_close(loss, raw_error.square().mean(), rtol=1e-10, atol=0)


def test_gan_losses_by_hand_and_at_extremes() -> None:
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    log2 = math.log(2.0)
    generator = (log2 + math.log1p(math.e)) / 2
    critic = (log2 + math.log1p(math.exp(-1.0))) / 2 + (log2 + math.log1p(math.exp(-2.0))) / 2
    assert gan_generator_loss(fake).item() == pytest.approx(generator, rel=1e-6)  # float32
    assert gan_critic_loss(real, fake).item() == pytest.approx(critic, rel=1e-6)
    # softplus, not log(1 + exp): linear far out.
    assert gan_generator_loss(torch.tensor([-1e4])).item() == 1e4
    assert gan_critic_loss(torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0.0


def test_gan_gradients_point_the_right_way() -> None:
    real, fake = randn(2, 6).requires_grad_().unbind()
    assert torch.autograd.gradcheck(gan_generator_loss, fake)
    assert torch.autograd.gradcheck(gan_critic_loss, (real, fake))
    (up,) = torch.autograd.grad(gan_generator_loss(fake), fake)
    assert (up < 0).all()  # descending raises the logits of fakes
    down_real, down_fake = torch.autograd.grad(gan_critic_loss(real, fake), (real, fake))
    assert (down_real < 0).all()
    assert (down_fake > 0).all()


def test_regression_loss() -> None:
    x, wanted = randn(2, 2, 4, 3, 3)
    # The same sum of squares by hand, float64.
    by_hand = (x - wanted).square().sum() / x.numel()
    torch.testing.assert_close(regression_loss(x, wanted), by_hand, rtol=1e-12, atol=0)


def test_sample_gradients_add_up_to_the_joint_backward() -> None:
    torch.manual_seed(0)
    student, critic = nn.Linear(3, 5).double(), nn.Linear(5, 1).double()
    z, matching = randn(4, 3), randn(4, 5, seed=1)

    def adversarial(x: Tensor) -> Tensor:
        return 0.3 * gan_generator_loss(critic(x))

    joint = distribution_matching_loss(student(z), matching) + adversarial(student(z))
    expected = torch.autograd.grad(joint, list(student.parameters()))

    sample = student(z)
    value_dm, gradient_dm = sample_gradient(
        lambda x: distribution_matching_loss(x, matching), sample
    )
    with torch.no_grad():  # also where the caller has switched gradients off
        value_gan, gradient_gan = sample_gradient(adversarial, sample)
    assert all(parameter.grad is None for parameter in critic.parameters())
    sample.backward(gradient_dm + gradient_gan)
    # float64; the sum is formed before instead of after the Jacobian.
    torch.testing.assert_close(value_dm + value_gan, joint, rtol=1e-12, atol=0)
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-16)
    assert not value_dm.requires_grad
    assert not gradient_gan.requires_grad


def test_sample_gradient_is_the_numerical_gradient() -> None:
    sample = randn(2, 3)
    _, gradient = sample_gradient(lambda x: F.softplus(x).square().sum(), sample)
    step = 1e-5  # central differences: error ~ step^2 + 1e-16 / step ~ 1e-10
    for i in range(sample.numel()):
        shift = torch.zeros(6).double().index_fill(0, torch.tensor(i), step).view(2, 3)
        ahead = F.softplus(sample + shift).square().sum()
        behind = F.softplus(sample - shift).square().sum()
        numerical = (ahead - behind) / (2 * step)
        torch.testing.assert_close(gradient.flatten()[i], numerical, rtol=1e-8, atol=1e-8)
