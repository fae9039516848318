"""A loaded model: its networks and what they predict on which schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from dmd2_core import Prediction, Recipe, SteppedSchedule, VPSchedule, edm_loss_weight

from .text import LATENT_PX

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from .class_condition import AnyCondition
    from .edm_network import EDMNetwork
    from .edm_teacher import PixelVAE

Kind = Literal["sdxl", "sd15", "edm"]
"""Of which "edm" draws pixels of a class; the others draw latents of a caption."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Components:
    """The parts of one model, of full size or small; all frozen, in eval mode."""

    unet: UNet2DConditionModel | EDMNetwork
    vae: AutoencoderKL | PixelVAE
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    """SDXL: encoder L, then encoder G (with the projection that gives the pooled vector).
    SD1.5: encoder L alone. EDM: none."""
    tokenizers: list[CLIPTokenizer]
    schedule: VPSchedule | SteppedSchedule
    prediction: Prediction
    kind: Kind = "sdxl"
    base_hash: str
    """sha256 of the UNet's weights; see `fingerprint.unet_hash`."""
    name: str
    """The file's or folder's name, for people."""
    empty_prompt: Tensor | None = None
    """SD1.5's unconditional branch, the encoded empty caption: (1, 77, width), float32.
    None for SDXL, whose unconditional branch is zeros."""
    recipe: Recipe | None = None
    """How an EDM student is sampled, if this is one; None for every other model."""

    def __post_init__(self) -> None:
        assert (self.kind == "sd15") == (self.empty_prompt is not None)

    @property
    def latent_px(self) -> int:
        """Pixels per cell of what the UNet draws, along each side."""
        return 1 if self.kind == "edm" else LATENT_PX

    @property
    def side_px(self) -> int:
        """Of the square pictures that the model is made for."""
        if self.kind == "edm":
            return self.unet.config.resolution_px
        return LATENT_PX * int(self.unet.config["sample_size"])

    def denoising_weight(self, sigma: Tensor) -> Tensor | None:
        """What the critic's squared errors at these noise levels weigh: (B,) float32 from (B, ...);
        None for 1, everywhere but beside an EDM network (`edm_loss_weight`)."""
        if self.kind != "edm":
            return None
        return edm_loss_weight(sigma.flatten(), self.unet.config.sigma_data).float()

    def unconditional(self, condition: AnyCondition) -> AnyCondition | None:
        """The unconditional branch beside `condition`: as many rows, the same picture sizes.

        EDM's networks have none, and are never guided (`config_classes.py`).
        """
        if self.kind == "edm":
            return None
        if self.empty_prompt is None:
            return condition.zeros_like()
        hidden = self.empty_prompt.to(condition.hidden).expand_as(condition.hidden)
        return replace(condition, hidden=hidden)
