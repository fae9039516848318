"""What a network predicts, and how every such prediction becomes x0.

With x_t = alpha * x0 + sigma * eps a network may output
    epsilon: eps        v: alpha * eps - sigma * x0        sample: x0        flow: eps - x0
`alpha` and `sigma` come from `schedule.coefficients`: (B, 1, 1, 1), float64 (float32 on MPS).
Conversions are computed in the dtype of these coefficients; each docstring says the result's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar, assert_never, get_args

from torch import Tensor

from .schedule import EDMSchedule, NoiseSchedule, VPSchedule, coefficients

Prediction = Literal["epsilon", "v", "sample", "flow"]
Condition = TypeVar("Condition")


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless `prediction` is one of the four names."""
    if prediction not in get_args(Prediction):
        raise ValueError(
            f"prediction {prediction!r} is unknown: use one of {', '.join(get_args(Prediction))}"
        )


def to_x0(
    prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The clean sample that a network `output` at `x_t` stands for.

    `output`, `x_t`: (B, C, H, W); result in `x_t`'s dtype. The divisors of v and flow are 1 on
    their home schedules (VP, flow time) and never zero; epsilon alone divides by alpha, so it is
    not finite at zero SNR, where eps says nothing about x0.
    """
    if prediction == "epsilon":
        x0 = (x_t - sigma * output) / alpha
    elif prediction == "v":
        x0 = (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
    elif prediction == "sample":
        x0 = output
    elif prediction == "flow":
        x0 = (x_t - sigma * output) / (alpha + sigma)
    else:
        assert_never(prediction)
    return x0.to(x_t.dtype)


def from_x0(
    prediction: Prediction, x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The network output at `x_t` that means this `x0`: the inverse of `to_x0`.

    `x0`, `x_t`: (B, C, H, W); result in `x0`'s dtype. Needs sigma > 0 (but for sample). With
    "epsilon" this is the noise implied by x_t and x0, finite at zero SNR too.
    """
    if prediction == "sample":
        return x0
    eps = (x_t - alpha * x0) / sigma
    return target(prediction, x0.to(eps.dtype), eps, alpha, sigma).to(x0.dtype)


def target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The regression target for x_t = alpha * x0 + sigma * eps, in the network's own space.

    `x0`, `eps`: (B, C, H, W); result in `x0`'s dtype.
    """
    if prediction == "epsilon":
        wanted = eps
    elif prediction == "v":
        wanted = alpha * eps - sigma * x0
    elif prediction == "sample":
        wanted = x0
    elif prediction == "flow":
        wanted = eps - x0
    else:
        assert_never(prediction)
    return wanted.to(x0.dtype)


@dataclass(frozen=True, slots=True)
class Denoiser(Generic[Condition]):
    """A network as everything else sees it: (x_t, t, condition) -> x0.

    Losses and sampler know nothing of the network but this.
    """

    network: Callable[[Tensor, Tensor, Condition], Tensor]
    """(x_t: (B, C, H, W), t: (B,), condition) -> output: (B, C, H, W)."""
    schedule: NoiseSchedule
    prediction: Prediction

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        zero_snr = isinstance(self.schedule, VPSchedule) and self.schedule.has_zero_terminal_snr
        if zero_snr and self.prediction == "epsilon":
            raise ValueError(
                "prediction 'epsilon' gives no x0 where alpha is 0, and this schedule has zero "
                "terminal SNR: use 'v', or the schedule without zero terminal SNR"
            )

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """`x_t`: (B, C, H, W); `t`: (B,) -> x0: (B, C, H, W) in `x_t`'s dtype."""
        alpha, sigma = coefficients(self.schedule, t, x_t)
        output = self.network(x_t, t, condition)
        return to_x0(self.prediction, output, x_t, alpha, sigma)


class EDMScalings(NamedTuple):
    """The factors around a raw EDM network F (arXiv 2206.00364, table 1): shape of sigma.

    D(x, sigma) = skip * x + out * F(inner * x, noise).
    """

    skip: Tensor
    out: Tensor
    inner: Tensor
    noise: Tensor


def edm_scalings(sigma: Tensor, sigma_data: float = 0.5) -> EDMScalings:
    """c_skip, c_out, c_in and c_noise at noise level `sigma` > 0, in its shape and dtype."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return EDMScalings(
        skip=sigma_data**2 / total**2,
        out=sigma * sigma_data / total,
        inner=1.0 / total,
        noise=sigma.log() / 4,
    )


def edm_preconditioned(
    network: Callable[[Tensor, Tensor, Condition], Tensor], *, sigma_data: float = 0.5
) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """A raw EDM network F as a network that predicts "sample" (arXiv 2206.00364, eq. 7).

    `sigma`: (B,), the time of EDMSchedule. Computed in float64, F called and D returned in `x`'s
    dtype.
    """
    schedule = EDMSchedule()

    def preconditioned(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        _, sigma = coefficients(schedule, t, x_t)
        scale = edm_scalings(sigma, sigma_data)
        noise = scale.noise.flatten().to(x_t.dtype)
        inner = network((scale.inner * x_t).to(x_t.dtype), noise, condition)
        return (scale.skip * x_t + scale.out * inner).to(x_t.dtype)

    return preconditioned
