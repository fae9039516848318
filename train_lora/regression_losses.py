"""The distances of the regression: how far the student's one-step latents are from the teacher's.

Each gives its value and its gradient at the detached latents, so that a decoder and a network that
looks at pictures are passed a few rows at a time, and the student once, with all rows' gradients.
LPIPS of decoded pictures is the distance of both papers (arXiv 2311.18828, 2405.14867).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmd2_core import regression_loss, sample_gradient

from .config import Config
from .config_regression import WEIGHT_SOURCES
from .models.components import Components
from .models.fingerprint import weights_hash
from .models.placement import placed
from .models.text import LATENT_PX
from .models.tiny_vae import load_tiny_vae
from .sampling import decode_rows, vae_rows

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

    from .metrics.lpips import Lpips

RegressionLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x0, target), scaled latents (B, 4, h, w) -> the distances' mean, (), and its gradient at x0, of
x0's shape; both float32 and detached."""


def squared_error(x0: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of the latents; a `RegressionLoss`."""
    return sample_gradient(lambda sample: regression_loss(sample, target), x0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PerceptualLoss:
    """LPIPS of decoded pictures or of the latents themselves; a `RegressionLoss`, in float32."""

    network: Lpips
    vae: AutoencoderKL | AutoencoderTiny | None
    """What decodes; on the device only while it does. None: the network looks at latents."""
    fingerprint: str
    """sha256 of the weights that came from files of their own."""

    def __call__(self, x0: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x0.shape[2:]
        rows = vae_rows(LATENT_PX * height, LATENT_PX * width)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(x0.device.type, enabled=False))
            if self.vae is not None:
                stack.enter_context(placed(self.vae, x0.device))
            parts = [
                self._of_rows(own, wanted)
                for own, wanted in zip(
                    x0.detach().float().split(rows), target.float().split(rows), strict=True
                )
            ]
        values, gradients = zip(*parts, strict=True)
        return torch.stack(values).sum() / len(x0), torch.cat(gradients) / len(x0)

    def _of_rows(self, own: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the distances of a few rows, and its gradient."""
        with torch.no_grad():
            seen = self.network.activations(self._look(wanted))

        def distance(sample: Tensor) -> Tensor:
            total = self.network.between(self.network.activations(self._look(sample)), seen).sum()
            if self.vae is None:  # the features are blind to some directions in latents
                total = total + (sample - wanted).abs().mean((1, 2, 3)).sum()
            return total

        return sample_gradient(distance, own)

    def _look(self, latents: Tensor) -> Tensor:
        return latents if self.vae is None else decode_rows(self.vae, latents)


def regression_loss_of(
    config: Config, components: Components, device: torch.device
) -> RegressionLoss:
    """What `regression.loss` names; ValueError for weights that are missing or not fit for it."""
    settings = config.regression
    if not config.needs_pairs or settings.loss == "mse":
        return squared_error
    assert settings.lpips_weights is not None
    path, option = Path(settings.lpips_weights), "regression.lpips_weights"
    source = WEIGHT_SOURCES[settings.loss]
    vae: AutoencoderKL | AutoencoderTiny | None = None
    if settings.loss == "latent-lpips":
        from .metrics.latent_lpips import load_latent_lpips

        network = load_latent_lpips(path, option, source)
        _check_channels(network, components, path)
    else:
        from .metrics.lpips import load_lpips

        network, vae = load_lpips(path, option, source), components.vae
        if settings.tiny_vae is None:  # at 1024 px its activations would fill a GPU
            components.vae.enable_gradient_checkpointing()
        else:
            vae = load_tiny_vae(Path(settings.tiny_vae), components.vae.config.latent_channels)
            vae.to(device)
    weights = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    if vae is not None and vae is not components.vae:
        weights |= {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    fingerprint = weights_hash(weights)
    return PerceptualLoss(network=network.to(device), vae=vae, fingerprint=fingerprint)


def _check_channels(network: Lpips, components: Components, path: Path) -> None:
    found, wanted = network.shift.shape[1], components.vae.config.latent_channels
    if found != wanted:
        raise ValueError(
            f"regression.lpips_weights {str(path)!r} looks at latents of {found} channels, the "
            f"model's have {wanted}; name the file for this kind of model."
        )
