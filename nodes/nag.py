"""Normalized attention guidance (NAG, arXiv 2505.21179): a negative prompt without a second pass.

The negative prompt acts inside the cross-attention layers, not on the network's output: few-step
models, whose outputs for two prompts differ too much to be extrapolated, stand that.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_SCALE = 3.0
"""The authors' value for the 4-step SDXL DMD2 checkpoint."""
TAU, ALPHA = 2.5, 0.5
"""The authors' values for UNets; not widgets, because the scale alone covers the useful range."""


def normalized_attention_guidance(
    z_positive: Tensor,
    z_negative: Tensor,
    scale: float,
    *,
    tau: float = TAU,
    alpha: float = ALPHA,
) -> Tensor:
    """What the attention layer gives instead of `z_positive` (arXiv 2505.21179, sec. 4).

    `z_positive`, `z_negative`: (..., tokens, width), the same queries attending to either prompt,
    before the output projection. Extrapolate, z = z+ + (scale - 1) (z+ - z-); shrink each token to
    at most `tau` times the L1 norm of z+; blend `alpha` of it with z+. `scale` 1 changes nothing
    but for rounding. The norms are computed in float32, the result has the input's dtype.
    """
    positive, negative = z_positive.float(), z_negative.float()
    extrapolated = positive + (scale - 1.0) * (positive - negative)
    limit = tau * positive.norm(p=1, dim=-1, keepdim=True)
    norm = extrapolated.norm(p=1, dim=-1, keepdim=True)
    # A token of zeros stays one: its norm is not divided by.
    shrunk = extrapolated * torch.where(norm > limit, limit / norm.clamp_min(1e-30), 1.0)
    return torch.lerp(positive, shrunk, alpha).to(z_positive.dtype)
