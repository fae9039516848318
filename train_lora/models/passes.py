"""What is run of a UNet: all of it, its half up to the middle block, or both in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .text import Condition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from .edm_teacher import EDMPasses

Added = dict[str, Tensor] | None
"""SDXL's pooled vector and size ids, under diffusers' names; None for SD1.5."""

MIDDLE = "middle"
"""The layer that every network has: the middle block."""


class LayerShape(NamedTuple):
    """Of a feature map."""

    channels: int
    downscale: int
    """Latent cells per cell of the map along each side."""


class Passes(nn.Module):
    """One door for all passes: sharded weights are gathered behind it (`train_lora.sharding`).

    Inputs have the dtype that the network computes in; t: (B,) timesteps, hidden: (B, 77, width).
    Feature maps are asked for by names of `layers`, and come in the order of the names.
    """

    METHODS = ("features", "with_features")
    """The passes beside `forward`."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    @property
    def layers(self) -> dict[str, LayerShape]:
        """The maps that can be had: the outputs of the down blocks ("down1", ...) and of the
        middle block, in the network's order. All but the last down block halve their output."""
        widths = self.unet.config.block_out_channels
        halvings = [min(level + 1, len(widths) - 1) for level in range(len(widths))]
        shapes = [LayerShape(width, 2**n) for width, n in zip(widths, halvings, strict=True)]
        return {f"down{n}": shape for n, shape in enumerate(shapes, 1)} | {MIDDLE: shapes[-1]}

    def inputs(
        self, x_t: Tensor, condition: Condition, autocast: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Added]:
        """x_t, hidden states, and SDXL's pooled vector with the size ids (those stay float32), in
        the dtype of `autocast`, None for the network's own: what every pass takes beside t."""
        dtype = autocast or self.unet.conv_in.weight.dtype
        hidden, added = condition.hidden.to(dtype), None
        if condition.pooled.shape[1] > 0:
            added = {"text_embeds": condition.pooled.to(dtype), "time_ids": condition.time_ids}
        return x_t.to(dtype), hidden, added

    def forward(self, sample: Tensor, t: Tensor, hidden: Tensor, added: Added) -> Tensor:
        """The network's output, (B, 4, H/8, W/8) like `sample`."""
        output: Tensor = self.unet(
            sample, t, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    def features(
        self, sample: Tensor, t: Tensor, hidden: Tensor, added: Added, layers: Sequence[str]
    ) -> tuple[Tensor, ...]:
        """The maps (B, C, h, w) of `layers`: half the network, no decoder."""
        unet = self.unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
        if added is not None:
            embedding = embedding + unet.get_aug_embed(
                emb=embedding, encoder_hidden_states=hidden, added_cond_kwargs=added
            )
        sample = unet.conv_in(sample)
        found = {}
        for name, block in self._blocks().items():
            attends = getattr(block, "has_cross_attention", False)
            context = {"encoder_hidden_states": hidden} if attends else {}
            found[name] = sample = _map_of(block(hidden_states=sample, temb=embedding, **context))
        return tuple(found[name] for name in layers)

    def with_features(
        self, sample: Tensor, t: Tensor, hidden: Tensor, added: Added, layers: Sequence[str]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` and `features` give, in one pass of the network."""
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, block in self._blocks().items():

                def keep(_: nn.Module, __: object, output: object, name: str = name) -> None:
                    found[name] = _map_of(output)

                hooks.callback(block.register_forward_hook(keep).remove)
            output = self.forward(sample, t, hidden, added)
        return output, tuple(found[name] for name in layers)

    def _blocks(self) -> dict[str, nn.Module]:
        """The block that makes each of `layers`."""
        return dict(zip(self.layers, (*self.unet.down_blocks, self.unet.mid_block), strict=True))


def _map_of(output: object) -> Tensor:
    """A down block gives the maps for the decoder as well."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def passes_of(network: nn.Module) -> Passes | EDMPasses:
    """The network's passes, by its kind."""
    from .edm_network import EDMNetwork
    from .edm_teacher import EDMPasses

    return EDMPasses(network) if isinstance(network, EDMNetwork) else Passes(network)
