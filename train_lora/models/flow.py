"""A UNet that predicts flow is told the time as such models are: 1000 x flow time, 1 to 1000.

Everything else counts steps 0 .. 999 (`SteppedSchedule.flow`), so the difference of one is made up
inside the network, where no caller can forget it. Sources: ComfyUI's ModelSamplingDiscreteFlow
(multiplier 1000) and diffusers' FlowMatchEulerDiscreteScheduler both tell sigma * 1000, whatever
the shift, which only chooses the sigmas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class FlowTime(nn.Module):
    """The first layer of the time embedding, for steps t: it is given t + 1 = 1000 x flow time."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, t: Tensor) -> Tensor:
        """`t`: (B,) -> (B, channels), as the layer within."""
        embedded: Tensor = self.embed(t + 1)
        return embedded


def tell_flow_time(unet: UNet2DConditionModel) -> None:
    """Change how `unet` reads its time; the layer has no weights, so nothing else changes."""
    assert not isinstance(unet.time_proj, FlowTime), "a network is told once"
    unet.time_proj = FlowTime(unet.time_proj)
