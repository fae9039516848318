"""A loaded model: its networks and what they predict on which schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from dmd2_core import Prediction, SteppedSchedule, VPSchedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from .text import Condition

Kind = Literal["sdxl", "sd15"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Components:
    """The parts of one SDXL or SD1.5 model, of full size or small; all frozen, in eval mode."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    """SDXL: encoder L, then encoder G (with the projection that gives the pooled vector).
    SD1.5: encoder L alone."""
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

    def __post_init__(self) -> None:
        assert (self.kind == "sd15") == (self.empty_prompt is not None)

    def unconditional(self, condition: Condition) -> Condition:
        """The unconditional branch beside `condition`: as many rows, the same picture sizes."""
        if self.empty_prompt is None:
            return condition.zeros_like()
        hidden = self.empty_prompt.to(condition.hidden).expand_as(condition.hidden)
        return replace(condition, hidden=hidden)
