"""What is run of a UNet: all of it, or its half up to the middle block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .text import Condition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from .edm_teacher import EDMPasses

Added = dict[str, Tensor] | None
"""SDXL's pooled vector and size ids, under diffusers' names; None for SD1.5."""


class Passes(nn.Module):
    """One door for both passes: sharded weights are gathered behind it (`train_lora.sharding`).

    Inputs have the dtype that the network computes in; t: (B,) timesteps, hidden: (B, 77, width).
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def inputs(
        self, x_t: Tensor, condition: Condition, autocast: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Added]:
        """x_t, hidden states, and SDXL's pooled vector with the size ids (those stay float32), in
        the dtype of `autocast`, None for the network's own: what both passes take beside t."""
        dtype = autocast or self.unet.conv_in.weight.dtype
        hidden, added = condition.hidden.to(dtype), None
        if condition.pooled.shape[1] > 0:
            added = {"text_embeds": condition.pooled.to(dtype), "time_ids": condition.time_ids}
        return x_t.to(dtype), hidden, added

    @property
    def feature_channels(self) -> int:
        return int(self.unet.config.block_out_channels[-1])

    @property
    def feature_downscale(self) -> int:
        """Latent cells per cell of `features` along each side: 4 in SDXL, 8 in SD1.5."""
        return 2 ** (len(self.unet.config.block_out_channels) - 1)

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


def passes_of(network: nn.Module) -> Passes | EDMPasses:
    """The network's passes, by its kind."""
    from .edm_network import EDMNetwork
    from .edm_teacher import EDMPasses

    return EDMPasses(network) if isinstance(network, EDMNetwork) else Passes(network)
