"""Class labels in place of captions: what a class-conditional network is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .text import Condition

__all__ = ["AnyCondition", "ClassCondition"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassCondition:
    """What such a network is told about a batch of B pictures; used like `Condition`."""

    labels: Tensor
    """(B,) int64."""
    side_px: int
    """Of the square pictures, which such a network has one size of."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> ClassCondition:
        """The chosen rows; a single number keeps its batch dimension."""
        if isinstance(rows, int):
            rows = [rows]
        elif isinstance(rows, Tensor):
            rows = rows.to(self.labels.device)
        return replace(self, labels=self.labels[rows])

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def latent_shape(self, channels: int = 3) -> tuple[int, int, int, int]:
        """(B, channels, side, side): pixels."""
        return len(self), channels, self.side_px, self.side_px

    def to(self, device: torch.device | str | None = None) -> ClassCondition:
        return replace(self, labels=self.labels.to(device=device))

    @classmethod
    def cat(cls, conditions: Sequence[ClassCondition]) -> ClassCondition:
        """Joined along the batch; all of one size."""
        labels = torch.cat([condition.labels for condition in conditions])
        return replace(conditions[0], labels=labels)


AnyCondition = Condition | ClassCondition
