"""The distribution matching gradient on 2-D Gaussian mixtures, where everything is exact.

The student is G(z) = A z + b on samples z of a mixture; its diffused density p_t and the teacher's
q_t are mixtures too, so KL(p_t || q_t) is an integral over the plane that autograd differentiates
by A and b. DMD's claim (arXiv 2311.18828, eq. 7): that gradient is
E[alpha_t * (score_fake - score_real) * dG], with alpha_t * (score_fake - score_real)
= alpha_t^2 / sigma_t^2 * (x0_fake - x0_real), our gradient without its normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dmd2_core import (
    Denoiser,
    VPSchedule,
    add_noise,
    coefficients,
    distribution_matching_gradient,
    distribution_matching_loss,
    sample_gradient,
)

VP = VPSchedule.sdxl()
EYE = torch.eye(2, dtype=torch.float64)
ZERO = torch.zeros(2, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Gaussians in the plane: means (K, 2), covariances (K, 2, 2), weights (K,), float64."""

    means: Tensor
    covariances: Tensor
    weights: Tensor

    def pushed(self, matrix: Tensor, shift: Tensor) -> Mixture:
        """The density of matrix @ z + shift."""
        return Mixture(
            means=self.means @ matrix.T + shift,
            covariances=matrix @ self.covariances @ matrix.T,
            weights=self.weights,
        )

    def diffused(self, t: int) -> Mixture:
        """The density of alpha_t * z + sigma_t * eps."""
        alpha, sigma = VP.alpha(torch.tensor(t)), VP.sigma(torch.tensor(t))
        return Mixture(
            means=alpha * self.means,
            covariances=alpha**2 * self.covariances + sigma**2 * EYE,
            weights=self.weights,
        )

    def log_parts(self, x: Tensor) -> Tensor:
        """log(weight_k * density_k): (N, K) for `x`: (N, 2)."""
        offset = x[:, None] - self.means
        quadratic = (offset * self._pull(offset)).sum(-1)
        logdet = torch.logdet(2 * torch.pi * self.covariances)
        return self.weights.log() - 0.5 * (quadratic + logdet)

    def log_density(self, x: Tensor) -> Tensor:
        return self.log_parts(x).logsumexp(1)

    def score(self, x: Tensor) -> Tensor:
        """The gradient of the log density in closed form: (N, 2)."""
        share = self.log_parts(x).softmax(1)
        return -(share[..., None] * self._pull(x[:, None] - self.means)).sum(1)

    def _pull(self, offset: Tensor) -> Tensor:
        """Inverse covariance times offset, per component: (N, K, 2)."""
        return torch.einsum("kij,nkj->nki", torch.linalg.inv(self.covariances), offset)

    def denoiser(self) -> Denoiser[None]:
        """The ideal epsilon network of this distribution (one time per batch)."""

        def network(x_t: Tensor, t: Tensor, condition: None) -> Tensor:
            return -VP.sigma(t[:1]) * self.diffused(int(t[0])).score(x_t)

        return Denoiser(network, VP, "epsilon")

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        component = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        root = torch.linalg.cholesky(self.covariances)[component]
        unit = torch.randn(num, 2, 1, generator=generator, dtype=torch.float64)
        return self.means[component] + (root @ unit)[..., 0]


def mixture(means: list[list[float]], deviations: list[float], weights: list[float]) -> Mixture:
    return Mixture(
        means=torch.tensor(means, dtype=torch.float64),
        covariances=torch.tensor(deviations, dtype=torch.float64).square().view(-1, 1, 1) * EYE,
        weights=torch.tensor(weights, dtype=torch.float64),
    )


STUDENT = mixture([[-0.5, 0.3], [0.9, -0.6]], [0.4, 0.5], [0.6, 0.4])
TEACHER = mixture([[1.2, 0.8], [-0.9, 1.0], [0.1, -1.3]], [0.3, 0.45, 0.6], [0.3, 0.3, 0.4])


def grid() -> tuple[Tensor, float]:
    """Points (N, 2) over [-7, 7]^2 and the area of a cell.

    The trapezoid rule on smooth decaying functions errs exponentially little: with half the spacing
    the sums change by less than 1e-9. Outside lie six standard deviations or more.
    """
    axis = torch.linspace(-7, 7, 201, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), 0.07**2


def exact_kl_gradients(t: int) -> tuple[Tensor, Tensor, Tensor]:
    """KL(student_t || teacher_t) and its derivatives by A (2, 2) and b (2,), by autograd."""
    matrix, shift = EYE.clone().requires_grad_(), ZERO.clone().requires_grad_()
    points, area = grid()
    log_p = STUDENT.pushed(matrix, shift).diffused(t).log_density(points)
    log_q = TEACHER.diffused(t).log_density(points)
    kl = (log_p.exp() * (log_p - log_q)).sum() * area
    by_matrix, by_shift = torch.autograd.grad(kl, (matrix, shift))
    return kl.detach(), by_matrix, by_shift


