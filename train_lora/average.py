"""Exponential moving average of the student's adapter: the weights that are exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Follows `parameters`: average += (1 - decay) * (parameter - average) after each update.

    The decay grows as (1 + n) / (10 + n) with the number n of updates up to its full value, so
    that a short run does not average in its untrained start.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.num_updates = 0
        self.averages: list[Tensor] = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, list(self.parameters), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the block, and their own values again after it.

        The average holds them meanwhile: a copy would take as much memory as the adapter.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(own)
