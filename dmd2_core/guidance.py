"""Classifier-free guidance (arXiv 2207.12598), in x0 like everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Condition = TypeVar("Condition")


def classifier_free_guidance(x0_cond: Tensor, x0_uncond: Tensor, scale: float) -> Tensor:
    """x0_uncond + scale * (x0_cond - x0_uncond); all (B, C, H, W), in the inputs' dtype.

    At given x_t and t, x0 is affine in epsilon, v and flow, and the weights 1 - scale and scale sum
    to one: guidance in x0 equals guidance in the network's own output.
    """
    return x0_uncond + scale * (x0_cond - x0_uncond)


def concatenate(conditions: list[Any]) -> Any:
    """Conditions joined along the batch: tensors, or objects whose class has `cat(list)`."""
    if isinstance(conditions[0], Tensor):
        return torch.cat(conditions)
    return type(conditions[0]).cat(conditions)


def both_branches(
    denoiser: Callable[[Tensor, Tensor, Condition], Tensor],
    join: Callable[[list[Condition]], Condition] = concatenate,
) -> Callable[[Tensor, Tensor, Condition, Condition], tuple[Tensor, Tensor]]:
    """(x_t, t, condition, uncondition) -> x0 of each, from one call with a batch of 2B."""

    def denoise(
        x_t: Tensor, t: Tensor, condition: Condition, uncondition: Condition
    ) -> tuple[Tensor, Tensor]:
        both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), join([condition, uncondition]))
        x0_cond, x0_uncond = both.chunk(2)
        return x0_cond, x0_uncond

    return denoise


def guided(
    denoiser: Callable[[Tensor, Tensor, Condition], Tensor],
    scale: float,
    join: Callable[[list[Condition]], Condition] = concatenate,
) -> Callable[[Tensor, Tensor, Condition, Condition], Tensor]:
    """`denoiser` with guidance: (x_t, t, condition, uncondition) -> x0.

    One call with a batch of 2B, the conditional rows first; at scale 1 one call of B, without the
    unconditional rows. `join` concatenates conditions along the batch.
    """
    if not scale >= 0.0:
        raise ValueError(f"guidance scale is {scale}: choose 1 (none) or more")
    branches = both_branches(denoiser, join)

    def denoise(x_t: Tensor, t: Tensor, condition: Condition, uncondition: Condition) -> Tensor:
        if scale == 1.0:
            return denoiser(x_t, t, condition)
        return classifier_free_guidance(*branches(x_t, t, condition, uncondition), scale)

    return denoise