def unnormalised(x: Tensor, x0_real: Tensor, x0_fake: Tensor, t: Tensor) -> Tensor:
    """alpha^2 / sigma^2 * the gradient under test, its per-sample normaliser taken out."""
    gradient = distribution_matching_gradient(x, x0_real, x0_fake)
    alpha, sigma = coefficients(VP, t, x)
    normaliser = (x - x0_real).abs().mean(dim=1, keepdim=True)
    return (alpha / sigma) ** 2 * normaliser * gradient


def test_scores_are_gradients_of_the_log_density() -> None:
    x = 2 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(TEACHER.diffused(300).log_density(x).sum(), x)
    # Two float64 evaluations of the same formula.
    torch.testing.assert_close(TEACHER.diffused(300).score(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [20, 300, 600, 980])
def test_expected_gradient_is_the_kl_gradient(t: int) -> None:
    points, area = grid()
    times = torch.full((len(points),), t)
    x0_real = TEACHER.denoiser()(points, times, None)
    x0_fake = STUDENT.denoiser()(points, times, None)
    field = unnormalised(points, x0_real, x0_fake, times)
    weight = STUDENT.diffused(t).log_density(points).exp()[:, None] * area
    _, by_matrix, by_shift = exact_kl_gradients(t)
    # Two integrands with the same integral: the grid's error at t = 20, 3e-10, bounds both.
    torch.testing.assert_close((weight * field).sum(0), by_shift, rtol=1e-8, atol=1e-10)
    # dG/dA is z, whose mean given x_t is the student's own x0.
    torch.testing.assert_close((weight * field).T @ x0_fake, by_matrix, rtol=1e-8, atol=1e-10)
    assert by_shift.norm() > 1e-4  # not a comparison of zeros


@pytest.mark.parametrize("t", [100, 500, 900])
def test_sampled_gradient_through_the_generator_is_the_kl_gradient(t: int) -> None:
    """As the trainer does it: sample, noise, two denoisers, gradient at the sample, backward."""
    num = 40_000
    generator = torch.Generator().manual_seed(t)
    matrix, shift = EYE.clone().requires_grad_(), ZERO.clone().requires_grad_()
    z = STUDENT.draw(num, generator)
    x = z @ matrix.T + shift
    eps = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    times = torch.full((num,), t)
    with torch.no_grad():
        x_t = add_noise(VP, x, eps, times)
        x0_real, x0_fake = (m.denoiser()(x_t, times, None) for m in (TEACHER, STUDENT))
        direction = unnormalised(x, x0_real, x0_fake, times)
    _, at_sample = sample_gradient(lambda x: distribution_matching_loss(x, direction), x)
    x.backward(2 * at_sample)  # the loss averages over the 2 coordinates as well
    _, by_matrix, by_shift = exact_kl_gradients(t)
    # Monte Carlo: five standard errors, measured on the samples themselves.
    shift_error = direction.std(0) / num**0.5
    matrix_error = (direction[:, :, None] * z[:, None, :]).std(0) / num**0.5
    assert shift.grad is not None
    assert matrix.grad is not None
    assert ((shift.grad - by_shift).abs() < 5 * shift_error).all()
    assert ((matrix.grad - by_matrix).abs() < 5 * matrix_error).all()
    assert by_shift.norm() > 20 * shift_error.norm()  # the test could tell a wrong factor


def test_descending_the_normalised_gradient_finds_the_teacher() -> None:
    """The algorithm in small: t ~ U{20..980}, an ideal critic, Adam. At the optimum the gradient is
    zero for every sample, so the student gets there without a residue of sampling noise."""
    generator = torch.Generator().manual_seed(0)
    true_matrix = torch.tensor([[1.4, 0.5], [-0.3, 0.8]], dtype=torch.float64)
    true_shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    teacher = STUDENT.pushed(true_matrix, true_shift)
    matrix, shift = EYE.clone().requires_grad_(), ZERO.clone().requires_grad_()
    optimizer = torch.optim.Adam([matrix, shift], lr=0.04, betas=(0.5, 0.9))
    for _ in range(250):
        x = STUDENT.draw(128, generator) @ matrix.T + shift
        t = torch.randint(20, 981, (1,), generator=generator).expand(128)
        eps = torch.randn(128, 2, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            x_t = add_noise(VP, x, eps, t)
            critic = STUDENT.pushed(matrix, shift).denoiser()
            gradient = distribution_matching_gradient(
                x, teacher.denoiser()(x_t, t, None), critic(x_t, t, None)
            )
        optimizer.zero_grad()
        distribution_matching_loss(x, gradient).backward()
        optimizer.step()
    # Starts 2 away in b and 0.5 in A; what is left is below one of Adam's steps (0.04).
    torch.testing.assert_close(shift.detach(), true_shift, rtol=0, atol=0.03)
    torch.testing.assert_close(matrix.detach(), true_matrix, rtol=0, atol=0.03)
