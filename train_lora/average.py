"""Exponential moving average of the student's weights: what is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import local


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
        own = [local(p.detach()) for p in self.parameters]
        torch._foreach_lerp_([local(a) for a in self.averages], own, 1 - decay)

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
            mine, its = local(parameter.detach()), local(average)
            own = mine.clone()
            mine.copy_(its)
            its.copy_(own)
