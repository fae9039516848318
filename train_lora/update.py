"""One side of the game: gradients of all micro-batches and processes become one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config_training import TrainingConfig
from .distributed import average_gradients, largest
from .sharding import clip_gradients, is_sharded


@dataclass(slots=True)
class Update:
    """Student or critic: its parameters, its optimizer, and how its gradients are treated."""

    names: list[str]
    """Of the parameters, in their order: their names in checkpoints."""
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    num_skipped: int = 0
    """Updates left out because a loss or the gradient was not finite."""
    skipped_in_a_row: int = 0
    learning_rates: list[float] = field(init=False)
    """Of the optimizer's groups, before any decay."""

    def __post_init__(self) -> None:
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]

    def apply(
        self, num_accumulated: int, *, losses_finite: bool, rate_factor: float = 1.0
    ) -> Tensor:
        """Average over micro-batches and processes, clip, step, clear; returns the norm.

        `rate_factor` scales the learning rates of this step.

        Unless every process has finite losses and a finite gradient, none of them steps.
        """
        if num_accumulated > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad /= num_accumulated
        average_gradients([p for p in self.parameters if not is_sharded(p)])
        norm = clip_gradients(self.parameters, self.max_grad_norm)
        broken = not (losses_finite and bool(norm.isfinite()))
        if largest(int(broken), norm.device):
            self.num_skipped += 1
            self.skipped_in_a_row += 1
        else:
            for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
                group["lr"] = rate_factor * rate
            self.optimizer.step()
            self.skipped_in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def rate_factor(settings: TrainingConfig, iteration: int) -> float:
    """What `training.learning_rate_decay` leaves of the learning rates: 1, at the end near 0."""
    left = 1 - iteration / settings.iterations
    decay = settings.learning_rate_decay
    return min(1.0, left / decay) if decay else 1.0


def mean_figures(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each figure over micro-batches; not finite where one of them is not."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
