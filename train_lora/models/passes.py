"""What is run of a UNet: all of it, or its half up to the middle block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Added = dict[str, Tensor] | None
"""SDXL's pooled vector and size ids, under diffusers' names; None for SD1.5."""


class Passes(nn.Module):
    """One door for both passes: sharded weights are gathered behind it (`train_lora.sharding`).

    Inputs have the dtype that the network computes in; t: (B,) timesteps, hidden: (B, 77, width).
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, t: Tensor, hidden: Tensor, added: Added) -> Tensor:
        """The network's output, (B, 4, H/8, W/8) like `sample`."""
        output: Tensor = self.unet(
            sample, t, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    def features(self, sample: Tensor, t: Tensor, hidden: Tensor, added: Added) -> Tensor:
        """The middle block's output (B, C, h, w): half the network, no decoder."""
        unet = self.unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
        if added is not None:
            embedding = embedding + unet.get_aug_embed(
                emb=embedding, encoder_hidden_states=hidden, added_cond_kwargs=added
            )
        sample = unet.conv_in(sample)
        for block in (*unet.down_blocks, unet.mid_block):
            attends = getattr(block, "has_cross_attention", False)
            context = {"encoder_hidden_states": hidden} if attends else {}
            output = block(hidden_states=sample, temb=embedding, **context)
            sample = output if isinstance(output, Tensor) else output[0]
        return sample
