"""Figures between two records: their means over iterations and processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .distributed import total


class FigureWindow:
    """Sums on the device where the figures are made: nothing is fetched before the record."""

    def __init__(self) -> None:
        self.num_iterations = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """One iteration's figures, scalars; not all iterations have all of them.

        What is not finite is left out: such updates are skipped, and counted elsewhere.
        """
        self.num_iterations += 1
        for name, figure in figures.items():
            value = figure.detach().float()
            kept = torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
            entry = torch.stack([kept, value.isfinite().float()])
            known = self._sums.get(name)
            self._sums[name] = entry if known is None else known + entry

    def take(self, device: torch.device) -> dict[str, float]:
        """The mean of each figure over the iterations that had it and over all processes, which
        take together; then the window is empty. NaN for a figure that was never finite."""
        names = sorted(self._sums)
        sums = [self._sums[name].to(device) for name in names]
        self.num_iterations, self._sums = 0, {}
        if not names:
            return {}
        means = total(torch.stack(sums)).unbind(1)
        return dict(zip(names, (means[0] / means[1]).tolist(), strict=True))
