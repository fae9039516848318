"""Puts normalized attention guidance into a model's cross-attention, by ComfyUI's own patch calls.

An attn2 patch appends the negative prompt's tokens to the positive's; an attn2 replacement attends
to either part and joins the two. Queries are computed once, rows and batches stay as ComfyUI made
them, and replacements that are there already (image-prompt adapters) see what they expect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from .nag import normalized_attention_guidance

Options = dict[str, Any]
Attend = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
"""(q, k, v: (B, tokens, width), options) -> (B, tokens, width), before the output projection."""

POSITIVE = 0
"""In ComfyUI's `cond_or_uncond`, which has one entry per chunk of the batch."""
# More than SDXL and SD1.5 have: a place without a transformer is never asked for.
PLACES = (*(("input", i) for i in range(12)), ("middle", 0), *(("output", i) for i in range(12)))


class AttentionGuidance:
    """The patch of one sampling run. Its `negative` is set before each step."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.negative: Tensor | None = None
        """(images, tokens, width) of the negative prompt; None: attend as ever."""
        self.places: frozenset[tuple[Any, ...]] = frozenset()

    def install(self, model: Any) -> None:
        """Patch `model`, a clone that belongs to this run."""
        replaced = model.model_options["transformer_options"].get("patches_replace", {})
        earlier = dict(replaced.get("attn2", {}))
        self.places = frozenset(PLACES) | frozenset(earlier)
        model.set_model_attn2_patch(self.append_negative)
        for place in self.places:
            attend = self.guided(earlier.get(place, plain_attention))
            model.set_model_attn2_replace(attend, *place)

    def append_negative(
        self, n: Tensor, context: Tensor, value: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attn2 patch: the negative prompt's tokens after the positive's."""
        if self.negative is None or not self._is_covered(options):
            return n, context, value
        num_chunks = context.shape[0] // self.negative.shape[0]
        negative = self.negative.to(context).repeat(num_chunks, 1, 1)
        return n, torch.cat([context, negative], 1), torch.cat([value, negative], 1)

    def guided(self, attend: Attend) -> Attend:
        """The attn2 replacement around `attend`."""

        def attend_to_both(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
            if self.negative is None:
                return attend(q, k, v, options)
            first = k.shape[1] - self.negative.shape[1]
            z_positive = attend(q, k[:, :first], v[:, :first], options)
            z_negative = attend(q, k[:, first:], v[:, first:], options)
            z = normalized_attention_guidance(z_positive, z_negative, self.scale)
            kinds = options.get("cond_or_uncond") or [POSITIVE]
            parts = zip(kinds, z.chunk(len(kinds)), z_positive.chunk(len(kinds)), strict=True)
            return torch.cat([new if kind == POSITIVE else old for kind, new, old in parts])

        return attend_to_both

    def _is_covered(self, options: Options) -> bool:
        """Whether one of our replacements will follow in the block that asks."""
        block = options.get("block")
        if block is None:
            return False
        return block in self.places or (*block, options.get("block_index", 0)) in self.places


def plain_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """What ComfyUI's layer computes when nothing replaces it."""
    more = {}
    if "optimized_attention_override" in options:  # ComfyUI from 0.3.60: other attention kernels
        more = {"transformer_options": options}
    heads, precision = options["n_heads"], options["attn_precision"]
    return optimized_attention(q, k, v, heads, attn_precision=precision, **more)
