"""Captions to what a UNet is told: hidden states and, in SDXL, a pooled vector and size ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tokenizer import MAX_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from .components import Components, Kind

LATENT_PX = 8
"""Pixels per latent cell along each side."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Condition:
    """What a UNet is told about a batch of B pictures."""

    hidden: Tensor
    """(B, 77, width). SDXL: the penultimate hidden states of both encoders, side by side.
    SD1.5: the last hidden states of its one encoder."""
    pooled: Tensor
    """SDXL: the pooled output of encoder G, (B, its projection). SD1.5 has none: (B, 0)."""
    time_ids: Tensor
    """(B, 6): height, width, crop top, crop left, target height, target width, in pixels.
    SD1.5 is not told them; the latents' size follows from them all the same."""

    def __post_init__(self) -> None:
        assert len(self.hidden) == len(self.pooled) == len(self.time_ids)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Condition:
        """The chosen rows; a single number keeps its batch dimension."""
        if isinstance(rows, int):
            rows = [rows]
        elif isinstance(rows, Tensor):
            rows = rows.to(self.hidden.device)
        return Condition(
            hidden=self.hidden[rows], pooled=self.pooled[rows], time_ids=self.time_ids[rows]
        )

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def latent_shape(self, channels: int = 4) -> tuple[int, int, int, int]:
        """(B, channels, H/8, W/8) of the pictures that the size ids speak of."""
        height, width = (int(pixels) // LATENT_PX for pixels in self.time_ids[0, 4:].tolist())
        return len(self), channels, height, width

    def zeros_like(self) -> Condition:
        """SDXL's unconditional branch: both embeddings zero, the same size ids."""
        return Condition(
            hidden=torch.zeros_like(self.hidden),
            pooled=torch.zeros_like(self.pooled),
            time_ids=self.time_ids,
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Condition:
        """Moved; `dtype` is for the embeddings, the size ids (up to thousands) stay float32."""
        return Condition(
            hidden=self.hidden.to(device=device, dtype=dtype),
            pooled=self.pooled.to(device=device, dtype=dtype),
            time_ids=self.time_ids.to(device=device),
        )

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """Joined along the batch."""
        return cls(
            hidden=torch.cat([condition.hidden for condition in conditions]),
            pooled=torch.cat([condition.pooled for condition in conditions]),
            time_ids=torch.cat([condition.time_ids for condition in conditions]),
        )


def size_ids(num: int, height_px: int, width_px: int) -> Tensor:
    """SDXL's time ids (num, 6), float32: uncropped pictures of this size."""
    for name, pixels in (("height_px", height_px), ("width_px", width_px)):
        if pixels <= 0 or pixels % LATENT_PX:
            raise ValueError(f"{name} is {pixels}: use a positive multiple of {LATENT_PX}")
    row = [height_px, width_px, 0, 0, height_px, width_px]
    return torch.tensor([row] * num, dtype=torch.float32)


def token_ids(tokenizers: Sequence[CLIPTokenizer], captions: Sequence[str]) -> list[Tensor]:
    """Per encoder (B, 77) int64; captions longer than 75 tokens are cut.

    Both encoders get the first tokenizer's ids and differ in the padding only, as in SDXL's
    training and in ComfyUI. The second tokenizer itself would not do: "!" is its padding, so it
    takes every "!" of a caption for padding too.
    """
    encoded = tokenizers[0](list(captions), truncation=True, max_length=MAX_TOKENS)
    rows = encoded.input_ids
    return [
        torch.tensor([row + [tokenizer.pad_token_id] * (MAX_TOKENS - len(row)) for row in rows])
        for tokenizer in tokenizers
    ]


@torch.no_grad()
def encode_prompts(
    components: Components, captions: Sequence[str], height_px: int, width_px: int
) -> Condition:
    """The conditioning of `captions` for pictures of one size, float32, on the encoders' device.

    An empty caption is encoded like any other; for the unconditional branch see
    `Components.unconditional`.
    """
    if isinstance(captions, str) or not captions:
        raise ValueError(f"captions is {captions!r}: pass a list with at least one caption")
    hidden, pooled = encoded(
        components.kind, components.text_encoders, components.tokenizers, captions
    )
    sizes = size_ids(len(captions), height_px, width_px).to(hidden.device)
    return Condition(hidden=hidden, pooled=pooled, time_ids=sizes)


@torch.no_grad()
def encoded(
    kind: Kind,
    text_encoders: Sequence[Any],
    tokenizers: Sequence[CLIPTokenizer],
    captions: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """`Condition.hidden` and `Condition.pooled` of `captions`, float32."""
    ids = token_ids(tokenizers, captions)
    outputs = [
        encoder(rows.to(encoder.device), output_hidden_states=True)
        for encoder, rows in zip(text_encoders, ids, strict=True)
    ]
    if kind == "sd15":
        hidden = outputs[0].last_hidden_state
        return hidden.float(), hidden.new_zeros(len(captions), 0, dtype=torch.float32)
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return hidden.float(), outputs[1].text_embeds.float()  # of encoder G's projection
