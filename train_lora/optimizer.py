"""AdamW, with float32 or with 8-bit states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from .models.precision import needs_bitsandbytes

OptimizerName = Literal["adamw", "adamw8bit"]


def check_optimizer(name: OptimizerName) -> None:
    """ValueError where its library is missing."""
    if name == "adamw8bit":
        needs_bitsandbytes('training.optimizer "adamw8bit"')


def build_optimizer(
    name: OptimizerName,
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    *,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """`groups`: parameters and their learning rate.

    8-bit states (bitsandbytes) take a quarter of the memory; tensors below 4096 elements keep
    float32 ones.
    """
    check_optimizer(name)
    kind: Any = torch.optim.AdamW
    if name == "adamw8bit":
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        [{"params": list(parameters), "lr": rate} for parameters, rate in groups],
        betas=betas,
        weight_decay=weight_decay,
    )
    return optimizer
