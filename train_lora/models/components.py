"""A loaded model: its networks and what they predict on which schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmd2_core import Prediction, VPSchedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Components:
    """The parts of one SDXL model, of full size or small; all networks frozen, in eval mode."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    """Encoder L, then encoder G (with the projection that gives the pooled vector)."""
    tokenizers: list[CLIPTokenizer]
    schedule: VPSchedule
    prediction: Prediction
    kind: Literal["sdxl"] = "sdxl"
    base_hash: str
    """sha256 of the UNet's weights; see `fingerprint.unet_hash`."""
    name: str
    """The file's or folder's name, for people."""
